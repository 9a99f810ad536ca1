# SPDX-License-Identifier: Apache-2.0
"""What a head can tell apart among L keys: the three measures of "Limitations of Normalization in Attention Mechanism".

Of rows of weights alpha over the L keys that a query sees, with x their values, ``s = sum_j alpha_j x_j`` what the head
gives, and I the N keys of the greatest weight (N a number, or a share of L):

    distance      d(N, L) = |s - sum_I alpha_j x_j| / max_j |x_j|      at most the mass outside, 1 - sum_I alpha_j
    separability  the share of I with |alpha_i x_i - s| below that of every key outside of I
    sensitivity   Frobenius norm of the Jacobian of a row by its logits; of softmax at most 1 / (2 T)

Beside each stands its bound, and beside the separability that of N keys that are spread evenly over the row.

The paper's text was not at hand. That x are the values (not embeddings), that distances are over the greatest norm, and
the ball of separability are our reconstruction; its theorem on separability (70 to 85 % at most, for directions uniform
on a sphere) has no counterpart here. The bounds are proven: of the distance by the triangle inequality, of the
sensitivity in :func:`manyheads.attention.normalizers.sensitivity`. The paper's own, min(1 / (4 T), sqrt 2), does not
bound a norm of the Jacobian; ``beyond`` is the share of rows whose spectral norm exceeds 1 / (4 T), as far as its lower
bound ``tr J^2 / tr J`` shows it.

Looked at are rows at places ``2^(i / per_octave)`` of a text, so that one long text gives the curve by length, and
decoding gives what one forward gives. With ``every_row`` the sensitivity of softmax is that of all rows, from sums of
powers of the weights, by kernels where there are any. Rows are filed by the number of keys that they see: those of a
sliding window under its width, an encoder's under the length of the text. ``normalizer=`` measures the model's logits
as that would weigh them, and changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...attention import reference
from ...attention.normalizers import Kind, Normalizer, log_n_scale, sensitivity
from ...call import AttentionCall, Site
from ...calls.statistics import LogPowerSum, Statistic
from ...calls.visible import rows_of, visible
from ...errors import UserError
from ...heads import HeadTable
from ...lens import AttentionView, Lens, LensResult, Memory, RunningMean, table_of

__all__ = ["NormalizationMeasures", "chosen", "row_measures", "softmax_norms"]

_OCTAVES = 20  # of the number of keys
_ABOUT = ("top", "spread")


def chosen(p: Tensor, seen: Tensor, count: Tensor, how: str = "top") -> Tensor:
    """Which keys are selected: boolean ``[B, H, R, S]``.

    Args:
        p: weights ``[B, H, R, S]``.
        seen: what rows see, broadcastable to it.
        count: N, broadcastable to ``[B, H, R, 1]``.
        how: ``top``: the greatest weights, the first of equals; ``spread``: evenly over what is seen.
    """
    if how == "spread":
        place, n = seen.long().cumsum(-1), seen.sum(-1, keepdim=True).clamp(min=1)
        return seen & (place * count // n > (place - 1) * count // n)
    order = p.masked_fill(~seen, -1.0).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(p.shape[-1], device=p.device).expand_as(order))
    return (rank < count) & seen


def row_measures(p: Tensor, v: Tensor, seen: Tensor, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance, its bound, and separability of rows, each ``[B, H, R]``.

    Args:
        p: weights ``[B, H, R, S]``, none negative.
        v: values ``[B, H, S, dv]``.
        seen: what rows see, broadcastable to ``p``.
        selected: boolean, of the shape of ``p``; where it is all that is seen, all of it is separated.
    """
    norms = v.norm(dim=-1)[:, :, None]  # [B, H, 1, S]
    rest = p.masked_fill(selected, 0.0)
    greatest = norms.expand_as(p).masked_fill(~seen, 0.0).amax(-1).clamp(min=torch.finfo(p.dtype).tiny)
    distance = (rest @ v).norm(dim=-1) / greatest
    far = (p * norms).square() - 2 * p * ((p @ v) @ v.mT)  # |alpha_i x_i - s|^2, less |s|^2
    nearest = far.masked_fill(selected | ~seen, torch.inf).amin(-1, keepdim=True)
    count = selected.sum(-1)
    return distance, rest.sum(-1), ((far < nearest) & selected).sum(-1) / count.clamp(min=1)


def softmax_norms(logs: Tensor) -> Tensor:
    """Frobenius norms ``[...]`` of the Jacobians at T = 1 of rows of softmax, given ``log sum p^2, log sum p^3``."""
    squares, cubes = logs.exp().unbind(-1)
    return (squares - 2 * cubes + squares.square()).clamp(min=0).sqrt()


