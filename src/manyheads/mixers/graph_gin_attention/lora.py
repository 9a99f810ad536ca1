# SPDX-License-Identifier: Apache-2.0
"""LoRA on the linear layers of a frozen decoder: what Sparse-GIN is compared with, at as many parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...calls.low_rank import LowRank
from ...calls.trained import load_trained, save_trained
from ...errors import UserError
from ...strategy import LinearCompute
from .adapter import HOW

__all__ = ["Lora", "LoraLayers"]


class LoraLayers(LowRank):
    """LoRA on some layers of a model, and how it was trained; ``about`` has plain values."""

    def __init__(
        self, layers: Mapping[str, tuple[int, int]], rank: int, alpha: float = 2.0, about: dict[str, Any] | None = None
    ) -> None:
        super().__init__(layers, rank, alpha)
        if rank < 1 or not layers:
            raise UserError("LoRA has a rank of 1 or more, and layers to act on")
        self.about = dict(about or {})

    def save(self, folder: str | Path) -> Path:
        """Write weights and settings into ``folder``, which ``graph_gin_attention.lora:weights=`` takes."""
        config = {"layers": self.layers, "rank": self.lora, "alpha": self.alpha, "about": self.about}
        return save_trained(folder, "lora", self.state_dict(), config)

    @staticmethod
    def load(folder: str | Path) -> LoraLayers:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder does not hold LoRA.
        """

        def make(config: dict[str, Any]) -> LoraLayers:
            return LoraLayers({name: tuple(shape) for name, shape in config.pop("layers").items()}, **config)

        return load_trained(folder, "lora", make, "LoRA", f"{HOW} --kind lora")


@dataclass(frozen=True, kw_only=True)
class Lora(LinearCompute):
    """Computes the linear layers of blocks with trained LoRA.

    Attributes:
        weights: folder of it, as :meth:`LoraLayers.save` wrote it.
        live: it itself, from Python, as in training.
    """

    weights: str = field(default="", metadata={"help": f"folder of trained LoRA; {HOW} --kind lora makes one"})
    live: LoraLayers | None = field(default=None, compare=False, metadata={"help": "LoRA, made from Python only"})

    def __post_init__(self) -> None:
        if not self.weights and self.live is None:
            raise UserError(f"graph_gin_attention.lora needs weights=FOLDER, trained on the model: {HOW} --kind lora")

    @functools.cached_property
    def trained(self) -> LoraLayers:
        """The matrices."""
        return self.live if self.live is not None else LoraLayers.load(self.weights)

    def selects_linear(self, name: str, layer: int | None) -> bool:
        return super().selects_linear(name, layer) and name in self.trained.layers

    def linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Callable[[Tensor], Tensor]:
        return self.trained.compute(weight, bias, name, f"{HOW} --kind lora")
