# SPDX-License-Identifier: Apache-2.0
"""Which run of a denoiser it is, and the how many-th evaluation in it: counted, each from where it begins.

A *run* begins where the pipeline is called, and where the scheduler is given timesteps. In a loop of the user's own,
outside of a call, it also begins at the next pass over the same timesteps, in whichever direction: where a timestep
comes back that the loop had left, or the very same call is made again. A scheduler with a single timestep begins one at
each evaluation.

An *evaluation* is one prediction for the same latents at the same timestep, in one call of the denoiser or in several:
its conditional and unconditional parts, and what a guidance adds, each once. Solvers of second order make two for a
timestep.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepCounter"]

_LARGEST = 32  # times the latents: what is larger is no condition (residuals of a ControlNet), and is not held


class StepCounter:
    """Counts runs and evaluations from what denoisers are called with.

    Attributes:
        run: number of the run, 0 before the first.
        index: of the evaluation in it, from 0.
        start: place of its first timestep among the scheduler's, 0 where it is not among them.
        run_state: scratch of the run.
    """

    def __init__(self) -> None:
        self.run, self.index, self.start = 0, -1, 0
        self.run_state: dict[str, Any] = {}
        self._began = True
        self._marker: Any = None
        self._timestep: float | None = None
        self._step: int | None = None
        self._latents: Tensor | None = None
        self._evaluated: dict[float, int] = {}
        self._parts: list[tuple[Hashable, Sequence[Tensor]]] = []

    def forget(self) -> None:
        """Hold no tensors any more."""
        self._latents, self._parts, self._began = None, [], True

    def begin(self) -> None:
        """Begin a run with the next evaluation."""
        self._began = True

    def see(
        self, timestep: float, given: Sequence[Tensor], key: Hashable, scheduler: Any, marker: Any, inside: bool
    ) -> int:  # fmt: skip
        """Count a call of a denoiser.

        Args:
            timestep: as the scheduler counts.
            given: all tensors that the denoiser was given, latents ``[B, ...]`` first.
            key: of the denoiser and the branches of its rows.
            scheduler: of the pipeline, None where there is none.
            marker: another object for every run, where something says so.
            inside: whether the pipeline's call is running.

        Returns:
            How many calls of this ``key`` the evaluation had before.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        timesteps = timesteps if isinstance(timesteps, Tensor) and timesteps.numel() else None
        told = (timesteps, marker)
        renewed = self._marker is None or any(a is not b for a, b in zip(told, self._marker, strict=True))
        step, before = getattr(scheduler, "step_index", None), self._step
        stepped = step is not None and before is not None and step != before
        again, size = False, _LARGEST * given[0].numel() if given else 0
        conditions = [x for x in given[1:] if x.numel() <= size]
        if timestep == self._timestep and not (renewed or self._began or stepped) and self._same_latents(given):
            again = any(key == other and _same(conditions, made) for other, made in self._parts)
            if not again:
                self._parts.append((key, conditions))
                return sum(key == other for other, _ in self._parts) - 1
        if self._began or renewed or (not inside and (again or self._comes_back(timestep, timesteps))):
            self._begin_run(timestep, scheduler, timesteps)
            self._marker = told
        self._evaluated[timestep] = self._evaluated.get(timestep, 0) + 1
        self.index += 1
        self._timestep, self._step, self._parts = timestep, step, [(key, conditions)]
        self._latents = given[0].detach().clone() if given else None
        return 0

    def total(self, pipe: Any, scheduler: Any, inside: bool) -> int | None:
        """Evaluations of the run in all, None where no scheduler is known.

        As many as the pipeline says; else as the scheduler has timesteps from the first of this run.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not timesteps.numel():
            return None
        told = getattr(pipe, "_num_timesteps", None) if inside else None
        if isinstance(told, int) and told > self.index:
            return told
        return max(timesteps.numel() - self.start, self.index + 1)

    def _same_latents(self, given: Sequence[Tensor]) -> bool:
        """Whether a call has the latents of the evaluation at hand, or their first rows."""
        if not given or self._latents is None or given[0].shape[1:] != self._latents.shape[1:]:
            return False
        rows = min(len(given[0]), len(self._latents))
        return torch.equal(given[0][:rows], self._latents[:rows].to(given[0].device, given[0].dtype))

    def _comes_back(self, timestep: float, timesteps: Tensor | None) -> bool:
        """Whether a timestep was evaluated before, left, and is not listed to come again."""
        if timesteps is not None and timesteps.numel() == 1:
            return True
        if timestep == self._timestep or timestep not in self._evaluated:
            return False
        listed = 1 if timesteps is None else int(_alike(timesteps, timestep).sum())
        return self._evaluated[timestep] >= listed

    def _begin_run(self, timestep: float, scheduler: Any, timesteps: Tensor | None) -> None:
        self.run, self.index, self.run_state, self._evaluated, self._began = self.run + 1, -1, {}, {}, False
        self.start = 0
        if timesteps is not None and (places := _alike(timesteps, timestep).nonzero().flatten().tolist()):
            begin: Any = getattr(scheduler, "begin_index", None)  # of two places of a timestep, the one it begins at
            self.start = int(begin) if begin in places else places[0]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )


def _alike(timesteps: Tensor, timestep: float) -> Tensor:
    """Where among the scheduler's timesteps one is, up to the rounding of what a denoiser was given."""
    return (timesteps.double().flatten().cpu() - timestep).abs() <= 1e-4 * max(1.0, abs(timestep))
