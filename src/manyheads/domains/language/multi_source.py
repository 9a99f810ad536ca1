# SPDX-License-Identifier: Apache-2.0
"""Input Combination Strategies for Multi-Source Transformer Decoder (WMT 2018, W18-6326).

A decoder that has several encoders ``H_1 .. H_N`` to attend to, each of a source of its own. With q ``[B, T, D]`` what
comes out of the attention to what was written, and norms before each attention, its attention to the sources is

- ``serial``: for i = 1 .. N: q <- q + Drop(MHA_i(LN_i(q), H_i)); the order matters
- ``parallel``: q + sum_i Drop(MHA_i(LN(q), H_i))
- ``flat``: q + Drop(MHA(LN(q), [W_1 H_1; ..; W_N H_N])): one softmax over the positions of all
- ``hierarchical``: c_i = Drop(MHA_i(LN(q), H_i)); q + Drop(MHA(LN(q), {c_1 .. c_N})): a second attention over contexts

The forms are those of the authors' code (Neural Monkey) as the specification has them; the paper was not read again.
Chosen here: one number of heads for both levels of ``hierarchical`` (the paper has 16 and 8), and a source that is not
there: its context is 0 and the second level does not see it, where the authors' code has no such mask.
``source_dropout`` leaves out sources while training, never all of a sentence; it is 0 in the paper.

What is shown of each word is the share of each source: of the weights of ``flat`` and of the second level of
``hierarchical``, of the lengths of the contexts elsewhere. The paper's images are not among the sources of the task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ...attention.multihead import MultiHead
from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe, Sample

__all__ = ["Combination", "MultiSource"]

Kind = Literal["serial", "parallel", "flat", "hierarchical"]


class Combination(nn.Module):
    """q ``[B, T, D]``, states ``N x [B, S_i, D]`` and masks ``N x [B, S_i]`` -> ``[B, T, D]``.

    Args:
        dim, heads, rate: of attention, and of dropout.
        sources: how many.
        kind: of the combination.

    Attributes:
        shares: of each source ``[B, T, N]`` in the last forward; kept where ``show`` is set.
    """

    def __init__(self, dim: int, heads: int, rate: float, sources: int, kind: Kind) -> None:
        super().__init__()
        self.kind, self.rate = kind, rate
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(sources if kind == "serial" else 1))
        self.attend = nn.ModuleList(MultiHead(dim, heads, rate) for _ in range(1 if kind == "flat" else sources))
        if kind == "flat":
            self.project = nn.ModuleList(nn.Linear(dim, dim) for _ in range(sources))
        if kind == "hierarchical":
            self.choose = MultiHead(dim, heads, rate)
        self.show, self.shares = False, torch.empty(0)

    def forward(self, q: Tensor, states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        contexts: list[Tensor] = []
        if self.kind == "serial":
            for norm, attend, h, mask in zip(self.norms, self.attend, states, masks, strict=True):
                contexts.append(self._drop(attend(norm(q), h, mask)))
                q = q + contexts[-1]
            return self._told(q, contexts)
        asked = self.norms[0](q)
        if self.kind == "flat":
            one: Any = self.attend[0]
            one.show = self.show
            every = torch.cat([project(h) for project, h in zip(self.project, states, strict=True)], 1)
            q = q + self._drop(one(asked, every, torch.cat(list(masks), 1)))
            if self.show:
                parts = one.shown.split([mask.shape[1] for mask in masks], -1)
                self.shares = torch.stack([part.sum(-1) for part in parts], -1)
            return q
        contexts = [
            self._drop(attend(asked, h, mask)) for attend, h, mask in zip(self.attend, states, masks, strict=True)
        ]
        if self.kind == "parallel":
            return self._told(q + torch.stack(contexts).sum(0), contexts)
        there = torch.stack([mask.any(1) for mask in masks], -1)  # [B, N]
        batch, length, dim = q.shape
        self.choose.show = self.show
        chosen = self.choose(
            asked.reshape(-1, 1, dim), torch.stack(contexts, 2).flatten(0, 1), there.repeat_interleave(length, 0)
        )
        if self.show:
            self.shares = self.choose.shown.reshape(batch, length, -1)
        return q + self._drop(chosen.reshape(batch, length, dim))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.rate, self.training)

    def _told(self, q: Tensor, contexts: Sequence[Tensor]) -> Tensor:
        if self.show:
            lengths = torch.stack([context.norm(dim=-1) for context in contexts], -1)
            self.shares = (lengths / lengths.sum(-1, keepdim=True).clamp(min=1e-12)).detach()
        return q


@dataclass(frozen=True, kw_only=True)
class MultiSource(Recipe):
    """A decoder that attends to several encoders, in one of four ways.

    Attributes:
        combination: of the attentions to the sources.
        source_dropout: share of sources that are left out while training, never all of a sentence.
        shuffled: number of a source that is another sentence's when a model is judged, the next of its batch's; 0 for
            none. A model that reads a source is worse for it: the control of the paper.
        missing: number of a source that is left out when a model is judged; 0 for none.
    """

    task: ClassVar[str] = "caption_translation"

    combination: Kind = field(default="parallel", metadata={"help": "serial, parallel, flat or hierarchical"})
    source_dropout: float = field(default=0.0, metadata={"help": "share of sources left out in training"})
    shuffled: int = field(default=0, metadata={"help": "source that is another sentence's when judged"})
    missing: int = field(default=0, metadata={"help": "source that is left out when judged"})

    def __post_init__(self) -> None:
        if self.combination not in get_args(Kind):
            raise UserError(f"no combination {self.combination!r}: give serial, parallel, flat or hierarchical")
        if not 0 <= self.source_dropout < 1 or min(self.shuffled, self.missing) < 0:
            raise UserError("source_dropout is a share below 1; shuffled and missing number a source, from 1")

    def build(self, task: Any, width: int) -> nn.Module:
        def block() -> Combination:
            return Combination(task.dim, task.heads, task.dropout, task.sources, self.combination)

        made: nn.Module = task.translator(width, block)
        return made

    def batches(self, task: FieldTask, rng: np.random.Generator, samples: Sequence[Sample]) -> Batch:
        batch = super().batches(task, rng, samples)
        if not self.source_dropout:
            return batch
        there = batch["there"]
        kept = there & torch.from_numpy(rng.random(there.shape) >= self.source_dropout)
        return {**batch, "there": torch.where(kept.any(1, keepdim=True), kept, there)}

    def predict(self, task: FieldTask, model: nn.Module, batch: Batch) -> Sequence[Any]:
        count = batch["there"].shape[1]
        if max(self.shuffled, self.missing) > count:
            raise UserError(f"there are {count} sources: shuffled and missing number one of them, from 1")
        there = batch["there"].clone()
        if self.missing:
            there[:, self.missing - 1] = False
        changed: dict[str, Any] = {**batch, "there": there}
        if self.shuffled:
            i = self.shuffled - 1
            there[:, i] = there[:, i].roll(1)
            changed |= {name: batch[name].roll(1, 0) for name in (f"source_{i}", f"mask_{i}")}
        return task.predict(model, changed)

    def pictures(self, model: Any, batch: Batch) -> Sequence[Picture]:
        """The share of each source in the words of the first sentence, in the last layer."""
        last = model.decoder[-1].sources
        last.show = True
        model(batch, batch["words"])
        last.show = False
        count = int((batch["next"][0] >= 0).sum())
        shares = last.shares[0, :count].T.tolist()
        rows = [f"source {i + 1}" for i in range(len(shares))]
        return (
            Picture("share of each source", rows, [str(i + 1) for i in range(count)], shares, ("sources", "tokens")),
        )
