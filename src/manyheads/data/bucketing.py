# SPDX-License-Identifier: Apache-2.0
"""Batches by length in two dimensions: what is sorted by inputs and by outputs is padded little.

A batch is as wide as its longest recording and as its longest transcript; what is shorter is padded. Buckets are of
recordings of equal total duration, parted by tokens into some of equal totals; a batch is drawn from one bucket, and
every bucket has the batch size that its own longest recording and transcript leave room for:

- :func:`buckets`: upper bounds ``(duration, tokens)``. A transcript with far more tokens a second than others of its
  durations (z-score above 4) is an outlier; it widens no bucket.
- :func:`assign`: ``strict`` takes the first duration that fits and the least tokens within it, or refuses; ``lenient``
  takes the first bucket in which both fit, which may be one of longer recordings.
- :func:`largest_batch`: doubles or halves a batch until it does not or does fit, then bisects to within 5 %.
- :class:`BucketSampler`: one epoch of batches; processes agree on the bucket of every step and share out its members.
- :func:`padding`: the share of what is computed that is padding, of inputs and of outputs.

As in NeMo and lhotse, but that NeMo leaves the last example of the last bucket out of its bounds, and parts buckets of
one bound that were merged into more by tokens; here they are merged alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ..errors import UserError

__all__ = ["Bucket", "BucketSampler", "Padding", "assign", "buckets", "largest_batch", "padding"]

_OUTLIER = 4.0  # standard deviations of tokens a second
_CLOSE = 0.05  # share by which the largest batch may be missed


@dataclass(frozen=True, order=True)
class Bucket:
    """What fits: recordings of at most ``duration`` s with transcripts of at most ``tokens``."""

    duration: float
    tokens: float


@dataclass(frozen=True)
class Padding:
    """Shares of inputs and of outputs that are padding, and batches with their mean size."""

    inputs: float
    outputs: float
    batches: int
    size: float


def _equal(values: Sequence[float], count: int) -> list[float]:
    """Upper bounds of at most ``count`` groups of sorted values whose sums are about equal; the last is the largest."""
    order = np.sort(np.asarray(values, dtype=float))
    share, bounds, held = order.sum() / count, list[float](), 0.0
    for before, value in pairwise([0.0, *order.tolist()]):
        if held + value > share * (len(bounds) + 1) * (1 + 1e-12) and held > 0 and len(bounds) < count - 1:
            bounds.append(before)
        held += value
    return sorted({*bounds, float(order[-1])})


def buckets(durations: Sequence[float], tokens: Sequence[float], count: int = 30, sub: int = 2) -> list[Bucket]:
    """Buckets of durations of equal sums, parted into ``sub`` of tokens of equal sums; 1 for durations alone.

    Raises:
        UserError: there is nothing to sort, or a recording has no duration.
    """
    if not len(durations) or min(durations) <= 0 or len(durations) != len(tokens):
        raise UserError("buckets are of recordings, each with a duration above 0 and a number of tokens")
    length, said = np.asarray(durations, dtype=float), np.asarray(tokens, dtype=float)
    found, low = list[Bucket](), 0.0
    for high in _equal(durations, count):
        inside = (length > low) & (length <= high)
        rate = said[inside] / length[inside]
        kept = said[inside][rate - rate.mean() <= _OUTLIER * rate.std() + 1e-12]
        found += [Bucket(high, most) for most in _equal(kept.tolist(), sub)]
        low = high
    return found


def assign(
    duration: float, tokens: float, among: Sequence[Bucket], how: Literal["strict", "lenient"] = "strict"
) -> int | None:
    """Number of a recording's bucket among sorted ones; None where it fits none."""
    wide = next((bucket.duration for bucket in among if bucket.duration >= duration), None)
    for i, bucket in enumerate(among):
        if bucket.duration >= duration and bucket.tokens >= tokens and (how == "lenient" or bucket.duration == wide):
            return i
    return None


def largest_batch(fits: Callable[[int], bool], start: int = 32) -> int:
    """The largest batch that fits, less 5 % at most; ``fits`` is asked in O(log) times.

    Raises:
        UserError: not even one recording fits.
    """
    good, bad, size = 0, 0, start
    while not (good and bad):
        if fits(size):
            good, size = size, 2 * size
        else:
            bad, size = size, size // 2
        if bad == 1:
            raise UserError("not even a batch of one recording fits: shorten the longest ones, or take a smaller model")
    while bad - good > 1 and (bad - good) / bad > _CLOSE:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


@dataclass(frozen=True)
class BucketSampler:
    """Batches of numbers of recordings, each once in an epoch unless it fits no bucket.

    Attributes:
        durations, tokens: of recordings.
        among: sorted buckets.
        sizes: batch size of each.
        seed: of the order.
        rank, world: of this process, and how many there are.
        how: how a recording finds its bucket.
    """

    durations: Sequence[float]
    tokens: Sequence[float]
    among: Sequence[Bucket]
    sizes: Sequence[int]
    seed: int = 0
    rank: int = 0
    world: int = 1
    how: Literal["strict", "lenient"] = "strict"

    def members(self) -> tuple[list[list[int]], list[int]]:
        """Recordings of each bucket, and those that fit none."""
        held: list[list[int]] = [[] for _ in self.among]
        rejected: list[int] = []
        for i, (duration, tokens) in enumerate(zip(self.durations, self.tokens, strict=True)):
            at = assign(duration, tokens, self.among, self.how)
            (rejected if at is None else held[at]).append(i)
        return held, rejected

    def epoch(self, number: int, skip: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Bucket and recordings of every step but the first ``skip``; the same buckets in all processes.

        What is left of a bucket at the end goes to the processes as evenly as it can; a process without one has an
        empty batch there, so that no other waits.
        """
        rng, (held, _) = np.random.default_rng((self.seed, number)), self.members()
        steps = list[tuple[int, list[int]]]()
        for bucket, (mine, size) in enumerate(zip(held, self.sizes, strict=True)):
            order = [mine[i] for i in rng.permutation(len(mine))]
            whole = size * self.world
            for first in range(0, len(order), whole):
                steps.append((bucket, order[first : first + whole][self.rank :: self.world]))
        for i in rng.permutation(len(steps))[skip:]:
            yield steps[i]


def padding(durations: Sequence[float], tokens: Sequence[float], batches: Sequence[Sequence[int]]) -> Padding:
    """What batches of these recordings waste."""
    filled = [batch for batch in batches if len(batch)]
    waste = []
    for values in (np.asarray(durations, dtype=float), np.asarray(tokens, dtype=float)):
        held = sum(float(values[list(batch)].sum()) for batch in filled)
        waste.append(1 - held / sum(len(batch) * float(values[list(batch)].max()) for batch in filled))
    return Padding(waste[0], waste[1], len(filled), sum(map(len, filled)) / len(filled))
