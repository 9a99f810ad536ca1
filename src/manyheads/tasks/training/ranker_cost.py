# SPDX-License-Identifier: Apache-2.0
"""What a ranker's training costs by the length of a document: time, and what is kept for the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...models.ranker import UNKNOWN, RankingModel
from ...strategy import RankerConfig
from ...training.fit import autocast
from ._decoders import mixer_of, now

__all__ = ["RankerCost"]

_WARM = 2  # rounds before those that count
_VOCAB, _QUERY = 5000, 20
_BACKENDS = {
    "fused": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],  # the first that can
    "map": [SDPBackend.MATH],
}


@dataclass(frozen=True, kw_only=True)
class RankerCost(Task):
    """A round is one pass forward and back of every arm at every length, on documents of drawn words.

    ``kept`` are the bytes of all tensors that autograd holds between the two ways, each storage once and weights not:
    the memory that a training needs for a document, in float32. It is counted where attention is a fused operator,
    which holds no map of it, and where it is a product, a softmax and a product, as it was when TKL was written; on
    ``documents`` of each length, every one with a query of its own.

    Attributes:
        lengths: words of a document.
        words: of all documents of a pass.
        rounds: repetitions.
        documents: of each length whose memory is counted.
        dim, heads, layers, hidden: of a model.
        only: names of the arms that are measured; all that are trained when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("document_time", "training, ms/document", "ms/document", kind="time"),
        Metric("kept", "activations of a document, bytes", "bytes"),
    )

    lengths: tuple[int, ...] = (500, 1000, 2000)
    words: int = 2000
    rounds: int = 5
    documents: int = 3
    dim: int = 160
    heads: int = 10
    layers: int = 2
    hidden: int = 100
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths or any(self.words % length for length in self.lengths):
            raise UserError(f"{self.words} words do not part into documents of {self.lengths}")

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float((self.rounds + _WARM) * len(self.lengths))
        return [WorkUnit(self.key, "all", cost, "cost of rankers")]

    def measured(self, run: RunContext) -> list[Arm]:
        """Arms that are measured."""
        arms = [arm for arm in run.arms if "ranker" not in arm.options]
        return [arm for arm in arms if not self.only or arm.name in self.only]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        config = RankerConfig(dim=self.dim, heads=self.heads, layers=self.layers, hidden=self.hidden)
        arms, words = self.measured(run), [f"{i}" for i in range(_VOCAB)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            models = {arm.key: RankingModel(mixer_of(run, arm), words, config).to(run.device) for arm in arms}
        generator = run.torch_rng(words=self.words)
        ids = torch.randint(UNKNOWN + 1, _VOCAB, (self.words,), generator=generator).to(run.device)
        query = torch.randint(UNKNOWN + 1, _VOCAB, (1, _QUERY), generator=generator).to(run.device)
        for arm in arms:
            yield from self._kept(run, arm, models[arm.key])
        for turn in range(self.rounds + _WARM):
            for length in self.lengths:
                documents = ids.view(-1, length)
                for arm in arms:
                    model, start = models[arm.key], now(run)
                    with autocast(run.device):
                        scores = model(query.expand(len(documents), -1), documents)
                    scores.sum().backward()
                    passed = 1000 * (now(run) - start) / len(documents)
                    model.zero_grad(set_to_none=True)
                    if turn >= _WARM:
                        yield self.row("document_time", arm, passed, f"{turn - _WARM}", at={"terms": length})
                run.advance(1.0)

    def _kept(self, run: RunContext, arm: Arm, model: nn.Module) -> Iterator[Row]:
        """What is kept of each document, the same ones for every arm."""
        for length in self.lengths:
            generator = run.torch_rng(terms=length)
            for number in range(self.documents):
                drawn = [torch.randint(UNKNOWN + 1, _VOCAB, (1, n), generator=generator) for n in (_QUERY, length)]
                query, document = (x.to(run.device) for x in drawn)
                for attention, backends in _BACKENDS.items():
                    held = _Held(model)
                    with held, sdpa_kernel(backends):
                        scores = model(query, document)
                    del scores
                    at = {"terms": length, "attention": attention}
                    yield self.row("kept", arm, held.bytes, f"{number}", at=at, bytes=held.bytes)


class _Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps of a pass of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        self._sizes: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no address is taken twice
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._sizes[storage.data_ptr()] = storage.nbytes()
            self._held.append(x)
        return x

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())
