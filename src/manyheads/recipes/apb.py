# SPDX-License-Identifier: Apache-2.0
"""Retaining heads for ``apb``, trained on a frozen model: minutes on a GPU.

    python -m manyheads.recipes.apb --model MODEL --out FOLDER [--text prose] [--budget 5m] [--answer 256]

The model reads pieces of text. In each layer the heads learn, from queries, keys and values before rotation, the
largest logit that a token gets of the last ``answer`` queries, which stand for an answer that is yet to come. The paper
trains on questions with long documents (LongAlign, 3,000 steps of 10,240 tokens, AdamW at 5e-4); here any text serves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import manyheads
from manyheads.call import AttentionCall
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.parallel.apb import RetainingHeads
from manyheads.parallel.apb.heads import causal_importance, features
from manyheads.recipes._adapters import add_options, frozen, run_training
from manyheads.strategy import AttentionWatch
from manyheads.training import Budget, Checkpoint, TrainState, decay, fit

__all__ = ["explained", "train_heads"]

_HELD_OUT = 4  # batches that are judged on
OnStep = Callable[[TrainState], bool | None]


class _Examples(AttentionWatch):
    """Notes what the heads of each layer read, and what they are to say."""

    found: dict[int, tuple[Tensor, Tensor]]
    answer: int

    @classmethod
    def of(cls, answer: int) -> _Examples:
        """None noted yet; the last ``answer`` queries count."""
        made = cls()
        object.__setattr__(made, "found", {})
        object.__setattr__(made, "answer", answer)
        return made

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        if call.rotary is None:
            raise UserError(f"{call.site.name} does not show its rotary positions, before which retaining heads read")
        read = features(call.q, call.k, call.v, call.rotary)
        self.found[call.site.layer or 0] = read, causal_importance(call.q, call.k, call.scale, self.answer)


def train_heads(
    model: nn.Module, get_batch: Callable[[int], Tensor], *, budget: Budget | TrainState | str | int = "5m",
    lr: float = 5e-4, answer: int = 256, hidden: int = -1, seed: int = 0, checkpoint: Checkpoint | None = None,
    on_step: OnStep | None = None,
) -> RetainingHeads:  # fmt: skip
    """Heads of ``model``, which stays as it is.

    Args:
        model: a decoder of transformers, on its device.
        get_batch: ids ``[B, T + 1]`` by the number of the step; -1 to -4 are for judging.
        budget: as in :func:`manyheads.training.fit`.
        lr: highest learning rate, of AdamW.
        answer: last queries of a piece, whose largest logit counts; at most half of the piece.
        hidden: units of each head, see :class:`RetainingHeads`.
        seed: of the weights at the start.
        checkpoint: where checkpoints go; training goes on from one.
        on_step: told the state after each step; True ends it.

    Raises:
        UserError: a model that has no layer for them.
    """
    examples = _Examples.of(min(answer, get_batch(0).shape[1] // 2))
    with frozen(model), manyheads.use(model, examples):
        _read(model, examples, get_batch(0))
        device, width = next(model.parameters()).device, next(iter(examples.found.values()))[0].shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sites = [site for site, _ in find_sites(model)]
            heads = RetainingHeads.of(width, sites, hidden=hidden).to(device)

        def loss(_: nn.Module, ids: Tensor) -> Iterator[Tensor]:
            _read(model, examples, ids)
            for layer, (read, target) in examples.found.items():
                yield heads.loss(heads.layer(layer)(read), target) / len(examples.found)

        optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, betas=(0.9, 0.95))
        state = fit(
            heads, get_batch, loss, budget=budget, optimizers=[optimizer], clip=0.5, bf16=False, checkpoint=checkpoint,
            schedule=decay("cosine", warmup=0.1), on_step=on_step,
        )  # fmt: skip
        heads.about = {
            "model": type(model).__name__, "steps": state.step, "answer": examples.answer,
            "r2": explained(model, heads, examples, [get_batch(-i) for i in range(1, _HELD_OUT + 1)]),
        }  # fmt: skip
    return heads.requires_grad_(False)


@torch.no_grad()
def explained(model: nn.Module, heads: RetainingHeads, examples: _Examples, batches: list[Tensor]) -> float:
    """R^2 of what is to be said, averaged over layers, key/value heads and batches."""
    found = []
    for ids in batches:
        _read(model, examples, ids)
        for layer, (read, target) in examples.found.items():
            apart = (heads.layer(layer)(read) - target).square().mean((0, 2))
            found.append(1 - apart / target.var((0, 2), correction=0).clamp(min=1e-12))
    return float(torch.cat(found).mean())


def _read(model: Any, examples: _Examples, ids: Tensor) -> None:
    """Note the examples of ``ids [B, T + 1]``."""
    examples.found.clear()
    with torch.no_grad():
        model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.apb", description="Train retaining heads.")
    add_options(parser, of="heads", lr=5e-4)
    parser.add_argument("--answer", type=int, default=256, help="last queries of a piece that say what counts")
    parser.add_argument("--hidden", type=int, default=-1, help="units of each head; a sixth of what it reads")
    args = parser.parse_args(arguments)
    if (args.out / "retaining_heads.json").exists():
        parser.error(f"{args.out} holds heads; name a new folder")
    return run_training(
        args,
        lambda model, get_batch, line, checkpoint: train_heads(
            model, get_batch, budget=args.budget, lr=args.lr, answer=args.answer, hidden=args.hidden, seed=args.seed,
            checkpoint=checkpoint, on_step=lambda state: line(state, f"loss {float(state.loss):.3f}"),
        ),
        lambda heads: f"R^2 {heads.about['r2']:.2f}; use them as apb:scorer=retaining,heads={args.out}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
