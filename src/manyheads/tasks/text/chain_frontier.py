# SPDX-License-Identifier: Apache-2.0
"""Loss against entropy of ways to sample from a chain of letters, where every figure is exact.

A chain of letters is counted in each text, and the sums over all its texts of so many letters are exact, those of whole
texts too: there is no draw, no particle and no estimate. The language model of the run is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...data.texts import corpus
from ...decoding.lnd import Chain, GlobalSampling
from ...errors import UserError
from ...experiment import Metric, Row, RunContext, WorkUnit
from ._frontier import METRICS, Curve, FrontierTask, cut_of, swept

__all__ = ["ChainFrontier"]

_LETTERS = " abcdefghijklmnopqrstuvwxyz"
_FEWEST = 20_000  # letters of a text that a chain is counted in


@dataclass(frozen=True, kw_only=True)
class ChainFrontier(FrontierTask):
    """Chains of 27 letters, each counted in a text of its own and smoothed by those of lower order.

    ``distortion`` is the divergence of plain sampling from the law of whole texts, nats per letter. Texts begin where
    the counted one could: the mean is over its states.

    Attributes:
        order: letters that the next one depends on.
        steps: letters of a text.
        samples: chains.
        text: a corpus of :mod:`manyheads.data.texts`.
    """

    metrics: ClassVar[tuple[Metric, ...]] = METRICS

    top_k: tuple[float, ...] = (2, 3, 4, 5, 6, 8, 11, 15, 20)
    top_p: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.98)
    order: int = 2
    steps: int = 16
    samples: int = 12
    text: str = "prose"

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = (
            self.samples * len(run.arms) * len(self.top_k) * self.steps * 27**self.order / 2000
        )  # as tokens of SmolLM2
        return [WorkUnit(self.key, "chains", cost, f"{self.samples} chains of letters")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        chains = self._chains(run)
        free = swept(cut_of(run.baseline)[0], "top_k", 0)
        pure = np.array([self._figures(type(free)(), *chain)["nll"] for chain in chains])
        greedy = np.array([self._figures(type(free)(top_k=1), *chain)["nll"] for chain in chains])
        curves = []
        for arm in run.arms:
            cut, family = cut_of(arm)
            values = getattr(self, family)
            found = [[self._figures(swept(cut, family, value), *chain) for value in values] for chain in chains]
            figures = {name: np.array([[one[name] for one in row] for row in found]) for name in found[0][0]}
            curves.append(Curve(arm, family, isinstance(cut, GlobalSampling), values, figures))
            run.advance(unit.cost / len(run.arms))
        yield from self.compared(curves, pure, greedy)

    def _figures(self, cut: Any, log_p: Tensor, after: Tensor, start: Tensor) -> dict[str, float]:
        chain = Chain(cut.log_weights(log_p), after)
        plain = chain.local.expand(self.steps, -1, -1)
        of_plain = chain.texts(plain, log_p, start)
        share = float((start * chain.log_sums(self.steps)[-1]).sum()) / self.steps
        own = chain.texts(chain.whole(self.steps), log_p, start) if isinstance(cut, GlobalSampling) else of_plain
        return {
            "nll": own.energy, "entropy": own.entropy, "pressure": share, "distortion": share - of_plain.log_mass,
            "mass": float((start * chain.log_w.logsumexp(1).exp()).sum()),
        }  # fmt: skip

    def _chains(self, run: RunContext) -> list[tuple[Tensor, Tensor, Tensor]]:
        given = run.data.get("texts") or corpus(self.text)
        spelt = [spelled(given[int(i)].content) for i in run.rng(chains=self.text).permutation(len(given))]
        long = [letters for letters in spelt if len(letters) >= _FEWEST]
        if len(long) < self.samples:
            raise UserError(f"{self.samples} texts of {_FEWEST} letters are needed, not {len(long)}")
        return [counted(letters, self.order) for letters in long[: self.samples]]


def spelled(text: str) -> Tensor:
    """A text as letters, int64 ``[N]`` below 27: small letters of English, and one for every run of anything else."""
    places = torch.tensor([max(0, _LETTERS.find(letter)) for letter in text.lower()], dtype=torch.long)
    again = torch.zeros_like(places, dtype=torch.bool)
    again[1:] = (places[1:] == 0) & (places[:-1] == 0)
    return places[~again]


def counted(letters: Tensor, order: int, strength: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """A chain counted in ``letters [N]``: log-probabilities ``[S, V]``, states that follow ``[S, V]``, shares ``[S]``.

    A state is the last ``order`` letters. Each order's counts are smoothed by ``strength`` letters of the one below.
    """
    size = len(_LETTERS)
    p = torch.full((1, size), 1 / size, dtype=torch.float64)
    for length in range(order + 1):
        code = sum(letters[i : len(letters) - length + i] * size ** (length - 1 - i) for i in range(length))
        states = torch.as_tensor(code).expand(len(letters) - length)
        seen = torch.bincount(states * size + letters[length:], minlength=size ** (length + 1)).double()
        counts = seen.view(size**length, size)
        below = p.repeat(len(counts) // len(p), 1)
        p = (counts + strength * below) / (counts.sum(1, keepdim=True) + strength)
    after = (torch.arange(len(p))[:, None] * size + torch.arange(size)) % len(p)
    return p.log(), after, counts.sum(1) / counts.sum()
