# SPDX-License-Identifier: Apache-2.0
"""Training and Inference Efficiency of Encoder-Decoder Speech Models (the paper of Canary-1B-Flash).

Two things are wasted by encoder-decoder models of speech. In training, what batches are padded with: more than half of
all frames and tokens in random batches. In inference, decoder layers: they run once for every token that is written,
one after the other, encoder layers once for a recording.

- ``batching``: ``random`` batches of the size that the longest recordings leave room for; ``sorted`` ones of
  neighbours in duration; ``buckets`` in one dimension (``sub=1``, duration) or two (duration, then tokens), each with a
  batch size of its own, found by doubling and bisection (:mod:`manyheads.data.bucketing`). A training step draws a pool
  of ``pool`` times the task's batch, parts it into buckets, takes one of them at random and as much of it as fits.
- ``shift``: layers moved from the decoder to the encoder, at equal parameters: all layers get wider or narrower alike.
  Canary-1B has 24 and 24; its successor of this paper 32 and 4, with the same accuracy.

Shapes: recordings by their duration in s, transcripts by tokens. Source: released code of NeMo and lhotse, and model
cards of both Canaries. Left out: concurrent filling of buckets by a thread, which changes no batch; the size of a batch
is of a stated capacity, seconds and tokens with padding, not of an out-of-memory error of a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import Field

from ...data.bucketing import BucketSampler, buckets, largest_batch
from ...errors import UserError
from ...recipe import Batch, FieldTask, Recipe, Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

__all__ = ["Dictation", "SpeechEfficiency"]

_RATE = 8000  # samples a second
Count = Annotated[int, Field(ge=1)]


@runtime_checkable
class Dictation(Protocol):
    """A task that is learned by an encoder-decoder."""

    @property
    def batch(self) -> int: ...
    def drawn(self, rng: "np.random.Generator", samples: Sequence[Sample], count: int) -> Sequence[Sample]: ...
    def encoder_decoder(self, encoder: int, decoder: int, width: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SpeechEfficiency(Recipe):
    """An encoder-decoder of speech that is padded little and writes with few layers.

    Attributes:
        batching: how batches are made: ``random``, ``sorted`` or ``buckets``.
        count: buckets of durations.
        sub: buckets of tokens within each; 1 for durations alone.
        pool: recordings that a step's buckets are made of, by those of the task's batch.
        shift: layers moved from decoder to encoder; none where it is not said, for how many there are is the task's.
    """

    task: ClassVar[str] = "digit_dictation"

    batching: Literal["random", "sorted", "buckets"] = field(
        default="buckets", metadata={"help": "how batches are made: random, sorted or buckets"}
    )
    count: Count = field(default=30, metadata={"help": "buckets of durations"})
    sub: Count = field(default=2, metadata={"help": "buckets of tokens within each; 1 for durations alone"})
    pool: Count = field(default=4, metadata={"help": "recordings that are sorted, by those of a batch"})
    shift: Annotated[int, Field(ge=0)] = field(default=0, metadata={"help": "layers moved from decoder to encoder"})

    def build(self, task: FieldTask, width: int) -> "nn.Module":
        if not isinstance(task, Dictation):
            raise UserError("speech_efficiency is of encoder-decoders: --task digit_dictation")
        if self.shift >= task.layers:
            raise UserError(f"speech_efficiency:shift={self.shift} leaves no decoder of {task.layers}: shift fewer")
        made: nn.Module = task.encoder_decoder(task.layers + self.shift, task.layers - self.shift, width)
        return made

    def batches(self, task: FieldTask, rng: "np.random.Generator", samples: Sequence[Sample]) -> Batch:
        if self.batching == "random" or not isinstance(task, Dictation):
            return super().batches(task, rng, samples)
        drawn = task.drawn(rng, samples, self.pool * task.batch)
        durations = [len(sample.inputs) / _RATE for sample in drawn]
        tokens = [len(sample.target.split()) + 1 for sample in drawn]
        room = (task.batch * max(durations), float(task.batch * max(tokens)))
        made = self.epoch(durations, tokens, room, rng)
        weights = [len(batch) for batch in made]
        chosen = made[int(rng.choice(len(made), p=[w / sum(weights) for w in weights]))]
        return task.collate([drawn[i] for i in chosen])

    def epoch(
        self, durations: Sequence[float], tokens: Sequence[float], room: tuple[float, float], rng: "np.random.Generator"
    ) -> list[list[int]]:
        """Batches of one epoch, of numbers of recordings; outliers, which fit no bucket, are in none.

        Args:
            durations, tokens: of recordings.
            room: seconds and tokens that a batch may have, padding included.
            rng: of their order.
        """

        def largest(duration: float, most: float) -> int:
            return largest_batch(lambda n: n * duration <= room[0] and n * most <= room[1])

        if self.batching == "buckets":
            among = buckets(durations, tokens, self.count, self.sub)
            sizes = [largest(bucket.duration, bucket.tokens) for bucket in among]
            sampler = BucketSampler(durations, tokens, among, sizes, int(rng.integers(2**31)))
            return [batch for _, batch in sampler.epoch(0)]
        size = largest(max(durations), max(tokens))
        order = [int(i) for i in rng.permutation(len(durations))]
        if self.batching == "sorted":
            order.sort(key=lambda i: durations[i])
        made = [order[i : i + size] for i in range(0, len(order), size)]
        return [made[i] for i in rng.permutation(len(made))]
