# SPDX-License-Identifier: Apache-2.0
"""Training steps of one shape as one CUDA graph: a small model waits for its launches, and a replay has one launch.

The first steps run as they are, on a stream of their own, so that kernels are compiled and the optimisers have their
state. The next is recorded, and from then on batches are copied to where the recording reads them. Rates live on the
device, for a recording holds no Python number. A batch of another shape runs as it is.
What a step decides in Python, a number that it draws there for instance, is decided once for all that are replayed.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Replayed"]

BatchT = TypeVar("BatchT")
_FIRST = 3  # steps before the recording: PyTorch asks for a few, and Triton compiles in them


class Replayed(Generic[BatchT]):
    """A training step on batches whose leaves are tensors on one GPU.

    Where the step cannot be recorded, because it waits for the GPU in between, it goes on as it is, with a warning.

    Args:
        step: forward, backward, clipping and optimisers; its loss, detached, a scalar on the device. It frees the
            gradients of the step before at its beginning.
        optimizers: whose rates and counts are moved to the device.
        device: a CUDA device.
    """

    def __init__(
        self, step: Callable[[BatchT], Tensor], optimizers: Sequence[torch.optim.Optimizer], device: torch.device
    ) -> None:  # fmt: skip
        self._step, self._stream = step, torch.cuda.Stream(device)
        self._done, self._shapes, self._recorded = 0, None, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[Tensor] = []
        self._loss = torch.zeros((), device=device)
        for group in (group for each in optimizers for group in each.param_groups):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            if "capturable" in group:
                group["capturable"] = True

    def __call__(self, batch: BatchT) -> Tensor:
        """Take a step on ``batch``; its loss."""
        leaves, form = pytree.tree_flatten(batch)
        shapes: Any = (form, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves])
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if self._shapes is None:
            self._shapes = shapes
        if shapes != self._shapes or self._done < _FIRST or (self._recorded and self._graph is None):
            self._done += shapes == self._shapes
            return self._plain(batch)
        if not self._recorded:
            self._record(batch, leaves, form)
            if self._graph is None:
                return self._plain(batch)
        for held, new in zip(self._batch, tensors, strict=True):
            held.copy_(new)
        assert self._graph is not None
        self._graph.replay()
        return self._loss.clone()

    def _plain(self, batch: BatchT) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, batch: BatchT, leaves: list[Any], form: Any) -> None:
        self._recorded = True
        self._batch = [x.clone() for x in leaves if isinstance(x, Tensor)]
        own = iter(self._batch)
        held = pytree.tree_unflatten([next(own) if isinstance(x, Tensor) else x for x in leaves], form)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._loss = self._step(held)
        except RuntimeError as error:
            torch.cuda.synchronize()
            warnings.warn(
                f"training steps are not replayed, which costs time: {str(error).splitlines()[0]}", stacklevel=3
            )
            return
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graph = graph
