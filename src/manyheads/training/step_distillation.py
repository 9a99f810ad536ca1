# SPDX-License-Identifier: Apache-2.0
"""Few-step distillation of a flow model by matching distributions along its trajectory (TDM), without data.

A student of K steps is trained so that what it makes at each step is distributed as the teacher's samples are. The
difference of two denoisers says which way to go: the frozen teacher with guidance (``real``), and a model of what the
student makes at present (``fake``), which is trained beside it.

    student  x0 <- x0 + (x0_real - x0_fake), both predicted from the student's sample with noise on it
    fake     velocity of the student's samples with noise on them

Yihong Luo et al., Learning Few-Step Diffusion Models by Trajectory Distribution Matching (arXiv 2503.06674), as
Video-BLADE uses it with sparse attention in the student. Which attention a model has is the caller's: models are given
as functions.

Legend: s noise level from 1 (noise) to 0; x = (1 - s) x0 + s eps; v = eps - x0. Latents ``[B, ...]``, levels ``[B]``.

Choices where the paper's text was not at hand: of the K intervals one is drawn for a batch; the noise put on the
student's sample is of a level drawn uniformly in that interval; of a batch whose fake loss is above ``most``, nothing
is learned by the fake model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

__all__ = ["Distillation", "pseudo_huber", "renoised", "rollout", "to_level"]

Velocity = Callable[[Tensor, Tensor, Any], Tensor]  # latents, levels [B], condition -> v


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What is trained on what.

    Attributes:
        student: few steps, no guidance; it is called with gradients.
        fake: what the student makes; likewise.
        real: the frozen teacher, guidance included.
        levels: K + 1 noise levels from 1 to 0.
        eta: share of the student's own noise in what is put back on its prediction; 1 for no new noise.
        regular: weight of the distance of the fake velocity to the real one (0.5 for CogVideoX, 0 for Wan).
        most: fake losses above it are skipped.
    """

    student: Velocity
    fake: Velocity
    real: Velocity
    levels: Sequence[float]
    eta: float = 0.9
    regular: float = 0.0
    most: float = 2.0

    def losses(self, noise: Tensor, condition: Any, source: Generator) -> Iterator[Tensor]:
        """The student's loss, then the fake model's: scalars, to be carried backward one after the other.

        Args:
            noise: ``[B, ...]`` to start from.
            condition: given to all models.
            source: on the CPU.
        """
        step = int(torch.randint(len(self.levels) - 1, (1,), generator=source))
        with torch.no_grad():
            start = rollout(self.student, noise, self.levels[: step + 1], condition, self.eta, source)
        high, low = self.levels[step], self.levels[step + 1]
        at = _levels(high, start)
        v = self.student(start, at, condition)
        x0, eps = _parts(start, v, at)
        after = renoised(x0, eps, low, self.eta, source)
        level = _levels(0.0, start) + low + (high - low) * torch.rand(len(start), generator=source).to(start)
        noisy = to_level(after, low, level, source)
        with torch.no_grad():
            real, _ = _parts(noisy, self.real(noisy, level, condition), level)
            fake, _ = _parts(noisy, self.fake(noisy, level, condition), level)
            target = x0 + real - fake
        yield pseudo_huber(x0, target)
        clean = x0.detach()
        level = torch.rand(len(clean), generator=source).to(clean)
        drawn = _noise(clean, source)
        spread = _spread(level, clean)
        mixed = (1 - spread) * clean + spread * drawn
        v = self.fake(mixed, level, condition)
        loss = (v - (drawn - clean)).square().mean()
        if self.regular:
            with torch.no_grad():
                real = self.real(mixed, level, condition)
            loss = loss + self.regular * (v - real).square().mean()
        yield torch.where(loss.detach() > self.most, 0.0, 1.0) * loss


@torch.no_grad()
def rollout(
    model: Velocity, noise: Tensor, levels: Sequence[float], condition: Any, eta: float, source: Generator
) -> Tensor:
    """Latents at the last of ``levels``, from noise at the first; with ``eta`` 1 the Euler method, nothing drawn."""
    x = noise
    for high, low in pairwise(levels):
        at = _levels(high, x)
        x0, eps = _parts(x, model(x, at, condition), at)
        x = renoised(x0, eps, low, eta, source)
    return x


def renoised(x0: Tensor, eps: Tensor, level: float, eta: float, source: Generator) -> Tensor:
    """``x0`` at a noise level, with ``eta eps + sqrt(1 - eta^2) xi`` for its noise."""
    if eta < 1:
        eps = eta * eps + (1 - eta**2) ** 0.5 * _noise(eps, source)
    return (1 - level) * x0 + level * eps


def to_level(x: Tensor, level: float, later: Tensor, source: Generator) -> Tensor:
    """Latents of one noise level at a noisier one of each row, ``later [B]``, by new noise."""
    later = _spread(later, x)
    factor = (1 - later) / max(1 - level, 1e-6)
    return factor * x + (later.square() - (factor * level).square()).clamp(min=0).sqrt() * _noise(x, source)


def pseudo_huber(x: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Mean over rows of ``sqrt(|x - target|^2 + c^2 n) - c sqrt(n)`` for rows of n numbers."""
    size = x[0].numel()
    scale = c * size**0.5
    apart = (x - target).flatten(1).square().sum(1)
    loss: Tensor = ((apart + scale**2).sqrt() - scale).mean()
    return loss


def _parts(x: Tensor, v: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Image and noise that a velocity says ``x`` is made of."""
    level = _spread(level, x)
    return x - level * v, x + (1 - level) * v


def _levels(level: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), level, dtype=like.dtype, device=like.device)


def _spread(level: Tensor, like: Tensor) -> Tensor:
    return level.view(-1, *[1] * (like.ndim - 1))


def _noise(like: Tensor, source: Generator) -> Tensor:
    return torch.randn(like.shape, generator=source).to(like)
