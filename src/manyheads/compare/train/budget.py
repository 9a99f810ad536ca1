# SPDX-License-Identifier: Apache-2.0
"""Sizes of models and runs, and how the tokens of an arm are shared out."""

from dataclasses import dataclass

from ...errors import UserError
from ...models.decoder import DecoderConfig
from .data import VOCAB

__all__ = ["CPU", "CUDA", "QUICK", "Shares", "Size"]

# Of the budget of an arm; the rest is for associative recall. A tuning run has nearly half the length of a judged one:
# much shorter ones choose rates that are too large.
_TUNE, _TEXT = 0.25, 0.55
_FEWEST = 4  # steps of any training


@dataclass(frozen=True)
class Size:
    """Models and tasks of a run.

    Attributes:
        dim, layers, heads: of every model.
        length: bytes of a training sequence.
        tokens: of a training step, in sequences of ``length``.
        budget: tokens that each arm is trained on in all, tuning and associative recall included.
        rates: learning rates that every arm tries.
        seeds: trainings on text per arm.
        samples: held-out windows.
        reach: multiples of ``length`` that the held-out windows are long.
        lengths: tokens at which the state is weighed and decoding timed.
        pairs, recall_length, recall_vocab, recall_batch: of the associative recall.
    """

    dim: int = 96
    layers: int = 4
    heads: int = 4
    length: int = 256
    tokens: int = 512
    budget: int = 600_000
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int = 3
    samples: int = 32
    reach: int = 8
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    pairs: int = 4
    recall_length: int = 24
    recall_vocab: int = 18
    recall_batch: int = 8

    @property
    def text(self) -> DecoderConfig:
        return DecoderConfig(VOCAB, self.dim, self.layers, self.heads, length=self.length)

    @property
    def recall(self) -> DecoderConfig:
        return DecoderConfig(self.recall_vocab, self.dim, self.layers, self.heads, length=self.recall_length)

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)

    @property
    def speed_lengths(self) -> list[int]:
        """Lengths at which training is timed, ``tokens`` at a time: of ``lengths`` those of two steps or less."""
        return [self.length, *(n for n in self.lengths if self.length < n <= 2 * self.tokens)]

    @property
    def step(self) -> int:
        """Tokens of a step on text."""
        return self.batch * self.length


CPU = Size()
QUICK = Size(
    dim=64, length=128, budget=100_000, seeds=2, samples=24, lengths=(128, 1024, 4096), rates=(3e-3, 1e-2), reach=4
)
CUDA = Size(
    dim=512, layers=8, heads=8, length=1024, tokens=8192, budget=16_000_000, rates=(3e-4, 1e-3, 3e-3), samples=48,
    lengths=(1024, 4096, 16384, 65536), pairs=16, recall_length=128, recall_vocab=128, recall_batch=32,
)  # fmt: skip


@dataclass(frozen=True)
class Shares:
    """Steps of each training of an arm: one tuning run per rate, one run per seed, one on associative recall."""

    tune: int
    text: int
    recall: int

    @classmethod
    def of(cls, size: Size) -> "Shares":
        """Share out ``size.budget``; UserError when it is too small for any training."""
        shares = cls(
            int(_TUNE * size.budget / len(size.rates) / size.step),
            int(_TEXT * size.budget / size.seeds / size.step),
            int((1 - _TUNE - _TEXT) * size.budget / (size.recall_batch * size.recall_length)),
        )
        if min(shares.tune, shares.text, shares.recall) < _FEWEST:
            least = _FEWEST * size.step * max(len(size.rates) / _TUNE, size.seeds / _TEXT)
            raise UserError(f"a budget of {size.budget:,} tokens is too small; give --budget {least:.0f} or more")
        return shares
