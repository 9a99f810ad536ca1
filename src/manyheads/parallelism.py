# SPDX-License-Identifier: Apache-2.0
"""The kind of strategy that shares one sequence among several processes."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .attention.recurrence import DecayState
    from .call import AttentionCall
    from .parallel import AttnMask, Layout, World

__all__ = [
    "ContextParallelism", "ExpertParallelism", "FrontedAttention", "SharedAttention", "SharedExperts", "SharedStates",
    "StateParallelism",
]  # fmt: skip


class SharedAttention(Protocol):
    """Attention over tokens of which each process has some; :class:`manyheads.parallel.ContextParallel` is one.

    Attributes:
        rows: tokens of this process, int64, by their place in the whole sequence.
        layout: those of every process.
    """

    rows: "Tensor"
    layout: "Layout"

    def shard(self, x: "Tensor", dim: int) -> "Tensor":
        """The tokens of this process, of all along ``dim``."""

    def unshard(self, x: "Tensor", dim: int) -> "Tensor":
        """All tokens, of those of this process along ``dim``; in every process, without gradients."""

    def attend(self, q: "Tensor", k: "Tensor", v: "Tensor", scale: float | None = None) -> "tuple[Tensor, Tensor]":
        """Output ``[B, H, T, dv]`` and log-sum-exp ``[B, H, T]`` of this process's tokens."""


@runtime_checkable
class FrontedAttention(Protocol):
    """Attention over tokens that are shared, in front of which a process reads some for itself.

    Attributes:
        rows, layout, shard, unshard: as of :class:`SharedAttention`.
        front: tokens, by their place in the whole, that this process reads first and alone, at positions from 0 on;
            no cache keeps them.
    """

    rows: "Tensor"
    layout: "Layout"
    front: "Tensor"

    def shard(self, x: "Tensor", dim: int) -> "Tensor":
        """The tokens of this process, of all along ``dim``."""

    def unshard(self, x: "Tensor", dim: int) -> "Tensor":
        """All tokens, of those of this process along ``dim``; in every process, without gradients."""

    def attend_call(self, call: "AttentionCall", front: "tuple[Tensor, Tensor] | None") -> "Tensor":
        """Output ``[B, T, H, dv]`` of a layer's call, given the layer's keys and values of what was read first."""


class ContextParallelism(Strategy, ABC):
    """Says how processes share the tokens of a sequence, and what they exchange so that each token sees what it may.

    ``manyheads.use(model, strategy, mesh=mesh)`` does so in a model: it asks once for the mask that most layers have,
    whose layout all layers then share, and once more for each other mask. One that is itself an ``AttentionCompute``
    also acts without ``mesh``, in one process.
    """

    @abstractmethod
    def share(
        self, world: "World", mask: "AttnMask", layout: "Layout | None" = None
    ) -> SharedAttention | FrontedAttention:
        """Attention of ``mask`` among the processes of ``world``; every process has to ask, in one order.

        Args:
            world: of processes.
            mask: which keys each token sees.
            layout: which process has which tokens, where that is settled; else the strategy's own choice.
        """


class SharedExperts(Protocol):
    """Experts of which each process has some; :class:`manyheads.parallel.ExpertParallel` is one."""

    def mixture(
        self, x: "Tensor", index: "Tensor", weight: "Tensor", gate_up: "Tensor", down: "Tensor",
        gate: "Callable[[Tensor], Tensor]",
    ) -> "Tensor":  # fmt: skip
        """Outputs ``[T, D]`` of this process's tokens, by the experts that they chose, wherever these are.

        Args:
            x: ``[T, D]``.
            index, weight: ``[T, k]``, experts chosen and their weights.
            gate_up, down: ``[E, 2 I, D]`` and ``[E, D, I]`` of all experts, of which a process uses its own.
            gate: gates and values ``[m, 2 I]`` -> ``[m, I]``.
        """


class ExpertParallelism(Strategy, ABC):
    """Says how processes share experts; :func:`manyheads.use` does so in a model whose tokens are shared too."""

    @abstractmethod
    def share_experts(self, world: "World", experts: int, top_k: int, row: int) -> SharedExperts:
        """Experts of a layer among the processes of ``world``.

        Args:
            world: of processes.
            experts: of the layer.
            top_k: that a token chooses.
            row: bytes of a token.
        """


class SharedStates(Protocol):
    """Linear attention over tokens of which each process has some that follow each other, in the order of ranks."""

    def attend(
        self, q: "Tensor", k: "Tensor", v: "Tensor", g: "Tensor | None" = None, *, state: "DecayState | None" = None
    ) -> "tuple[Tensor, DecayState]":
        """Output ``[B, H, T, dv]`` of this process's tokens, and the state after them."""

    def last(self, state: "DecayState") -> "DecayState":
        """The state after all tokens, of that after each process's; in every process, without gradients."""


class StateParallelism(Strategy, ABC):
    """Says how processes share the tokens of a sequence in layers that pass on a state of fixed size.

    In a model that has softmax attention too the strategy is a :class:`ContextParallelism` as well, whose layout gives
    processes tokens that follow each other.
    """

    @abstractmethod
    def share_states(self, world: "World") -> SharedStates:
        """Linear attention among the processes of ``world``; every process has to ask, in one order."""
