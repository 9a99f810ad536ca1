# SPDX-License-Identifier: Apache-2.0
"""Train an encoder of texts, made by ``manyheads convert gemma_encoder`` or ``pooling``, on a file of yours.

    manyheads convert gemma_encoder --model HuggingFaceTB/SmolLM2-135M --out encoder
    python -m manyheads.recipes.text_encoder --encoder encoder --train reviews.tsv --kind classes --out trained

A line of the file is an example, its cells divided by tabs:

    classes   text, label                        a head says the class
    scores    text, other text, number           a head says the number
    pairs     query, text that fits, others...   vectors of what fits come near; others, as many in every line, do not

The trained encoder is a model of sentence-transformers, with the head beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyheads.errors import UserError
from manyheads.models.text_encoder import TextEncoder
from manyheads.training import TrainState
from manyheads.training.encoding import Kind, class_loss, pair_loss, score_loss, tune

__all__ = ["main", "train_encoder"]

KINDS = ("classes", "scores", "pairs")


def train_encoder(
    encoder: TextEncoder, rows: Sequence[Sequence[str]], kind: str, *, budget: str | int = "10m", lr: float = 5e-5,
    head_lr: float = 1e-3, train: Kind = "all", batch: int = 16, seed: int = 0,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> tuple[TextEncoder, tuple[str, ...]]:  # fmt: skip
    """Train on rows of cells; the encoder, with a head where the kind has one, and the names of its classes.

    Args:
        encoder: is trained in place.
        rows: as in the head of this file.
        kind: ``classes``, ``scores`` or ``pairs``.
        budget: as ``10m`` or a number of steps.
        lr, head_lr: highest rates of the model and of pooler and head.
        train: ``all`` weights, adapters (``lora``), or pooler and ``head``.
        batch: examples of a step.
        seed: of the head and of all draws.
        on_step: told the state after each step.

    Raises:
        UserError: a row has other cells, or there are fewer rows than a batch.
    """
    cells = {"classes": 2, "scores": 3}.get(kind, len(rows[0]) if rows else 2)
    for number, row in enumerate(rows, 1):
        if len(row) != cells or cells < 2 or not all(cell.strip() for cell in row):
            raise UserError(f"line {number} has not the {max(2, cells)} cells that every line of {kind} has")
    if len(rows) < batch:
        raise UserError(f"{len(rows)} lines do not fill a batch of {batch}; give more, or a smaller --batch")
    device = next(encoder.parameters()).device
    classes = tuple(sorted({row[1] for row in rows})) if kind == "classes" else ()
    torch.manual_seed(seed)
    if kind != "pairs":
        encoder = TextEncoder(
            encoder.model, encoder.tokenizer, encoder.design, len(classes) or 1, encoder.length, encoder.pooler
        )

    def get_batch(step: int) -> Any:
        some = [rows[i] for i in np.random.default_rng((seed, step)).choice(len(rows), batch, replace=False)]
        if kind == "pairs":
            return [encoder.read([row[i] for row in some]) for i in range(cells)]
        if kind == "classes":
            labels = torch.tensor([classes.index(row[1]) for row in some], device=device)
            return encoder.read([row[0] for row in some]), labels
        scores = torch.tensor([_number(row[2]) for row in some], device=device)
        return encoder.read([(row[0], row[1]) for row in some]), scores

    losses: dict[str, Any] = {"classes": class_loss, "scores": score_loss, "pairs": pair_loss}
    tune(encoder, get_batch, losses[kind], budget, lr=lr, head_lr=head_lr, train=train, on_step=on_step)
    return encoder, classes


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise UserError(f"{cell!r} is no number: the last cell of a line of scores is one") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.text_encoder", description="Train a text encoder.")
    parser.add_argument("--encoder", type=Path, required=True, help="folder that manyheads convert wrote")
    parser.add_argument("--train", type=Path, required=True, help="file of examples, cells divided by tabs")
    parser.add_argument("--kind", choices=KINDS, default="classes", help="what a line is")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained encoder")
    parser.add_argument("--budget", default="10m", help="as 10m, 90s or '200 steps'")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step")
    parser.add_argument("--lr", type=float, default=5e-5, help="highest rate of the model; adapters take more, as 1e-3")
    parser.add_argument("--parts", choices=("all", "lora", "head"), default="all", help="what is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    def line(state: TrainState) -> None:
        if state.step % 10 == 0 or state.step == 1:
            print(f"{min(1.0, state.progress):4.0%} step {state.step}: loss {float(state.loss):.3f}", flush=True)

    try:
        encoder = TextEncoder.load(args.encoder, args.device, torch.float32)
        try:
            rows = [text.split("\t") for text in args.train.read_text("utf-8").splitlines() if text.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.train} cannot be read as UTF-8 text; give a file of lines") from error
        made, classes = train_encoder(
            encoder, rows, args.kind, budget=args.budget, lr=args.lr, train=args.parts, batch=args.batch,
            seed=args.seed, on_step=line,
        )  # fmt: skip
        made.save(args.out, {"kind": args.kind, "classes": list(classes), "encoder": str(args.encoder)})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: manyheads.models.text_encoder.TextEncoder.load('{args.out}')")
    return 0


if __name__ == "__main__":
    sys.exit(main())
