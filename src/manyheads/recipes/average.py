# SPDX-License-Identifier: Apache-2.0
"""The last step of the default model: average the weights of its two training stages.

    python -m manyheads.recipes.average --first FIRST --second SECOND --out DIR [--share 0.35]

The second stage, trained at 4,096 tokens, forgets what lies beyond them; a third of the first stage's weights brings it
back and costs little within. Both stages share a start, so the line between them is passable (arXiv 2109.01903).
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from manyheads import models
from manyheads.models import packed
from manyheads.recipes import _card
from manyheads.recipes._evaluate import context_curve, recall, stdlib_tokens
from manyheads.recipes._planted import Planter

WORDS = "amber basin cedar delta ember fable grove haven ivory joint kite lunar maple noble orbit pearl".split()
CONTEXTS = (256, 512, 1024, 2048, 4096)
LENGTHS = (1024, 2048, 4096, 6000)


def average(first: Path, second: Path, share: float) -> Any:
    """The model of ``second`` with ``share`` of the weights of ``first`` in it, averaged in float32."""
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (first, second)]
    weights = models[0].state_dict()
    with torch.no_grad():
        for name, weight in models[1].named_parameters():  # tied ones once
            weight.lerp_(weights[name], share)
    return models[1].eval()


def measure(model: Any, tokenizer: Tokenizer, files: int, questions: int, seed: int) -> list[dict[str, Any]]:
    """The figures of the card, fewer of each: this runs on a CPU."""
    rng = np.random.default_rng(seed)
    texts = stdlib_tokens(tokenizer, max(LENGTHS), files)
    rows = context_curve(model, texts, CONTEXTS, 1, rng)
    planter = Planter.build(tokenizer, WORDS, seed, 2000)
    for kind in ("one", "several", "chained"):
        rows += [recall(model, planter, texts, length, kind, questions, rng) for length in LENGTHS]
    return [asdict(row) for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.average", description="Average the two stages.")
    for name in ("first", "second", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.35, help="of the first stage in the average")
    parser.add_argument("--files", type=int, default=10, help="standard-library files to measure the loss on")
    parser.add_argument("--questions", type=int, default=20, help="planted constants of each kind and length")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a new folder")
    staging = args.out.with_name(f"{args.out.name}.partial")
    shutil.copytree(args.second, staging, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    packed.save(average(args.first, args.second, args.share).to(torch.bfloat16), staging, bits=6)
    shipped: Any = models.load(staging, dtype=torch.float32)[0]
    tokenizer = Tokenizer.from_file(str(staging / "tokenizer.json"))
    figures = measure(shipped.eval(), tokenizer, args.files, args.questions, seed=1)
    results = json.loads((args.second / "results.json").read_text())
    results["average"] = {"share": args.share, "environment": _card.environment("cpu"), "figures": figures}
    (staging / "results.json").write_text(json.dumps(results, indent=1))
    section = _card.render("average", results["average"])
    (staging / "README.md").write_text((args.second / "README.md").read_text().rstrip() + "\n\n" + section)
    staging.rename(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
