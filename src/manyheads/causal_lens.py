# SPDX-License-Identifier: Apache-2.0
"""Kinds of lenses that intervene: they run prompts of their own, with something changed, and score what follows."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .lens import LensResult

__all__ = ["CausalLens", "ComparativeLens"]


class CausalLens(Strategy, ABC):
    """Looks at a model by interventions: it runs prompts of its own, changes something, and scores what follows."""

    @abstractmethod
    def locate(self, model: "torch.nn.Module", tokenizer: Any, use: "Callable[..., Any]") -> "LensResult":
        """The scores of a model, which ``use`` (:func:`manyheads.use`) enters; it is left as it was."""


class ComparativeLens(CausalLens):
    """Also says in what a model differs from another checkpoint of it."""

    @abstractmethod
    def compare(self, model: Any, other: Any, tokenizer: Any, use: "Callable[..., Any]") -> "LensResult":
        """What ``model`` has that ``other``, the checkpoint before it, has not; both are left as they were."""
