# SPDX-License-Identifier: Apache-2.0
"""Gates for ``attention_gate``, trained on a frozen model: minutes on a GPU.

    python -m manyheads.recipes.attention_gate --model MODEL --out FOLDER [--target 0.3] [--text prose] [--budget 5m]

The loss is that of the next token of ordinary text under the gates, and the eviction loss, which pulls the part that is
kept to the target. Only gates are trained. Afterwards the threshold is set so that the target is met on text that was
not trained on. The same command goes on with a training that was cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import manyheads
from manyheads.caches.attention_gate import Gates
from manyheads.caches.attention_gate.soft import Counts, Relaxation, SoftGates, eviction_loss
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.recipes._adapters import add_options, frozen, run_training
from manyheads.training import Budget, Checkpoint, TrainState, decay, fit

__all__ = ["calibrate", "train_gates"]

_LOWERING = 0.5  # of the training: until then the target falls from 1 to what it is to be
OnStep = Callable[[TrainState, float, float], bool | None]


def train_gates(
    model: nn.Module, get_batch: Callable[[int], Tensor], *, target: float = 0.3, budget: Budget | str | int = "5m",
    lr: float = 1e-2, weight: float = 0.5, relaxation: Relaxation = "straight_through", counts: Counts = "flags",
    hinge: bool = False, num_heads: int = 2, head_dim: int = 16, bias: float = 2.0, sinks: int = 4,
    seed: int = 0, checkpoint: Checkpoint | None = None, on_step: OnStep | None = None,
) -> Gates:  # fmt: skip
    """Gates of ``model``, which stays as it is.

    Args:
        model: a decoder of transformers, on its device.
        get_batch: ids ``[B, T + 1]`` by the number of the step; -1 to -4 are for :func:`calibrate`.
        target: part of the tokens to be kept, on average over layers and heads.
        budget: as in :func:`manyheads.training.fit`.
        lr: highest learning rate, of AdamW.
        weight: of the eviction loss.
        relaxation, counts, hinge: see :mod:`manyheads.caches.attention_gate.soft`.
        num_heads, head_dim, bias: of each gate.
        sinks: first tokens that are always kept.
        seed: of the weights at the start.
        checkpoint: where checkpoints go; training goes on from one.
        on_step: told the state, the loss of the text and the part that was kept after each step; True ends it.

    Raises:
        UserError: a target that is no part, or a model without layers that a gate can stand before.
    """
    if not 0 < target <= 1:
        raise UserError(f"target is the part of the tokens that is kept, above 0 and at most 1, not {target}")
    sites = [site for site, _ in find_sites(model)]
    config: Any = model.config
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = Gates.of(
            config.get_text_config().hidden_size, sites, num_heads=num_heads, head_dim=head_dim, bias=bias, sinks=sinks
        ).to(device)  # fmt: skip
    soft = SoftGates(trained=gates, relaxation=relaxation, counts=counts)

    state, seen = TrainState(Budget.of(budget)), [torch.zeros(()), torch.zeros(())]

    def loss(_: nn.Module, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        text = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        kept = torch.stack([x.mean() for x in soft.counted.values()]).mean()
        seen[:] = [text.detach(), kept.detach()]
        now = 1 - (1 - target) * min(1.0, state.progress / _LOWERING)
        return text + weight * eviction_loss(soft.counted.values(), now, hinge)

    optimizer = torch.optim.AdamW(gates.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    with frozen(model), manyheads.use(model, soft):
        fit(
            gates, get_batch, loss, budget=state, optimizers=[optimizer], bf16=False, checkpoint=checkpoint,
            schedule=decay("cosine", warmup=0.1, floor=0.1),
            on_step=None if on_step is None else lambda now: on_step(now, float(seen[0]), float(seen[1])),
        )  # fmt: skip
    gates.about = {
        "model": type(model).__name__, "target": target, "steps": state.step, "weight": weight,
        "relaxation": relaxation, "counts": counts, "text_loss": float(seen[0]), "kept": float(seen[1]),
    }  # fmt: skip
    gates.threshold = calibrate(model, gates, torch.cat([get_batch(-i) for i in range(1, 5)]), target)
    return gates.requires_grad_(False)


@torch.no_grad()
def calibrate(model: nn.Module, gates: Gates, ids: Tensor, target: float, rounds: int = 4) -> float:
    """The threshold at which the gates keep ``target`` of the tokens of ``ids [B, T]`` over all layers and heads.

    What is dropped changes what later gates read, so it is found in rounds, each under the threshold before.
    """
    found = gates.threshold
    for _ in range(rounds):
        soft = SoftGates(trained=gates, threshold=found)
        with manyheads.use(model, soft):
            model(input_ids=ids, use_cache=False)
        p = torch.cat([x.flatten() for x in soft.probabilities.values()])
        place = round((1 - target) * len(p))
        found = 0.0 if place < 1 else float(p.kthvalue(place).values)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.attention_gate", description="Train attention gates.")
    add_options(parser, of="gates", lr=1e-2)
    parser.add_argument("--target", type=float, default=0.3, help="part of the tokens that is kept")
    args = parser.parse_args(arguments)
    if (args.out / "gates.json").exists():
        parser.error(f"{args.out} holds gates; name a new folder")
    return run_training(
        args,
        lambda model, get_batch, line, checkpoint: train_gates(
            model, get_batch, target=args.target, budget=args.budget, lr=args.lr, seed=args.seed, checkpoint=checkpoint,
            on_step=lambda state, text, kept: line(state, f"loss of text {text:.3f}, {kept:.0%} kept"),
        ),
        lambda gates: f"keeps {args.target:.0%} at {gates.threshold:.3f}; use it as attention_gate:gates={args.out}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
