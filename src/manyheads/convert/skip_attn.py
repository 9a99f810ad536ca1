# SPDX-License-Identifier: Apache-2.0
"""Leave out the attention of the deepest layers, or their feed-forward part, or whole blocks; nothing is trained.

In a model whose layers add to a residual stream, ``x <- x + Attn(LN x); x <- x + MLP(LN x)``, a part can be left out
and the stream passes it by. What the deep layers' attention adds matters least. It goes with its weights and its norm,
and its layer needs no keys and values: where n of L layers lack their attention, n / L of the KV cache goes too.

Enhancing Inference Efficiency of Large Language Models: Investigating Optimization Strategies and Architectural
Innovations (G. Tyukin, thesis, arXiv 2404.05741), whose experiments are those of Attention Is All You Need But You
Don't Need All Of It For Inference of Large Language Models (arXiv 2407.15516).

The thesis leaves out the deepest 25, 33 or 50 % of attention parts, of feed-forward parts, or of blocks, with the last
layer among them or not (``keep_last``). Its tables could not be read; sizes and variants are those of its abstract and
first pages. The survey that it begins with (quantisation, distillation, other architectures) is no part of this.

Other choices of layers, to compare with:

    first    the first ones
    random   any, drawn with ``seed``
    cosine   those that turn the stream least: lowest mean of 1 - cos(before, after) of the part, as What Matters in
             Transformers? Not All Attention is Needed (arXiv 2406.15786) drops them, and ShortGPT (arXiv 2403.03853)
             blocks
    loss     those without which, one at a time, the loss of the calibration text is lowest
    greedy   one after the other, each time the one without which that loss is lowest; takes n * L forwards of the text

The first layer stays whatever the choice: some caches are counted there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

import torch

from ..calls.calibration import Statistic, Statistics, cosine
from ..conversion import Anatomy, Conversion, Drop, Sublayer, SurgeryPlan
from ..errors import UserError

__all__ = ["SkipAttn"]

_CHOICES = ("deepest", "first", "random", "cosine", "loss", "greedy")


@dataclass(frozen=True, kw_only=True)
class SkipAttn(Conversion):
    """See the head of this file."""

    skip: float = field(default=0.25, metadata={"help": "share of the layers that lose the part"})
    part: str = field(default="attention", metadata={"help": "what is left out: attention, mlp or block"})
    choose: str = field(default="deepest", metadata={"help": f"which layers: {', '.join(_CHOICES)}"})
    keep_last: bool = field(default=False, metadata={"help": "the last layer keeps the part"})
    seed: int = field(default=0, metadata={"help": "of the random choice"})

    def __post_init__(self) -> None:
        if not 0 <= self.skip < 1:
            raise UserError("skip is a share of the layers, below 1")
        if self.part not in get_args(Sublayer) or self.choose not in _CHOICES:
            raise UserError(f"part is attention, mlp or block, and choose one of {', '.join(_CHOICES)}")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return (cosine(self._part),) if self.choose == "cosine" else ()

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        layers = range(1, len(model.layers) - self.keep_last)
        count = round(self.skip * len(model.layers))
        if self.skip and not count:
            raise UserError(
                f"{self.spec} leaves nothing out of {len(model.layers)} layers: give skip={1 / len(model.layers):.3f} "
                "for one, or skip=0 for none"
            )
        if count > len(layers):
            raise UserError(f"of {len(model.layers)} layers {len(layers)} can lose their {self.part}, not {count}")
        return self._without(sorted(self._chosen(layers, count, stats)))

    @property
    def _part(self) -> Sublayer:
        return cast(Sublayer, self.part)

    def _without(self, layers: Sequence[int]) -> SurgeryPlan:
        return SurgeryPlan((Drop(part=self._part, layers=tuple(layers)),) if layers else ())

    def _chosen(self, layers: range, count: int, stats: Statistics) -> Sequence[int]:
        if self.choose == "greedy":
            gone: list[int] = []
            for _ in range(count):
                left = (i for i in layers if i not in gone)
                gone.append(min(left, key=lambda i: stats.loss(self._without(sorted([*gone, i])))))
            return gone
        if self.choose == "random":
            order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(self.seed))
            return [layers[i] for i in order[:count].tolist()]
        if self.choose == "cosine":
            turned = stats[cosine(self._part)]
            return sorted(layers, key=lambda i: float(turned[i]))[:count]
        if self.choose == "loss":
            return sorted(layers, key=lambda i: stats.loss(self._without([i])))[:count]
        return layers[:count] if self.choose == "first" else layers[len(layers) - count :]
