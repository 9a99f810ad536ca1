# SPDX-License-Identifier: Apache-2.0
"""Temperatures at which a model attends as peakedly as at its trained length, by bisection on its own logits.

Legend: B batch, H heads, R rows looked at, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from .peaks import LogitRecorder, Peak, peakedness, variance

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ...strategy import Strategy
    from . import AttentionAlignment

__all__ = ["Align", "Per", "calibrate"]

Align = Literal["entropy", "pmax", "gaussian", "logn", "none"]
Per = Literal["model", "layer", "head"]
_RANGE = (math.log(1 / 16), math.log(4.0))  # of the logarithm of tau


def _pooled(x: Tensor, per: Per) -> Tensor:
    """``[sites, H]`` averaged to what shares a temperature."""
    return x.mean().view(1, 1) if per == "model" else x.mean(1, keepdim=True) if per == "layer" else x


def _solved(
    found: Sequence[Tensor], tau: Callable[[int, Tensor], Tensor], target: Tensor, kind: Peak, per: Per
) -> Tensor:
    """What must be solved for so that all sites are as peaked as ``target [sites or 1, H or 1]``, by bisection.

    Args:
        found: logits ``[B, H, R, S]`` by site.
        tau: temperature ``[B or 1, H or 1, R]`` of the rows of a site, given what is solved for ``[H or 1, 1]``.
        target: mean peakedness of what shares a temperature.
        kind: of peakedness.
        per: what shares a temperature.
    """
    low, high = (torch.full_like(target, end) for end in _RANGE)
    for _ in range(30):
        middle = (low + high) / 2
        now = torch.stack([
            peakedness(x, tau(i, one[:, None]), kind)
            for i, (x, one) in enumerate(zip(found, middle.exp().expand(len(found), -1), strict=True))
        ])  # fmt: skip
        flat = _pooled(now, per) > target if kind == "entropy" else _pooled(now, per) < target
        low, high = torch.where(flat, low, middle), torch.where(flat, middle, high)
    return ((low + high) / 2).exp()


def calibrate(
    strategy: AttentionAlignment, model: nn.Module, inputs: Tensor | Mapping[str, Tensor], lengths: Sequence[int], *,
    align: Align = "entropy", per: Per = "model",
    port: Callable[[nn.Module, Strategy], AbstractContextManager[Any]] | None = None, rows: int = 16, rounds: int = 6,
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
        port: ``manyheads.use`` for a transformers model; None for a Decoder.
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

    def read(inner: AttentionAlignment, length: int) -> dict[int, tuple[Tensor, Tensor]]:
        recorder = LogitRecorder(inner=inner, rows=rows)
        cut = {name: x[:, :length] for name, x in whole.items()}
        with torch.no_grad(), recorder.on(model) if port is None else port(model, recorder):
            model(cut[""]) if "" in cut else model(**cut)
        return dict(sorted(recorder.found.items()))

    was = model.training
    model.eval()
    try:
        if align in ("logn", "none"):
            return replace(start, align=align)
        found = read(start, trained)
        sites = () if per == "model" else tuple(found)
        if align == "gaussian":
            spread = _pooled(torch.stack([variance(x) for x, _ in found.values()]), per).sqrt()
            return replace(start, align=align, sites=sites, spread=_rounded(spread))
        kind: Peak = "pmax" if align == "pmax" else "entropy"
        one = torch.ones(1, 1, 1, dtype=torch.float64, device=next(iter(found.values()))[0].device)
        target = _pooled(torch.stack([peakedness(x, one, kind) for x, _ in found.values()]), per)
        aligned = start
        for i, length in enumerate(lengths):
            known, tau = aligned.taus, None

            def table(value: Tensor, i: int = i, known: tuple[float, ...] = known) -> AttentionAlignment:
                taus = known + _rounded(value)
                return replace(start, align=align, sites=sites, lengths=tuple(lengths[: i + 1]), taus=taus)

            for _ in range(rounds):
                logits = read(aligned, length)
                # A row that sees fewer keys than the length has a temperature between two of the table, which is
                # linear in the one that is solved for.
                at = list(logits.items())
                ends = [table(torch.full_like(target, value)) for value in (1.0, 2.0)]
                line = [[end.temperature(site, seen) for end in ends] for site, (_, seen) in at]

                def rows_of(k: int, value: Tensor, line: list[list[Tensor]] = line) -> Tensor:
                    return line[k][0] + (line[k][1] - line[k][0]) * (value - 1)

                now = _solved([x for _, (x, _) in at], rows_of, target, kind, per)
                converged = tau is not None and bool(((now / tau).log().abs() < 1e-3).all())
                tau, aligned = now, table(now)
                if converged:
                    break
        return aligned
    finally:
        model.train(was)


def _rounded(x: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in x.flatten().tolist())
