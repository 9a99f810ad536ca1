# SPDX-License-Identifier: Apache-2.0
"""What a classifier of each arm costs by the length of a sequence: time, bytes kept for backward, and products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...experiment import Metric, Row, RunContext, WorkUnit
from ...models.classifier import Classifier, ClassifierConfig
from ...models.decoder import DecoderConfig, TokenModel
from ...training.fit import autocast
from .mixer_speed import MixerSpeed

__all__ = ["ClassifierCost"]

_BATCHES = (1, 2, 4)  # sequences whose bytes are counted


@dataclass(frozen=True, kw_only=True)
class ClassifierCost(MixerSpeed):
    """As ``mixer_speed``, of classifiers of bytes, and for each length:

    ``kept`` are the bytes that a training's forward leaves for the backward, by sequences at once, every storage once
    and weights left out; of flash attention those are q, k, v, the output and a number a row. ``products`` are the
    multiplications and additions of a forward, those of softmax attention with all of its pairs.
    """

    kind: ClassVar[type[TokenModel]] = Classifier
    metrics: ClassVar[tuple[Metric, ...]] = (
        *MixerSpeed.metrics,
        Metric("kept", "kept for the backward, bytes/token", "bytes/token"),
        Metric("products", "forward, floating-point operations/token", "floating-point operations/token"),
    )

    @property
    def config(self) -> DecoderConfig:
        return ClassifierConfig(self.vocab, self.dim, self.layers, self.heads, length=self.length, classes=2)

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        yield from super().measure(run, unit)
        models = self.models(run)
        for times in self.times:
            length = times * self.length
            ids = torch.randint(self.vocab, (max(_BATCHES), length), generator=run.torch_rng(length=length))
            ids = self.read(ids.to(run.device))
            for arm in self.measured(run):
                with autocast(run.device):
                    kept = [kept_bytes(models[arm.key], ids[:batch]) / (batch * length) for batch in _BATCHES]
                    done = products(models[arm.key], ids[:1]) / length
                for batch, found in zip(_BATCHES, kept, strict=True):
                    yield self.row("kept", arm, found, f"{batch} at once", at={"times": times})
                yield self.row("products", arm, done, "0", at={"times": times})


def kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the storages that a forward of ``model`` keeps for its backward, but for its parameters'."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out: Any = model(ids)
    del out
    return sum(x.untyped_storage().nbytes() for x in found.values())


@torch.no_grad()
def products(model: nn.Module, ids: Tensor) -> int:
    """Floating-point operations of the matrix products of a forward."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids)
    return int(counter.get_total_flops())
