# SPDX-License-Identifier: Apache-2.0
"""A small translation model, trained from scratch on pairs of sentences: minutes on a GPU.

    python -m manyheads.recipes.translation --out FOLDER [--pairs FILE] [--budget "3000 steps"]

The pairs are those of Multi30k, German to English, or of a file with a sentence, a tab and its translation a line. The
folder is a plain checkpoint of transformers: ``manyheads inspect --model FOLDER --translate FILE`` looks into it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from manyheads.data.translations import Pair, multi30k
from manyheads.errors import UserError
from manyheads.models.translator import batches, new_tokenizer, new_translator, translation_loss
from manyheads.progress import time_left
from manyheads.training import TrainState, decay, fit, optimizers_of

__all__ = ["pairs_in"]

_TOLD = 100  # steps between two lines of progress


def pairs_in(path: Path) -> list[Pair]:
    """Pairs of a file with a sentence, a tab and its translation a line.

    Raises:
        UserError: it cannot be read, or a line has no translation.
    """
    try:
        rows = [line.partition("\t")[::2] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as text ({error}); give a sentence, a tab and its translation"
        ) from None
    if not rows or not all(target.strip() for _, target in rows):
        raise UserError(f"{path} has a line without a translation; write a sentence, a tab and its translation a line")
    return [(source.strip(), target.strip()) for source, target in rows]


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.translation", description="Train a small translation model from scratch."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--pairs", type=Path, help="file of sentences and translations; default: Multi30k, de to en")
    parser.add_argument("--budget", default="3000 steps", help="as '3000 steps', 5m or 90s")
    parser.add_argument("--vocab", type=int, default=6000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3, help="of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a model; name a new folder")

    def on_step(state: TrainState) -> None:
        if state.step % _TOLD == 0:
            left = time_left(state.seconds, state.progress)
            print(f"{min(1.0, state.progress):4.0%} step {state.step}: loss {float(state.loss):.3f} {left}", flush=True)

    try:
        pairs = multi30k("train") if args.pairs is None else pairs_in(args.pairs)
        tokenizer = new_tokenizer([text for pair in pairs for text in pair], args.vocab)
        torch.manual_seed(args.seed)
        model = new_translator(len(tokenizer), args.dim, args.layers, args.heads).to(args.device)
        fit(
            model, batches(tokenizer, pairs, args.batch, args.seed, args.device), translation_loss, budget=args.budget,
            optimizers=optimizers_of(model, args.lr, weight_decay=0.01), schedule=decay("linear", warmup=0.1),
            on_step=on_step,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: look into it with manyheads inspect --model {args.out} --translate FILE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
