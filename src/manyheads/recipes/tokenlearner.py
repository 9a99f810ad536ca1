# SPDX-License-Identifier: Apache-2.0
"""A small ViT and the weights of ``tokenlearner``, trained together from scratch on photographs of ten classes.

    python -m manyheads.recipes.tokenlearner --out FOLDER [--strategy tokenlearner:tokens=8] [--budget 5m]

Both go into the folder: the model as any of transformers, and the weights for ``tokenlearner:weights=FOLDER``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import manyheads
from manyheads.data.photograph_classes import CLASSES, photographs
from manyheads.errors import UserError
from manyheads.integrations import use
from manyheads.reducing import LearnedReducer, Reducer
from manyheads.tokens.tokenlearner import LearnedTokens
from manyheads.training import Budget, TrainState, decay, fit

__all__ = ["drawn", "train_classifier"]


def train_classifier(
    model: Any, get_batch: Callable[[int], tuple[Tensor, Tensor]], strategy: Reducer | None = None, *,
    budget: Budget | str | int, lr: float, on_step: Callable[[TrainState], bool | None] | None = None,
) -> tuple[Reducer | None, TrainState]:  # fmt: skip
    """Train a classifier of images or videos in place, on fewer tokens if there is a strategy.

    Args:
        model: of transformers, on its device, with ``pixel_values`` and ``logits``.
        get_batch: pixels and classes, by the number of the step.
        strategy: in use while it trains; the weights of one that learns are trained along, from fresh ones.
        budget: as in :func:`manyheads.training.fit`.
        lr: highest rate, of AdamW.
        on_step: as in :func:`manyheads.training.fit`.

    Returns:
        The strategy, which has the weights now, and how the training ended.
    """
    trained = nn.ModuleList([model])
    if isinstance(strategy, LearnedReducer):
        weights = strategy.new_weights(model.config.hidden_size, model.config.num_hidden_layers).to(model.device)
        trained.append(weights)
        strategy = strategy.having(weights)

    def loss(_: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(pixel_values=batch[0]).logits.float(), batch[1])

    with use(model, strategy) if strategy is not None else nullcontext():
        state = fit(
            trained, get_batch, loss, budget=budget, schedule=decay("cosine", warmup=0.1, floor=0.02),
            optimizers=[torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=0.05)], on_step=on_step,
        )  # fmt: skip
    return strategy, state


def drawn(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Photographs to learn from, float32 ``[N, 3, 32, 32]`` in -1..1, half of them mirrored, and their classes."""
    images, labels = photographs("train")
    rows = torch.randint(len(images), (count,), generator=generator)
    mirrored = (torch.rand(count, generator=generator) < 0.5)[:, None, None, None]
    found = images[rows].float() / 127.5 - 1
    return torch.where(mirrored, found.flip(-1), found), labels[rows]


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.tokenlearner", description="Train learned tokens.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and the weights")
    parser.add_argument("--strategy", default="tokenlearner", help="its spec, as tokenlearner:tokens=16,fuse=true")
    parser.add_argument("--budget", default="5m", help="as 5m, 90s or '2000 steps'")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    strategy = manyheads.parse(given.strategy)
    if not isinstance(strategy, LearnedReducer):
        raise UserError(f"{strategy.spec} has no weights to train; give tokenlearner")
    torch.manual_seed(given.seed)
    shape: dict[str, Any] = {"num_labels": len(CLASSES)}
    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=given.dim, num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.dim // 32), intermediate_size=4 * given.dim, **shape,
    )  # fmt: skip
    model: Any = transformers.ViTForImageClassification(config)
    model.to(given.device)
    generator = Generator().manual_seed(given.seed)

    def get_batch(_: int) -> tuple[Tensor, Tensor]:
        images, labels = drawn(given.batch, generator)
        return images.to(given.device), labels.to(given.device)

    reducer, state = train_classifier(model, get_batch, strategy, budget=given.budget, lr=given.lr)
    model.save_pretrained(given.out)
    weights: LearnedTokens = reducer.trained  # type: ignore[union-attr]
    weights.save(given.out)
    tail = state.losses[-50:]
    print(f"{state.step} steps, loss {sum(tail) / len(tail):.3f}; use it as tokenlearner:weights={given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
