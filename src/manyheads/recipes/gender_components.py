# SPDX-License-Identifier: Apache-2.0
"""Tune the heads behind a model's gender bias on balanced sentences, and nothing else, and save the model.

    python -m manyheads.recipes.gender_components --model path/or/name --out balanced/
    python -m manyheads.recipes.gender_components --model path/or/name --out balanced/ --heads 26.2+25.2 --parts qo

Heads are those of the largest indirect effect (``gender_components``) unless they are named. Sentences of running text
about a profession and with a pronoun are read beside their swaps (``balanced_sentences`` of
:mod:`manyheads.data.gender_bias`; the paper has BUG's). Loss of the next token, AdamW at 1e-4 with a decay of 1e-4, a
rate that falls in a straight line.
Only the rows and columns of the chosen heads change (:mod:`manyheads.training.slices`): in the paper q, k and v. The
released code masks gradients by a name that no weight has and so tunes whole layers; where heads share keys and values
the group's change, and ``--parts qo`` stays within the heads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import manyheads
from manyheads.data.gender_bias import balanced_sentences
from manyheads.errors import UserError
from manyheads.experiment import CausalLM
from manyheads.integrations.head_weights import head_parts
from manyheads.lenses.gender_components import GenderComponents
from manyheads.recipes import _adapters, _card
from manyheads.training import TrainState, decay, fit, next_token_loss
from manyheads.training.slices import Slice, train_slices

__all__ = ["balanced_batches", "main", "tune_heads"]

Batch = tuple[Tensor, Tensor]


def balanced_batches(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], batch: int, seed: int, device: str | torch.device = "cpu"
) -> Callable[[int], Batch]:
    """Batches by number of ``batch`` sentences, half of them the swaps of the other half: ids, and which count.

    Ids ``[batch, T + 1]`` are padded on the right with the end of a text, which stands before each sentence too.

    Raises:
        UserError: there are too few pairs.
    """
    if len(pairs) < batch // 2 or batch < 2:
        raise UserError(f"{len(pairs)} pairs of sentences make no batch of {batch}: give more text")
    edge = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    encoded = [[[edge, *tokenizer.encode(s, add_special_tokens=False)] for s in pair] for pair in pairs]
    per = len(encoded) // (batch // 2)  # batches of an epoch

    def get_batch(number: int) -> Batch:
        epoch, place = divmod(number, per)
        order = np.random.default_rng([seed, epoch]).permutation(len(encoded))
        rows = [row for i in order[place * (batch // 2) : (place + 1) * (batch // 2)] for row in encoded[i]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [edge] * (longest - len(row)) for row in rows], device=device)
        counted = torch.arange(1, longest, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        return ids, counted

    return get_batch


def tune_heads(
    model: nn.Module, get_batch: Callable[[int], Batch], heads: Sequence[str] | None, *, parts: str = "qkv",
    budget: str | int = 200, lr: float = 1e-4, weight_decay: float = 1e-4, bf16: bool | None = None,
    on_step: Callable[[TrainState], Any] | None = None,
) -> int:  # fmt: skip
    """Tune a model in place; returns how many of its numbers were trained.

    Args:
        model: a causal language model of transformers.
        get_batch: see :func:`balanced_batches`.
        heads: as ``layer.head``; None tunes every parameter.
        parts: of the heads: ``q``, ``k``, ``v`` and ``o``.
        budget, lr, weight_decay, bf16, on_step: of the training.
    """
    more: dict[str, Any] = {"budget": budget, "schedule": decay("linear"), "bf16": bf16, "on_step": on_step}
    if heads is None:
        held = [p for p in model.parameters() if p.requires_grad]
        whole = torch.optim.AdamW(held, lr=lr, weight_decay=weight_decay)
        fit(model, get_batch, next_token_loss, optimizers=[whole], **more)
        return sum(p.numel() for p in held)
    with train_slices(model, [Slice(*part) for part in head_parts(model, heads, parts)]) as own:
        optimizer = own.follow(torch.optim.AdamW(own.parameters, lr=lr, weight_decay=weight_decay))
        fit(model, get_batch, next_token_loss, optimizers=[optimizer], **more)
        return own.count


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.gender_components", description="Tune the heads behind gender bias."
    )
    parser.add_argument("--model", default="default", help="folder or hub name of a decoder; default: the shipped one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tuned model")
    parser.add_argument("--text", default="brown", help="where sentences are looked for: as for the other recipes")
    parser.add_argument("--heads", default="", help="layer.head joined by +; else those of the largest effect")
    parser.add_argument("--top", type=int, default=10, help="how many those are")
    parser.add_argument("--prompts", type=int, default=96, help="that their effects are measured on; 0 for all")
    parser.add_argument("--parts", default="qkv", help="of the heads that are tuned: q, k, v, o")
    parser.add_argument("--budget", default="200 steps", help="as 5m, 90s or '200 steps'")
    parser.add_argument("--batch", type=int, default=32, help="sentences of a step, half of them swapped")
    parser.add_argument("--lr", type=float, default=1e-4, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a model; name a new folder")
    try:
        subject = CausalLM(args.model, dtype="float32")
        subject.load(args.device)
        heads = args.heads.split("+") if args.heads else _found(subject, args)
        pairs = balanced_sentences(text.content for text in _adapters.texts(args.text))
        get_batch = balanced_batches(subject.tokenizer, pairs, args.batch, args.seed, args.device)
        print(f"{len(pairs)} pairs of sentences; tuning {', '.join(heads)}", flush=True)
        trained = tune_heads(
            subject.model, get_batch, heads, parts=args.parts, budget=args.budget, lr=args.lr, on_step=_told
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    subject.model.save_pretrained(args.out)
    subject.tokenizer.save_pretrained(args.out)
    about = {
        "recipe": "gender_components", "model": args.model, "heads": heads, "parts": args.parts, "trained": trained,
        "pairs": len(pairs), "text": args.text, "budget": args.budget, "batch": args.batch, "lr": args.lr,
        "seed": args.seed, "environment": _card.environment(subject.model.device.type),
    }  # fmt: skip
    (args.out / "tuned.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {trained:,} numbers were tuned; load it as any model")
    return 0


def _found(subject: CausalLM, args: argparse.Namespace) -> list[str]:
    """Heads of the largest indirect effect."""
    lens = GenderComponents(prompts=args.prompts, seed=args.seed)
    table = lens.locate(subject.model, subject.tokenizer, manyheads.use).tables["nie"]
    return list(table.names(table.top(args.top)))


def _told(state: TrainState) -> None:
    if state.step % 10 == 0 or state.step == 1:
        print(f"{min(1.0, state.progress):4.0%} step {state.step}: loss {float(state.loss):.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
