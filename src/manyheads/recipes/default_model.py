# SPDX-License-Identifier: Apache-2.0
"""The model that ships with manyheads: a Llama of 19 million parameters that has read the packages installed here.

    python -m manyheads.recipes.default_model --out FIRST --minutes 6.5
    python -m manyheads.recipes.default_model --out DIR --minutes 2.6 --start FIRST

Trains on one GPU for a given time: Muon on the matrices, AdamW on the rest, contexts of 2,048, then 4,096, then 8,192
tokens, a third of the sequences with planted constants. The first stage draws small packages far more often than their
size would have it, which teaches fast and ends in learning them by heart; the second starts from the first, draws
packages by their size, at a context of 4,096 tokens, and undoes that. The weights depend on how many steps the time
allows, all else on the seed. DIR appears, complete, when the model stands measured; until then the work is in
DIR.partial, which holds loadable weights from the end of the training on.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from manyheads.recipes import _card
from manyheads.recipes._corpus import END, Corpus, build, site_packages
from manyheads.recipes._evaluate import evaluate
from manyheads.recipes._llama import Llama
from manyheads.recipes._planted import Ids, Planter
from manyheads.training import Budget, Muon, TrainState, decay, fit, next_token_loss
from manyheads.training.language import predicted_tokens


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training; the defaults made the model in the package."""

    vocab_size: int = 8192
    hidden: int = 384
    mlp: int = 1024
    layers: int = 10
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    theta: float = 1e5
    positions: int = 8192
    phases: tuple[tuple[int, float], ...] = (
        (2048, 0.45),
        (4096, 0.92),
        (8192, 1.0),
    )  # context, end as share of the time
    batch_tokens: int = 65_536
    lr: float = 4e-3
    warmup: int = 200  # steps
    weight_decay: float = 0.1  # of the matrices
    planted: float = 0.3  # share of sequences with planted constants
    flatten: float = 0.6  # a package of n tokens is drawn with weight n ** flatten
    files: int | None = None  # read only so many
    steps: int | None = None  # instead of the time
    seed: int = 0

    def config(self) -> LlamaConfig:
        """Return the architecture in transformers' terms."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


SMOKE = Recipe(
    vocab_size=512, hidden=64, mlp=128, layers=2, heads=2, kv_heads=1, head_dim=32, positions=256,
    phases=((128, 0.6), (256, 1.0)), batch_tokens=1024, warmup=5, files=120, steps=60,
)  # fmt: skip


SECOND = Recipe(phases=((4096, 1.0),), lr=2e-3, flatten=1.0)

SUMMARY = "Train the default model on the Python packages installed here and measure it on the standard library."


class Sequences(Dataset[Ids]):
    """The sequences of one phase: number ``i`` is the same tokens in every run, whichever process makes it."""

    def __init__(self, corpus: Corpus, planter: Planter, length: int, recipe: Recipe) -> None:
        self.corpus, self.planter, self.length, self.recipe = corpus, planter, length, recipe
        sizes = np.diff(corpus.bounds)[:, 0]
        weights = np.where(sizes > 0, sizes, 0) ** recipe.flatten
        self.edges = np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, i: int) -> Ids:
        rng = np.random.default_rng((self.recipe.seed, self.length, i))
        if rng.random() < self.recipe.planted:
            return self.planter.training(lambda size: self.take(size, rng), self.length + 1, rng)
        return self.take(self.length + 1, rng)

    def take(self, size: int, rng: Generator) -> Ids:
        """Return ``size`` tokens from a random place of a random package on, files in the order of their paths."""
        begin, end = self.corpus.bounds[np.searchsorted(self.edges, rng.random() * self.edges[-1])]
        start = min(int(rng.integers(begin, max(begin + 1, end - size // 2))), len(self.corpus.tokens) - size)
        return self.corpus.tokens[start : start + size].astype(np.int32)


def batches(data: Sequences, rows: int, device: str) -> Iterator[torch.Tensor]:
    """Endless batches [rows, length + 1] on ``device``, made ahead by worker processes when it is a GPU."""
    workers = min(12, (os.cpu_count() or 2) - 2) if device == "cuda" else 0
    ahead: dict[str, Any] = {"prefetch_factor": 8, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(data, batch_size=rows, num_workers=workers, pin_memory=device == "cuda", **ahead)
    for batch in loader:
        yield batch.to(device, non_blocking=True)


def train(
    corpus: Corpus, recipe: Recipe, seconds: float, device: str, start_from: Path | None = None
) -> tuple[Llama, list[dict[str, float]]]:
    """Train for ``seconds`` (compiling not counted); return the model and its curve, a row every 50 steps."""
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Llama.from_transformers(start_from, dtype) if start_from else Llama(recipe.config(), dtype)
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim == 3]
    others = [p for p in model.parameters() if p.ndim < 3]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, recipe.lr, recipe.weight_decay),
        torch.optim.AdamW(others, recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    planter = Planter.build(corpus.tokenizer, corpus.words[:3000:2], recipe.seed)  # the other half is for measuring
    lengths = [length for length, _ in recipe.phases]
    rows = [max(1, recipe.batch_tokens // length) for length in lengths]
    data = [Sequences(corpus, planter, length, recipe) for length in lengths]
    sources = [batches(*of_phase, device) for of_phase in zip(data, rows, strict=True)]
    shapes = [(count, length + 1) for count, length in zip(rows, lengths, strict=True)]
    state = TrainState(Budget(recipe.steps, "steps") if recipe.steps else Budget(seconds, "seconds"))
    curve: list[dict[str, float]] = []

    def phase() -> int:
        return sum(state.progress >= end for _, end in recipe.phases[:-1])

    def on_step(state: TrainState) -> None:
        if state.step % 50 and state.progress < 1:
            return
        state.look()
        since = state.losses[-((state.step - 1) % 50 + 1) :]
        curve.append({
            "steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 2),
            "context": lengths[phase()], "loss": round(sum(since) / len(since), 4),
        })  # fmt: skip
        if state.step % 500 == 0:
            report(f"step {state.step} context {lengths[phase()]} loss {curve[-1]['loss']:.3f} "
                   f"{state.tokens / state.seconds / 1e6:.2f} Mtok/s")  # fmt: skip

    fit(
        model, lambda step: next(sources[phase()]), next_token_loss, budget=state, optimizers=optimizers, bf16=False,
        compiled=device == "cuda", schedule=decay("linear", warmup=recipe.warmup, hold=0.25),
        tokens_of=predicted_tokens, on_step=on_step,
        warm=[torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes],
    )  # fmt: skip
    report(f"trained {state.step} steps, {state.tokens / 1e6:.0f} M tokens")
    return model, curve


def report(line: str) -> None:
    """Print one line of progress, with the time of day."""
    print(f"{datetime.now():%H:%M:%S} {line}", flush=True)


def save(model: Llama, corpus: Corpus, out: Path) -> None:
    """Write weights (bfloat16, shards under 14 MB), configuration and tokenizer as transformers reads them."""
    model.to_transformers(torch.bfloat16).save_pretrained(out, max_shard_size="14MB")
    PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(out)


def make(
    out: Path, minutes: float, roots: list[Path], recipe: Recipe, quick: bool, start: Path | None = None
) -> dict[str, Any]:
    """Run one stage of the recipe; return what results.json holds. ``out`` must not exist yet."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said outright, tokenizers does not warn at every fork
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else None
    corpus = build(roots, recipe.vocab_size, recipe.seed, recipe.files, 1 if quick else 48, tokenizer)
    report(
        f"{len(corpus.tokens) / 1e6:.1f} M tokens, {len(corpus.packages)} packages, files left out: {corpus.skipped}"
    )
    model, curve = train(corpus, recipe, minutes * 60, device, start)
    staging = out.with_name(f"{out.name}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    save(model, corpus, staging)
    (staging / "curves.json").write_text(json.dumps(curve))
    report("measuring on the standard library")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shipped: Any = AutoModelForCausalLM.from_pretrained(staging, dtype=dtype)
    shipped.to(device)
    measured = evaluate(shipped, corpus.tokenizer, corpus.words[1:3000:2], recipe.seed + 1, quick)
    first = json.loads((start / "results.json").read_text()) if start else None
    results = {
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "recipe": {name: value for name, value in vars(recipe).items() if name not in ("files", "steps")},
        "training": {
            "minutes": minutes, **{name: curve[-1][name] for name in ("steps", "tokens", "loss")},
            "whole_minutes": (time.perf_counter() - begun) / 60,
        },
        "first_stage": first and {name: first[name] for name in ("recipe", "training", "environment")},
        "data": {"tokens": len(corpus.tokens), "packages": corpus.packages, "files_left_out": corpus.skipped},
        "environment": _card.environment(device),
        "measured": measured,
    }  # fmt: skip
    rows = [
        [r["steps"], f"{r['tokens'] / 1e6:.0f}", r["context"], f"{r['loss']:.3f}"]
        for r in curve[:: -(len(curve) // 12 + 1)]
    ]
    (staging / "results.json").write_text(json.dumps(results, indent=1))
    (staging / "README.md").write_text(_card.render("default_model", results, curve_rows=rows[::-1]))
    staging.rename(out)
    return results


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.default_model", description=SUMMARY)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--minutes", type=float, help="of training (6.5); compiling, measuring not counted")
    parser.add_argument("--data", type=Path, nargs="+", default=site_packages(), help="folders of packages")
    parser.add_argument("--start", type=Path, help="folder that the first stage made; trains the second")
    parser.add_argument("--batch-tokens", type=int, help="tokens of one step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the whole path at toy size, in under a minute on a CPU")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a new folder")
    if missing := [str(folder) for folder in args.data if not folder.is_dir()]:
        parser.error(f"no such folder: {', '.join(missing)}")
    changes = {name: value for name in ("batch_tokens", "lr", "seed") if (value := getattr(args, name)) is not None}
    if args.start and not (args.start / "results.json").is_file():
        parser.error(f"{args.start} holds no finished first stage")
    recipe = replace(SMOKE if args.smoke else SECOND if args.start else Recipe(), **changes)
    if args.minutes is not None:
        recipe = replace(recipe, steps=None)
    make(args.out, args.minutes or 6.5, args.data, recipe, args.smoke, args.start)
    report(f"done: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
