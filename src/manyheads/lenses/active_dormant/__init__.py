# SPDX-License-Identifier: Apache-2.0
"""Attention sinks, drained values, residual peaks, and heads that work on one kind of text and rest on another.

"Active-Dormant Attention Heads: Mechanistically Demystifying Extreme-Token Phenomena in LLMs", arXiv 2410.13835.
Softmax makes a head look somewhere even where it has nothing to look for. Such a head turns to the first token, whose
value is small, and so adds nothing: it is dormant. Training strengthens both, a larger sink asks for a smaller value
and a smaller value for a larger sink, and the residual stream of the first token grows to feed them. Measured per layer
and head (peak: per layer) and prompt, over rows t >= 1, with S the logits, A the weights, v the values and h the output
of the block:

    sink   mean over t of A[t, 0]                          gap    mean over t of S[t, 0] - mean over s >= 1 of S[t, s]
    drain  |v_0| / mean over s >= 1 of |v_s|               peak   |h_0| / mean over s >= 1 of |h_s|
    switch sink on one domain minus sink on another

Legend: B batch, H query heads, Hkv key/value heads, T queries, S keys. LensResult: tables ``sink``, ``gap``, ``drain``,
``peak``; ``learned`` (mass on what is no token: a learned sink logit as in gpt-oss, or learned keys, which may take the
sink's place) where there is any; ``sink of X`` for each domain and ``switch`` where domains are named. The series
``sink`` is the mean over all heads for each token.

Choices, where paper and code leave them open: s runs over the keys that the row sees; logits are taken after cap and
bias, from the weights, so keys whose weight is below 1e-38 do not count; rows that do not see the first token (beyond
a sliding window) count 0 for the sink and not at all for the gap. With ``gap=lse`` the others enter by the mean of
their exponentials, as in ``S[t, 0] - logsumexp S[t, s >= 1] + log n``. In cross-attention every row counts, and "the
first token" is that of the source. The code's test by entropies of rows and columns is not here: the sink says it.

The mitigations of the paper are to be trained with: ReLU in place of softmax (:class:`ReLUAttention`; look at such a
model with ``attention=relu``, which gives no gap), and SGD in place of Adam.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...attention.reference import repeat_kv
from ...call import Site
from ...calls.statistics import MeanLogWeight, Rows, Statistic, WeightedSum
from ...heads import HeadTable
from ...lens import AttentionView, Lens, LensResult, Memory, RunningMean, table, table_of
from ...strategy import Residual
from .relu_attention import ReLUAttention, relu_weights
from .report import notes

__all__ = ["ActiveDormant", "Gap", "ReLUAttention", "switch"]


@dataclass
class Gap(Rows):
    """By how much the logit of the sink exceeds the logarithm of the mean of the others' exponentials, ``[B, H, T]``.

    NaN where either is not seen.

    Attributes:
        sink: ``[B, S]``, True for the sink.
    """

    sink: Tensor

    def update(self, rows: Tensor, start: int, length: int) -> None:
        seen = rows > 0
        parts = torch.stack([self.sink, ~self.sink], -1)[:, None].to(rows.dtype)
        mean = (rows @ parts) / (seen.to(rows.dtype) @ parts)  # 0 / 0 is NaN, on purpose
        sink, others = mean.log().unbind(-1)
        self.put(sink - others, start, length)


@dataclass(frozen=True, kw_only=True)
class ActiveDormant(Lens, Residual):
    """How much each head rests on the first token, how small its value is, and how large its residual stream."""

    sink: str = field(default="bos", metadata={"help": "role of the tokens looked at as sinks"})
    domains: tuple[str, ...] = field(
        default=(), metadata={"help": "roles of tokens between which heads may switch, as code+prose"}
    )
    gap: Literal["mean", "lse"] = field(default="mean", metadata={"help": "how the other logits are averaged"})
    attention: Literal["softmax", "relu"] = field(default="softmax", metadata={"help": "what makes the weights"})
    threshold: float = field(default=0.5, metadata={"help": "the notes call a head with a larger sink dormant"})

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        sink = view.columns(self.sink)
        both = view.once(("sink, all", self.sink), lambda: torch.stack([sink, view.keys], -1).float())
        mass = WeightedSum(both)
        if self.attention == "relu":
            with torch.no_grad():
                mass.update(relu_weights(view.call), 0, view.call.q.shape[2])
            view.memory["mass"] = mass.result()
            return {}
        if self.gap == "lse":
            return {"mass": mass, "gap": Gap(sink)}
        apart = view.once(("sink, others", self.sink), lambda: torch.stack([sink, ~sink], -1))
        return {"mass": mass, "gap": MeanLogWeight(apart)}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        memory, length = view.memory, view.call.q.shape[2]
        counted, sinks, others = view.once(("parts", self.sink), lambda: self._parts(view))
        rows = counted[:, None]
        mass, everything = (memory.pop("mass") if self.attention == "relu" else found["mass"]).float().unbind(-1)
        view.add_mean("sink", mass, rows)
        if "gap" in found:
            gap = found["gap"] if self.gap == "lse" else found["gap"][..., 0] - found["gap"][..., 1]
            view.add_mean("gap", gap.float(), rows & gap.isfinite(), own=True)
        if self.attention == "softmax" and (view.call.sinks is not None or view.call.prepended):
            view.add_mean("learned", 1 - everything, rows)
        for domain in self.domains:
            view.add_mean(f"sink of {domain}", mass, rows & view.rows(domain)[:, None], own=True)
        view.add_tokens("series", mass.mean(1), counted)
        if view.cross and not view.fresh:
            return  # the source was counted before
        values = view.call.v if view.cross else view.call.v[:, :, -length:]
        norms = repeat_kv(torch.linalg.vector_norm(values.float(), dim=-1, keepdim=True), view.call.q.shape[1])[..., 0]
        view.add_mean("value of sink", norms, sinks[:, None])
        view.add_mean("value of others", norms, others[:, None])
        memory["now"] = None if view.cross else (view.memo, sinks, counted, view.fresh)

    def _parts(self, view: AttentionView) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that are counted, and which of the newest tokens are sinks and which not."""
        columns = view.columns(self.sink)
        newest = columns if view.cross else columns[:, -view.call.q.shape[2] :]
        tokens = view.keys if view.cross else view.valid
        counted = view.valid if view.cross else view.valid & ~newest  # rows t >= 1
        return counted, newest & tokens, tokens & ~newest

    def residual(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        if memory.get("now") is not None:  # else the block looks at another sequence first
            norms = torch.linalg.vector_norm(hidden.detach().float(), dim=-1)
            memo, *parts, fresh = memory["now"]
            for name, rows in zip(("stream of sink", "stream of others"), parts, strict=True):
                others, count = memo.counted(rows[:, None])
                memory.setdefault(name, RunningMean()).add(norms[:, None].masked_fill(others, 0).sum(-1), count, fresh)
        return hidden

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        about, made = {"lens": self.spec, "kinds": [site.kind for site, _ in sites]}, LensResult()

        def mean(key: str, name: str, **more: bool) -> None:
            if kept := [(site, memory) for site, memory in sites if key in memory]:
                made.tables[key] = table(name, kept, key, **about, **more)

        def ratio(key: str, name: str, of: str) -> None:
            if kept := [(site, memory) for site, memory in sites if f"{of} of sink" in memory]:
                with np.errstate(divide="ignore", invalid="ignore"):
                    rows = [memory[f"{of} of sink"].mean() / memory[f"{of} of others"].mean() for _, memory in kept]
                made.tables[key] = table_of(name, [site for site, _ in kept], rows, **about)

        mean("sink", "attention on the first token", share=True)
        mean("gap", "logit of the first token above the others, nats")
        ratio("drain", "norm of the first value over the others'", "value")
        ratio("peak", "norm of the first token's residual stream over the others'", "stream")
        mean("learned", "mass on the learned sink", share=True)
        for domain in self.domains:
            mean(f"sink of {domain}", f"attention on the first token by {domain}", share=True)
        if len(self.domains) > 1:
            made.tables["switch"] = switch(*(made.tables[f"sink of {d}"] for d in self.domains[:2]))
        made.series["sink"] = _over_layers(sites)
        made.notes = notes(made.tables, self.threshold, self.domains)
        return made


def switch(first: HeadTable, second: HeadTable) -> HeadTable:
    """Sink on one domain (of its rows, or of prompts of it) minus sink on another: far from 0 for heads that switch.

    Prompt by prompt where every prompt has tokens of both; else of the means.
    """
    known = all(np.isfinite(of.values).any((1, 2)).all() for of in (first, second))
    if known and first.values.shape == second.values.shape and first.about == second.about:
        return first.minus(second)
    name = f"{first.name} minus {second.name}"
    return HeadTable(name, first.sites, first.mean - second.mean, {**first.about, "share": False}, first.layers)


def _over_layers(sites: Sequence[tuple[Site, Memory]]) -> list[Any]:
    """Mean over the layers of the decoder, or of the encoder where that is all there is, for each token."""
    kept = [m for s, m in sites if s.causal and s.kind != "cross"] or [m for s, m in sites if s.kind != "cross"]
    prompts = zip(*(memory["series"].rows() for memory in kept), strict=False)
    return [np.mean([row for row in rows if row.shape == rows[0].shape], axis=0) for rows in prompts]
