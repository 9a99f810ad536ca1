# SPDX-License-Identifier: Apache-2.0
"""Merge key/value heads: consecutive ones become their mean, so that fewer are cached; one head is multi-query.

The plain baseline of conversions that shrink a cache, after GQA: Training Generalized Multi-Query Transformer Models
from Multi-Head Checkpoints (arXiv 2305.13245): projections are averaged, then the model is trained on. The result is a
plain checkpoint. Models whose keys are normed after their projection keep the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..calls.calibration import Statistics
from ..conversion import Anatomy, Configure, Conversion, Recovery, Replace, SurgeryPlan
from ..errors import UserError

__all__ = ["KVMerging"]

_LINEAR = "manyheads.integrations.surgery_parts:Linear"


@dataclass(frozen=True, kw_only=True)
class KVMerging(Conversion):
    """See the head of this file."""

    families: ClassVar[frozenset[str]] = frozenset({"llama", "gemma"})

    heads: int = field(default=1, metadata={"help": "key/value heads that are left, a divisor of those there are"})
    loss: Literal["nll", "kl"] = field(
        default="nll", metadata={"help": "of the recovery: nll (of the text) or kl (to the model before)"}
    )
    lr: float = field(default=1e-4, metadata={"help": "highest learning rate of the recovery"})

    def __post_init__(self) -> None:
        if self.heads < 1 or self.lr <= 0 or self.loss not in ("nll", "kl"):
            raise UserError("kv_merging: heads counts from 1, lr is above 0, and loss is nll or kl")

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        shape = model.layers[0]
        if shape.kv_heads % self.heads:
            fits = [n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0]
            near = min(fits, key=lambda n: (abs(n - self.heads), n))
            raise UserError(
                f"kv_merging: {shape.kv_heads} key/value heads do not divide into {self.heads}; take {near}"
            )
        said = Configure(fields={"num_key_value_heads": self.heads, "num_key_value_groups": shape.heads // self.heads})
        return SurgeryPlan((*self._merged(model), said))

    def recovery(self, model: Anatomy) -> Recovery:
        return Recovery(loss=self.loss, lr=self.lr)

    def _merged(self, model: Anatomy) -> Iterator[Replace]:
        for layer, shape in enumerate(model.layers):
            for part in "kv":
                held = {"weight": model.weight(part, layer), "bias": model.bias(part, layer)}
                tensors = {
                    name: x.unflatten(0, (self.heads, -1, shape.head_dim)).mean(1).flatten(0, 1)
                    for name, x in held.items()
                    if x is not None
                }
                size = self.heads * shape.head_dim
                config = {"in_features": model.width, "out_features": size, "bias": held["bias"] is not None}
                yield Replace(part=part, layer=layer, module=_LINEAR, config=config, tensors=tensors)
