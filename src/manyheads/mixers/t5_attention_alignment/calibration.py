# SPDX-License-Identifier: Apache-2.0
"""Temperatures at which a model attends as peakedly as at its trained length, by bisection on its own logits.

Legend: B batch, H heads, R rows looked at, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...attention import reference
from ...call import AttentionCall, Site
from ...calls.visible import keys_seen, rows_of, visible
from ...errors import UserError
from ...strategy import AttentionEdit
from .._mixer import edited

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from . import AttentionAlignment

__all__ = ["Align", "LogitRecorder", "Per", "calibrate", "peakedness"]

Align = Literal["entropy", "pmax", "gaussian", "logn", "none"]
Peak = Literal["entropy", "pmax"]
Per = Literal["model", "layer", "head"]
Logits = Mapping[int, tuple[Tensor, Tensor]]  # by site: [B, H, R, S], and the keys seen [B or 1, H or 1, R or 1]
_RANGE = (math.log(1 / 16), math.log(4.0))  # of the logarithm of tau


@dataclass(frozen=True, kw_only=True)
class LogitRecorder(AttentionEdit):
    """While ``inner`` acts, records of ``rows`` rows of every site their logits before it and the keys they see.

    Attributes:
        found: by site index, ``[B, H, R, S]`` and ``[B or 1, H or 1, R or 1]``.
    """

    inner: AttentionAlignment
    rows: int
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return self.inner.selects(site)

    def edit(self, call: AttentionCall) -> AttentionCall:
        queries = call.q.shape[2]
        count = min(self.rows, queries)
        if call.site.causal or call.is_causal:  # those that see the most
            rows = torch.arange(queries - count, queries, device=call.q.device)
        else:
            rows = torch.linspace(0, queries - 1, count, device=call.q.device).round().long()

        few = rows_of(call, rows)
        x = reference.logits(few.q.float(), few.k.float(), scale=few.scale, bias=few.bias)
        if (allowed := visible(few)) is not None:
            x = x.masked_fill(~allowed, -torch.inf)
        self.found[call.site.index] = x, keys_seen(few)
        return self.inner.edit(call)


def peakedness(x: Tensor, tau: Tensor, kind: Peak) -> Tensor:
    """Mean over rows of the entropy (nats) or of the largest weight of ``x [B, H, R, S] / tau``: ``[H]``."""
    p = (x.double() / tau[..., None]).softmax(-1)
    return (p.amax(-1) if kind == "pmax" else torch.special.entr(p).sum(-1)).mean((0, 2))


def variance(x: Tensor) -> Tensor:
    """Variance of the logits of a row, mean over rows: ``[B, H, R, S] -> [H]``."""
    seen = x.double().masked_fill(x == -torch.inf, torch.nan)
    return (seen - seen.nanmean(-1, keepdim=True)).square().nanmean(-1).mean((0, 2))


def _pooled(x: Tensor, per: Per) -> Tensor:
    """``[sites, H]`` averaged to what shares a temperature: ``[sites or 1, H or 1]``."""
    return x.mean().view(1, 1) if per == "model" else x.mean(1, keepdim=True) if per == "layer" else x


def _peaks(strategy: AttentionAlignment, found: Logits, kind: Peak, per: Per) -> Tensor:
    """Mean peakedness under ``strategy`` of what shares a temperature, ``[sites or 1, H or 1]``."""
    rows = [peakedness(x, strategy.temperature(site, seen), kind) for site, (x, seen) in found.items()]
    return _pooled(torch.stack(rows), per)


def _solved(
    found: Logits, under: Callable[[tuple[float, ...]], AttentionAlignment], target: Tensor, kind: Peak, per: Per
) -> Tensor:
    """Temperatures at which all sites are as peaked as ``target [sites or 1, H or 1]``, of its shape, by bisection.

    Args:
        found: logits, and the keys that their rows see, by site.
        under: the strategy with such temperatures, flattened.
        target: mean peakedness of what shares a temperature.
        kind: of peakedness.
        per: what shares a temperature.
    """
    low, high = (torch.full_like(target, end) for end in _RANGE)
    for _ in range(30):
        middle = (low + high) / 2
        now = _peaks(under(tuple(middle.exp().flatten().tolist())), found, kind, per)
        flat = now > target if kind == "entropy" else now < target
        low, high = torch.where(flat, low, middle), torch.where(flat, middle, high)
    return ((low + high) / 2).exp()


def _extended(
    strategy: AttentionAlignment, align: Align, length: int, taus: tuple[float, ...]
) -> AttentionAlignment:  # fmt: skip
    """``strategy`` with one more length and its temperatures."""
    return replace(strategy, align=align, lengths=(*strategy.lengths, length), taus=(*strategy.taus, *taus))


def calibrate(
    strategy: AttentionAlignment, model: nn.Module, inputs: Tensor | Mapping[str, Tensor], lengths: Sequence[int], *,
    align: Align = "entropy", per: Per = "model",
    port: Callable[[nn.Module, AttentionEdit], AbstractContextManager[Any]] = edited, rows: int = 16, rounds: int = 6,
) -> AttentionAlignment:  # fmt: skip
    """Temperatures for ``lengths`` at which ``model`` attends as peakedly as at ``strategy.trained`` keys.

    The model reads the beginning of ``inputs`` at each length, shortest first, with the temperatures found so far in
    force; as those of one layer change what the next one sees, a length is read until they stay. Held at a time are
    the logits of ``rows`` rows of each site, no map of all queries.

    Args:
        strategy: says ``trained``, ``where`` and ``layers``; its temperatures are not used.
        model: a transformers model, or a Decoder with softmax mixers.
        inputs: ids ``[B, >= max(lengths)]`` or the model's arguments by name, each ``[B, ...]`` and cut alike; text of
            the kind that will be read, without padding.
        lengths: ascending.
        align: ``entropy`` or ``pmax`` (temperatures by length), ``gaussian`` (their spread), ``logn``, ``none``.
        per: what has a temperature of its own: the model, each layer's attention, or each head.
        port: ``manyheads.use`` for a transformers model; the default is for a Decoder.
        rows: of each sequence and site: the last where attention is causal, else evenly spread.
        rounds: of reading each length at most.

    Returns:
        The strategy; its ``spec`` says all of it.

    Raises:
        UserError: inputs are shorter than the longest length, or nothing is selected.
    """
    whole = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    trained = strategy.trained
    longest = max(lengths, default=trained)
    if max(x.shape[1] for x in whole.values()) < longest:
        raise UserError(f"calibration reads {longest} tokens; give inputs of that length or shorter lengths")
    start = replace(strategy, align="none", tau=None, lengths=(), taus=(), spread=(), sites=())
    if align == "logn" or align == "none":
        return replace(start, align=align)

    def read(inner: AttentionAlignment, length: int) -> Logits:
        recorder = LogitRecorder(inner=inner, rows=rows)
        cut = {name: x[:, :length] for name, x in whole.items()}
        with torch.no_grad(), port(model, recorder):
            model(cut[""]) if "" in cut else model(**cut)
        return dict(sorted(recorder.found.items()))

    was = model.training
    model.eval()
    try:
        found = read(start, trained)
        aligned = start = replace(start, sites=() if per == "model" else tuple(found))
        if align == "gaussian":
            spread = _pooled(torch.stack([variance(x) for x, _ in found.values()]), per).sqrt()
            return replace(start, align=align, spread=_rounded(spread))
        target = _peaks(start, found, align, per)
        for length in lengths:
            under, tau = partial(_extended, aligned, align, length), None
            for _ in range(rounds):
                now = _solved(read(aligned, length), under, target, align, per)
                converged = tau is not None and bool(((now / tau).log().abs() < 1e-3).all())
                tau, aligned = now, under(_rounded(now))
                if converged:
                    break
        return aligned
    finally:
        model.train(was)


def _rounded(x: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in x.flatten().tolist())