@dataclass(frozen=True, kw_only=True)
class NormalizationMeasures(Lens):
    """Distance, separability and gradient sensitivity by head and by number of keys."""

    kinds = frozenset({"self"})

    shares: tuple[float, ...] = field(default=(0.0625, 0.25), metadata={"help": "N as shares of the keys"})
    counts: tuple[int, ...] = field(default=(1, 16), metadata={"help": "N as numbers of keys"})
    temperatures: tuple[float, ...] = field(
        default=(0.25, 0.5, 1.0, 2.0, 4.0), metadata={"help": "at which the sensitivity is taken"}
    )
    per_octave: int = field(default=2, metadata={"help": "rows in each doubling of the length"})
    least: int = field(default=16, metadata={"help": "keys that a row sees at least"})
    every_row: bool = field(default=False, metadata={"help": "also the sensitivity of softmax in all rows"})
    normalizer: Kind = field(default="softmax", metadata={"help": "what weighs the logits"})
    alpha: float = field(default=1.5, metadata={"help": "of entmax"})
    k: int = field(default=32, metadata={"help": "keys that topk keeps"})
    trained: int = field(default=2048, metadata={"help": "keys of a row at which ssmax is softmax"})

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.shares) or min(self.counts, default=1) < 1:
            raise UserError(f"{self.slug}: shares lie between 0 and 1, counts are 1 or more")
        if min(self.per_octave, self.least) < 1 or min(self.temperatures, default=0) <= 0:
            raise UserError(f"{self.slug}: per_octave and least are 1 or more, temperatures above 0, at least one")
        _ = self.rule(1.0)

    def rule(self, temperature: float) -> Normalizer:
        """What makes weights of the logits."""
        return Normalizer(self.normalizer, temperature, self.alpha, self.k, log_n_scale(self.trained))

    @property
    def selections(self) -> tuple[str, ...]:
        """Names of the N: ``N = 16`` or ``N = L/4``."""
        return (*(f"N = {n}" for n in self.counts), *(f"N = L/{1 / share:g}" for share in self.shares))

    @property
    def features(self) -> tuple[str, ...]:
        """What is kept of a row, in order."""
        names = ("distance", "bound", "separability")
        measured = [f"{n}, {s}, {how}" for s in self.selections for how in _ABOUT for n in names]
        return (*measured, *(f"sensitivity, T = {t:g}" for t in self.temperatures), "beyond", "keys")

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        return {"powers": LogPowerSum((2.0, 3.0))} if self.every_row and self.normalizer == "softmax" else {}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        memory, valid = view.memory, view.valid
        if "powers" in found:
            view.add_mean("every row", softmax_norms(found["powers"]), valid[:, None])
        before = 0 if view.fresh else memory["tokens"]
        place = before + (view.start if view.fresh else 0) + valid.long().cumsum(1)
        memory["tokens"] = place[:, -1:]
        grid = torch.tensor(
            sorted({round(2 ** (i / self.per_octave)) for i in range(_OCTAVES * self.per_octave)}), device=place.device
        )
        wanted = valid & torch.isin(place, grid) & (place >= self.least)
        rows = wanted.any(0).nonzero()[:, 0]
        heads = view.call.q.shape[1]
        total = torch.zeros(len(place), heads, _OCTAVES * self.per_octave, len(self.features), dtype=torch.float64)
        worst, count = torch.zeros(len(place), dtype=torch.float64), torch.zeros(total.shape[:3], dtype=torch.float64)
        for part, measured, ratio in self._measured(view.call, rows, view.keys) if len(rows) else ():
            mine = wanted[:, part, None].expand(-1, -1, heads).mT  # [B, H, R]
            where = (self.per_octave * measured[..., -1].clamp(min=1).log2()).round().long().cpu()
            kept = torch.where(mine[..., None], measured, 0.0).double().cpu()
            total.scatter_add_(2, where[..., None].expand_as(kept), kept)
            count.scatter_add_(2, where, mine.double().cpu())
            worst = torch.maximum(worst, ratio.masked_fill(~mine, 0.0).amax((1, 2)).double().cpu())
        if view.fresh or len(rows):
            memory.setdefault("rows", RunningMean()).add(total, count[..., None], view.fresh)
            tightest = memory.setdefault("tightest", [])
            if view.fresh:
                tightest.append(worst)
            else:
                tightest[-1] = torch.maximum(tightest[-1], worst)

    def _measured(self, call: AttentionCall, rows: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of some ``rows`` at a time, which, their features ``[B, H, R, F]``, and the greatest distance over bound."""
        (batch, heads, _, _), size = call.q.shape, call.k.shape[2]
        k, v = (reference.repeat_kv(reference.widened(x.detach()), heads) for x in (call.k, call.v))
        for part in rows.split(max(1, reference.block_size(call.q, batch * heads * size) // 8)):
            few = rows_of(call, part)
            mask = visible(few)
            seen = keys[:, None, None] if mask is None else mask & keys[:, None, None]
            seen = seen.expand(batch, heads, len(part), size)
            x = reference.logits(
                reference.widened(few.q.detach()), k, scale=few.scale, softcap=few.softcap, bias=few.bias
            )
            n, p = seen.sum(-1), self.rule(1.0)(x, seen)
            made, ratios = list[Tensor](), list[Tensor]()
            wanted = [torch.full_like(n, count) for count in self.counts]
            wanted += [(share * n).round().long().clamp(min=1) for share in self.shares]
            for count in wanted:
                for how in _ABOUT:
                    values = row_measures(p, v, seen, chosen(p, seen, count[..., None], how))
                    made += values
                    ratios.append(values[0] / values[1].clamp(min=1e-6))  # of less mass, rounding is all there is
            for t in self.temperatures:
                rule = self.rule(t)
                made.append(sensitivity(rule(x, seen), rule, n))
            squares = p.square().sum(-1)
            spectral = softmax_norms(torch.stack([squares, p.pow(3).sum(-1)], -1).log()).square() / (1 - squares)
            made += [spectral > 0.25, n]
            yield part, torch.stack([value.to(p.dtype) for value in made], -1), torch.stack(ratios).amax(0)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        kept = [(site, memory) for site, memory in sites if memory["rows"].parts]
        values = [memory["rows"].mean() for _, memory in kept]  # [N, H, G, F]
        made, known = LensResult(), [site for site, _ in kept]
        names = {"distance": "distance, N = L/16, top", "separability": "separability, N = L/16, top"}
        if not self.shares or f"{1 / self.shares[0]:g}" != "16":
            names = {name: f"{name}, {self.selections[-1]}, top" for name in names}
        names["sensitivity"] = f"sensitivity, T = {min(self.temperatures, key=lambda t: abs(t - 1)):g}"
        with np.errstate(invalid="ignore"):
            for name, feature in names.items():
                rows = [_mean(value[..., self.features.index(feature)], 2) for value in values]
                made.tables[name] = self._table(feature, known, rows, share=name == "separability")
            if all("every row" in memory for _, memory in kept):
                rows = [memory["every row"].mean() for _, memory in kept]
                made.tables["sensitivity of every row"] = self._table("sensitivity of every row, T = 1", known, rows)
            # A layer that never sees so many keys says nothing of them.
            curve = _mean(np.stack([_mean(value, 1) for value in values]), 0)  # [N, G, F]
            self._curves(made, _mean(curve, 0))
        made.records["tightest"] = [
            {"layer": site.layer, "prompt": i, "distance over its bound, greatest of all rows": float(x)}
            for site, memory in kept for i, x in enumerate(torch.cat(memory["tightest"]).tolist())
        ]  # fmt: skip
        return made

    def _table(self, name: str, sites: Sequence[Site], rows: Sequence[Any], share: bool = False) -> HeadTable:
        return table_of(name, sites, rows, lens=self.spec, share=share)

    def _curves(self, made: LensResult, rows: Any) -> None:
        """Curves by number of keys, and a note, from ``[G, F]``."""
        rows = rows[np.isfinite(rows[:, -1])]
        if not len(rows):
            made.notes = [f"No row sees {self.least} keys; give longer prompts."]
            return
        column = {name: rows[:, i].tolist() for i, name in enumerate(self.features)}
        keys = column["keys"]
        for name in ("distance", "separability"):
            mine = {s: column[f"{name}, {s}, top"] for s in self.selections}
            if name == "distance":
                mine |= {f"bound, {s}": column[f"bound, {s}, top"] for s in self.selections}
            else:
                mine |= {f"{s}, spread": column[f"{name}, {s}, spread"] for s in self.selections}
            made.curves[name] = {"keys": keys, **mine}
        mine = {f"T = {t:g}": column[f"sensitivity, T = {t:g}"] for t in self.temperatures}
        if self.rule(1.0).kind in ("softmax", "topk"):
            mine |= {f"bound, T = {t:g}": [1 / (2 * t)] * len(keys) for t in self.temperatures}
            made.curves["beyond"] = {"keys": keys, "rows whose spectral norm exceeds 1 / (4 T)": column["beyond"]}
        made.curves["sensitivity"] = {"keys": keys, **mine}
        last = self.selections[-1]
        made.notes = [
            f"Among {keys[-1]:.0f} keys, what is outside of {last} moves a head's output by "
            f"{column[f'distance, {last}, top'][-1]:.2g} of the greatest value (bound "
            f"{column[f'bound, {last}, top'][-1]:.2g}), and {column[f'separability, {last}, top'][-1]:.0%} of what is "
            f"inside is told apart from it ({column[f'separability, {last}, spread'][-1]:.0%} of as many that are "
            f"spread evenly)."
        ]


def _mean(values: Any, axis: int) -> Any:
    """Mean of what is known along an axis, NaN where nothing is."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(axis), known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
