# SPDX-License-Identifier: Apache-2.0
"""Activations computed again on the way back, but for the results of operations that are marked.

    def block(keep, hidden):
        normed = norm(hidden)                  # computed again
        q, k, v = project(normed)              # computed again
        out = keep(attention, q, k, v)         # not run again: its results stay, and whatever else it saved of its own
        return keep(torch.add, hidden, mix(out))

    hidden = rematerialise(block, hidden, parameters=tuple(module.parameters()))

An operation that is kept runs once. What it saved of its arguments is looked up, on the way back, in the arguments that
were computed again, so only its results and its own intermediates are held. Gradients are those of the same operations
in the same order: equal bit for bit where the operations are deterministic. Collectives inside run again too, in every
process in the same order. What is held lies in ``save_for_backward``: hooks of ``saved_tensors_hooks`` see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

__all__ = ["Keep", "rematerialise", "saved_bytes"]

Keep = Callable[..., Any]  # keep(operation, *tensors) -> what operation(*tensors) gives: a tensor, or a tuple of them


class _Kept:
    """An operation that ran once: the graph behind its results, which stand in ``values``.

    While it waits for the way back its tensors are with autograd, and ``values`` is empty.
    """

    def __init__(self, operation: Callable[..., Any], args: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.values: list[Tensor] = []
        self.parameters = parameters
        self._of = {x.untyped_storage().data_ptr(): n for n, x in enumerate(args)}
        self._stay = {x.untyped_storage().data_ptr() for x in parameters}
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            root = torch.zeros((), requires_grad=True)
            sources = [_Source.apply(root, x) if x.is_floating_point() else x for x in args]  # type: ignore[no-untyped-call]
            found = operation(*sources)
        self.single = isinstance(found, Tensor)
        results = (found,) if self.single else tuple(found)
        self.edges = [get_gradient_edge(x) if x.requires_grad else None for x in results]
        self.results = len(results)
        self.values = [x.detach() for x in results] + self.values
        self.inputs = [get_gradient_edge(x) if x.requires_grad else None for x in sources]
        self.args: Sequence[Tensor] = ()

    def _pack(self, x: Tensor) -> Any:
        place = x.untyped_storage().data_ptr()
        if place in self._stay:
            return x
        if place in self._of:
            return self._of[place], x.shape, x.stride(), x.storage_offset()
        self.values.append(x.detach())
        return len(self.values) - 1

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, int):
            return self.values[self.results + packed]
        number, *geometry = packed
        found: Tensor = self.args[number].detach().as_strided(*geometry)
        return found

    def back(self, args: Sequence[Tensor], douts: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the arguments, then of the parameters."""
        self.args = args
        ends = [(edge, dout) for edge, dout in zip(self.edges, douts, strict=True) if edge and dout is not None]
        asked = [edge for edge in self.inputs if edge is not None]
        wanted: list[Any] = [*asked, *self.parameters]
        found: Any = iter([None] * len(wanted))
        if ends:
            edges, given = zip(*ends, strict=True)
            found = iter(torch.autograd.grad(edges, wanted, given, allow_unused=True))
        gradients = [None if edge is None else next(found) for edge in self.inputs] + list(found)
        self.args, self.values = (), []
        return gradients


class _Source(Function):
    """The beginning of a graph, which does not hold the tensor that it begins with, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None]:
        return None, None  # gradients are taken before they come here


class _Replay(Function):
    """Stands for a kept operation where a block is computed again."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.kept, ctx.args = kept, given[:count]
        return tuple(x.detach() for x in kept.values[: kept.results])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.kept.back(ctx.args, douts))


class _Rematerialised(Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *given: Tensor) -> Tensor:
        ctx.function, ctx.kept, parameters = function, [], given[count:]

        def keep(operation: Callable[..., Any], *args: Tensor) -> Any:
            one = _Kept(operation, args, parameters)
            ctx.kept.append(one)
            return one.values[0] if one.single else tuple(one.values[: one.results])

        out = function(keep, *given[:count])
        ctx.count, ctx.counts = count, [len(one.values) for one in ctx.kept]
        ctx.save_for_backward(*given, *(x for one in ctx.kept for x in one.values))
        for one in ctx.kept:
            one.values = []
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        given = saved[: len(saved) - sum(ctx.counts)]
        values = iter(saved[len(given) :])
        for one, count in zip(ctx.kept, ctx.counts, strict=True):
            one.values = [next(values) for _ in range(count)]
        inputs, parameters = given[: ctx.count], given[ctx.count :]
        waiting = iter(ctx.kept)

        def keep(_: Callable[..., Any], *args: Tensor) -> Any:
            one = next(waiting)
            found = _Replay.apply(one, len(args), *args, *parameters)  # type: ignore[no-untyped-call]
            return found[0] if one.single else found

        leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad():
            out = ctx.function(keep, *leaves)
        asked = [x for x in (*leaves, *parameters) if x.requires_grad]
        found = iter(torch.autograd.grad(out, asked, dout, allow_unused=True))
        return None, None, *(next(found) if x.requires_grad else None for x in (*leaves, *parameters))


def rematerialise(function: Callable[..., Tensor], *inputs: Tensor, parameters: Sequence[Tensor] = ()) -> Tensor:
    """What ``function(keep, *inputs)`` gives, holding the inputs and what operations marked by ``keep`` gave.

    Args:
        function: gives one tensor; run again on the way back, so nothing in it may be drawn at random.
        inputs: tensors; those of floating point get gradients.
        parameters: all tensors that ``function`` uses beside its inputs and that want gradients; they are held as they
            are and not counted as activations.
    """
    if not torch.is_grad_enabled():
        return function(lambda operation, *args: operation(*args), *inputs)
    found: Tensor = _Rematerialised.apply(function, len(inputs), *inputs, *parameters)  # type: ignore[no-untyped-call]
    return found


def saved_bytes(function: Callable[[], Any], apart: Sequence[Tensor] = ()) -> tuple[int, int]:
    """Bytes that autograd holds after ``function()`` ran, each storage once: of floating-point numbers, and of others.

    Args:
        function: a forward.
        apart: tensors that are not counted: parameters.
    """
    held: dict[int, tuple[int, bool]] = {}
    without = {x.untyped_storage().data_ptr() for x in apart}
    alive = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in without:
            held[storage.data_ptr()] = storage.nbytes(), x.is_floating_point()
            alive.append(x.detach())  # so that no storage takes the place of another
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        alive.append(function())
    return sum(size for size, real in held.values() if real), sum(size for size, real in held.values() if not real)
