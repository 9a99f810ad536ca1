# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a chat model on worked arithmetic, keep checkpoints, and follow which heads come into its circuit.

    python -m manyheads.recipes.thinking_sparks --model smollm2-135m-instruct --out tuned/ --every 50
    manyheads inspect --model tuned/ --against smollm2-135m-instruct --lens thinking_sparks:edges=1000

It imitates worked sums, and in half of each batch GSM8K (as far as its file is at hand), in the model's chat template:
supervised fine-tuning, loss on answers alone. Problems are split in two halves by their text; the second half is never
trained on. ``--every`` writes ``step-50/`` and so on, plain checkpoints; ``cohorts.json`` and ``cohorts.svg`` beside
them say for each how many heads of its circuit (``thinking_sparks``) are there since which checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import manyheads
from manyheads import models
from manyheads.data.word_problems import last_number, word_problems
from manyheads.errors import UserError
from manyheads.experiment import CausalLM
from manyheads.lenses.thinking_sparks import Pair, attribute, cohorts, opening_pairs
from manyheads.recipes import _card
from manyheads.recipes.reasoning_rhythm import Problem, drawn_sums, imitation
from manyheads.training import TrainState, decay, fit, next_token_loss, optimizers_of

__all__ = ["draw_problems", "follow", "half_of", "main", "tune"]


def half_of(problems: Sequence[Problem], second: bool) -> list[Problem]:
    """Those of the first half, which is trained on, or of the second, by their questions: no draw is in both."""
    return [problem for problem in problems if zlib.crc32(problem.question.encode()) % 2 == int(second)]


def draw_problems(count: int, rng: np.random.Generator, second: bool, source: str = "both") -> list[Problem]:
    """Problems of one half: worked sums of two and three numbers, GSM8K's, or as many of both.

    Args:
        count: how many.
        rng: of the draws.
        second: whether of the half that is not trained on.
        source: ``sums``, ``gsm8k`` or ``both``.

    Raises:
        UserError: GSM8K cannot be had.
    """
    known: list[Problem] = []
    if source != "sums":
        texts = [(q, a, last_number(a)) for q, a in word_problems("gsm8k")]
        every = half_of([Problem(q, a, result) for q, a, result in texts if result is not None], second)
        wanted = count if source == "gsm8k" else count // 2
        known = [every[i] for i in rng.permutation(len(every))[:wanted]]
    sums: list[Problem] = []
    while len(sums) < count - len(known):
        sums += half_of(drawn_sums(1, rng, terms=2 + len(sums) % 2), second)
    return [*known, *sums]


def tune(
    model: Any, tokenizer: Any, draw: Callable[[int], Sequence[Problem]], *, steps: int, lr: float = 5e-5,
    longest: int = 256, bf16: bool | None = None, on_step: Callable[[TrainState], Any] | None = None,
) -> None:  # fmt: skip
    """Imitate worked answers, in place.

    Args:
        model: in float32.
        tokenizer: its own.
        draw: given the number of a step, problems to imitate.
        steps: of AdamW, whose rate falls to a tenth of ``lr``.
        lr: highest rate.
        longest: tokens that are read of a problem with its answer.
        bf16: whether computed in bfloat16; as the device does when None.
        on_step: see :func:`manyheads.training.fit`.
    """
    device = next(model.parameters()).device

    def get_batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, counts = imitation(model, tokenizer, draw(number))
        return ids[:, :longest].to(device), counts[:, : longest - 1].to(device)

    fit(
        model, get_batch, next_token_loss, budget=steps, optimizers=optimizers_of(model, lr, weight_decay=0.0),
        schedule=decay("linear", warmup=max(1, steps // 20), floor=0.1), bf16=bf16, on_step=on_step,
    )  # fmt: skip


def follow(
    base: Any, tokenizer: Any, checkpoints: Sequence[Path], out: Path, *, edges: int, prompts: int, seed: int,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    """Circuits of the base and of every checkpoint on the prompts of the last one; writes the cohorts into ``out``."""
    asked = [p.question for p in draw_problems(prompts, np.random.default_rng([seed, 2]), True, "sums")]

    def circuit(model: Any, pairs: Sequence[Pair]) -> frozenset[str]:
        model.requires_grad_(False)
        return attribute(model, manyheads.use, pairs, edges=edges).heads

    last = models.load(checkpoints[-1], device, torch.float32)[0]
    pairs = opening_pairs(last, base, tokenizer, asked)
    before = circuit(base, [Pair(p.corrupted, p.clean, p.start) for p in pairs])
    later = [circuit(models.load(path, device, torch.float32)[0], pairs) for path in checkpoints]
    found = {
        "checkpoints": [path.name for path in checkpoints], "base": sorted(before), "heads": [sorted(h) for h in later],
        "since": cohorts(before, later), "edges": edges, "prompts": len(pairs),
    }  # fmt: skip
    (out / "cohorts.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _draw(found, out / "cohorts.svg")
    return found


def _draw(found: dict[str, Any], path: Path) -> None:
    """Bars of heads by first appearance, one for each checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    names, bottom = found["checkpoints"], np.zeros(len(found["checkpoints"]))
    for first, values in enumerate(zip(*found["since"], strict=True)):
        label = "the base's" if first == 0 else f"since {names[first - 1]}"
        axes.bar(names, values, bottom=bottom, label=label)
        bottom = bottom + np.array(values)
    axes.set(ylabel="heads in the circuit", title="Heads by first appearance")
    axes.legend(fontsize=7)
    figure.savefig(path)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.thinking_sparks", description="Fine-tune a chat model on worked arithmetic."
    )
    parser.add_argument("--model", default="default", help="folder or hub name of a decoder; default: the shipped one")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--source", choices=["both", "sums", "gsm8k"], default="both", help="what is imitated")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=0, help="steps between two checkpoints; 0 for none")
    parser.add_argument("--batch", type=int, default=16, help="problems of a step")
    parser.add_argument("--lr", type=float, default=5e-5, help="highest learning rate")
    parser.add_argument("--edges", type=int, default=1000, help="of the circuits of the checkpoints")
    parser.add_argument("--prompts", type=int, default=8, help="that these are found on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = _options()
    args = parser.parse_args(arguments)
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a model; name a new folder")
    saved: list[Path] = []
    try:
        subject = CausalLM(args.model, dtype="float32")
        subject.load(args.device)
        model, tokenizer = subject.model, subject.tokenizer
        torch.manual_seed(args.seed)

        def save(path: Path) -> None:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)

        def on_step(state: TrainState) -> None:
            if state.step % 10 == 0 or state.step == 1:
                print(f"step {state.step} of {args.steps}: loss {float(state.loss):.3f}", flush=True)
            if args.every and state.step % args.every == 0 and state.step < args.steps:
                saved.append(args.out / f"step-{state.step}")
                save(saved[-1])

        tune(
            model, tokenizer,
            lambda n: draw_problems(args.batch, np.random.default_rng([args.seed, 1, n]), False, args.source),
            steps=args.steps, lr=args.lr, on_step=on_step,
        )  # fmt: skip
        save(args.out)
        if args.every:
            base = CausalLM(args.model, dtype="float32")
            base.load(args.device)
            found = follow(
                base.model, tokenizer, [*saved, args.out], args.out, edges=args.edges, prompts=args.prompts,
                seed=args.seed, device=args.device,
            )  # fmt: skip
            print(f"heads by first appearance: {found['since']}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = {
        "recipe": "thinking_sparks", **{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "environment": _card.environment(model.device.type),
    }  # fmt: skip
    (args.out / "tuned.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: load it as any model, and inspect it --against {args.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
