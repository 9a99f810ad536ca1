# SPDX-License-Identifier: Apache-2.0
"""What recipes of small rectified flows share: options, a line of progress, means of figures, and results."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyheads.models.rectified import Flow
from manyheads.training import TrainState

__all__ = ["finish", "means", "options", "told"]


def options(what: str, *, batch: int, rate: float, smoke: str = "three") -> argparse.ArgumentParser:
    """A parser of what all of them take: where to write, the sizes of the blocks, and how to train."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help=f"{smoke} steps, to see that it runs")
    return parser


def told(state: TrainState) -> None:
    """A line every hundred steps, and at the end."""
    if state.step % 100 == 0 or state.progress >= 1:
        state.look()
        last = state.losses[-100:]
        print(f"{state.step:6d} steps  loss {sum(last) / len(last):.4f}  {state.seconds:5.0f} s", flush=True)


def means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure over samples."""
    return {name: round(sum(each[name] for each in figures) / len(figures), 4) for name in figures[0]}


def finish(
    flow: Flow, given: argparse.Namespace, judged: Mapping[str, float], seconds: float, on: str, **more: Any
) -> None:  # fmt: skip
    """Write a trained flow and what is to be known of it, and say so; ``more`` are further facts."""
    flow.save(given.out)
    results = {
        **more, "batch": given.batch, "rate": given.rate, "seed": given.seed, "parameters": flow.parameters_held,
        "seconds": round(seconds), "judged": judged,
    }  # fmt: skip
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"on {on} never seen: {judged}\nwritten to {given.out}")
