# SPDX-License-Identifier: Apache-2.0
"""Adapters for ``graph_gin_attention.adapter``, or LoRA of as many parameters, trained on a frozen model.

    python -m manyheads.recipes.graph_gin_attention --model MODEL --out FOLDER [--kind intended] [--width 155]

The loss is that of the next token. ``--kind`` is the graph of Sparse-GIN (``intended``, as the paper says;
``released``, as its code does; ``random``, a control), ``bottleneck`` for the same network without a graph, or
``lora``. The same command goes on with a training that was cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import manyheads
from manyheads.attention import reference
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.mixers.graph_gin_attention import Adapter, Adapters, Lora, LoraLayers
from manyheads.mixers.graph_gin_attention.adapter import Graph
from manyheads.recipes._adapters import add_options, frozen, run_training
from manyheads.training import Budget, Checkpoint, TrainState, decay, fit

__all__ = ["Kind", "new_adapters", "train_adapters"]

Kind = Literal["intended", "released", "bottleneck", "random", "lora"]
OnStep = Callable[[TrainState], bool | None]


def new_adapters(
    model: nn.Module, kind: Kind = "intended", *, width: int = 155, dropout: float = 0.1, last_scale: float = 0.5,
    seed: int = 0,
) -> Adapters | LoraLayers:  # fmt: skip
    """Untrained adapters of ``model``, on its device; LoRA on all linear layers of its blocks, about as many numbers.

    Args:
        model: a decoder of transformers.
        kind: what they are.
        width, dropout, last_scale: of Sparse-GIN: channels, in training, and lambda of the last layer at first.
        seed: of the first weights.

    Raises:
        UserError: another kind, or a model without layers for it.
    """
    if kind not in get_args(Kind):
        raise UserError(f"kind is {', '.join(get_args(Kind))}, not {kind!r}")
    config: Any = model.config
    sites = [site for site, _ in find_sites(model)]
    graph: Graph = "bottleneck" if kind == "lora" else kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Adapters | LoraLayers = Adapters.of(
            config.get_text_config().hidden_size, sites, width=width, graph=graph, dropout=dropout,
            last_scale=last_scale,
        )  # fmt: skip
        if kind == "lora":
            names = [site.name.rpartition(".")[0] + "." for site in sites if site.causal]
            layers = {
                name: (module.weight.shape[0], module.weight.shape[1])
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and name.startswith(tuple(names))
            }
            if not layers:
                raise UserError(f"{type(model).__name__} has no linear layers in its blocks that LoRA could act on")
            wanted, each = sum(p.numel() for p in made.parameters()), sum(n + k for n, k in layers.values())
            made = LoraLayers(layers, max(1, round(wanted / each)))
    return made.to(next(model.parameters()).device)


def train_adapters(
    model: nn.Module, get_batch: Callable[[int], Tensor], *, kind: Kind = "intended", width: int = 155,
    dropout: float = 0.1, last_scale: float = 0.5, budget: Budget | str | int = "5m", lr: float = 1e-3,
    replayed: bool = False, seed: int = 0, checkpoint: Checkpoint | None = None, on_step: OnStep | None = None,
) -> Adapters | LoraLayers:  # fmt: skip
    """Adapters of ``model``, which stays as it is, trained on the next token.

    Args:
        model: a decoder of transformers, on its device.
        get_batch: ids ``[B, T + 1]`` by the number of the step.
        kind, width, dropout, last_scale, seed: see :func:`new_adapters`.
        budget: as in :func:`manyheads.training.fit`.
        lr: highest learning rate, of AdamW.
        replayed: record a step as a CUDA graph.
        checkpoint: where checkpoints go; training goes on from one.
        on_step: told the state after each step; True ends it.
    """
    made = new_adapters(model, kind, width=width, dropout=dropout, last_scale=last_scale, seed=seed)
    strategy = Lora(live=made) if isinstance(made, LoraLayers) else Adapter(live=made)

    def loss(_: nn.Module, ids: Tensor) -> Tensor:
        length = ids.shape[1] - 1
        # With a mask of its own the model does not wait for the device to ask whether texts are packed.
        mask = reference.causal_mask(length, length, ids.device)[None, None]
        logits = model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=False).logits.float()
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    optimizer = torch.optim.AdamW(made.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    state = TrainState(Budget.of(budget))
    with frozen(model), manyheads.use(model, strategy):
        fit(
            made, get_batch, loss, budget=state, optimizers=[optimizer], checkpoint=checkpoint, replayed=replayed,
            schedule=decay("cosine", warmup=0.1, floor=0.1), on_step=on_step,
        )  # fmt: skip
    made.about = {
        "model": type(model).__name__, "kind": kind, "steps": state.step, "loss": state.losses[-1],
        "parameters": sum(p.numel() for p in made.parameters()),
    }  # fmt: skip
    return made.requires_grad_(False)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.graph_gin_attention", description="Train Sparse-GIN, or what it is held against."
    )
    add_options(parser, of="adapters", lr=1e-3)
    parser.add_argument("--kind", choices=get_args(Kind), default="intended", help="of the adapters")
    parser.add_argument("--width", type=int, default=155, help="channels of an adapter; LoRA's rank follows from it")
    parser.add_argument("--dropout", type=float, default=0.1, help="in the adapters, while they are trained")
    args = parser.parse_args(arguments)
    if any((args.out / f"{name}.json").exists() for name in ("adapters", "lora")):
        parser.error(f"{args.out} holds adapters; name a new folder")
    part = "lora:weights" if args.kind == "lora" else "adapter:adapters"
    return run_training(
        args,
        lambda model, get_batch, line, checkpoint: train_adapters(
            model, get_batch, kind=args.kind, width=args.width, dropout=args.dropout, budget=args.budget, lr=args.lr,
            seed=args.seed, checkpoint=checkpoint,
            on_step=lambda state: line(state, f"loss {float(state.loss):.3f}") if state.step % 10 < 2 else None,
        ),
        lambda made: f"{made.about['parameters']:,} parameters; use it as graph_gin_attention.{part}={args.out}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
