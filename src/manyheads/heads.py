# SPDX-License-Identifier: Apache-2.0
"""One number for each head of a model: ranked, compared, and kept with what it was measured on.

Needs numpy only. A table without heads (one number a layer) has a single column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Array = np.ndarray[Any, np.dtype[np.floating[Any]]]

__all__ = ["AblationCurve", "Head", "HeadTable", "ablation_curve", "layer_matched_heads", "listed"]

Head = tuple[int, int]  # row of the table (a site), head


@dataclass(frozen=True)
class HeadTable:
    """A score of each head, for one or more prompts.

    Attributes:
        name: of the score, with its unit in words where it has one.
        sites: module paths, one a row.
        values: ``[N, L, H]`` scores of N prompts; NaN where a site has no such head, or nothing was measured.
        about: what it was measured on: model, lens, seed, settings; ``share`` where the scores lie between 0 and 1.
        layers: the layer of each site, by which strategies name heads; rows are counted when not given.
    """

    name: str
    sites: tuple[str, ...]
    values: Array
    about: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Take ``[L, H]`` for one prompt, and refuse other shapes."""
        values = np.asarray(self.values, dtype=float)
        values = values[None] if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[1] != len(self.sites):
            raise UserError(f"{self.name}: values {values.shape} do not fit {len(self.sites)} sites")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "layers", tuple(self.layers) or tuple(range(len(self.sites))))

    @property
    def mean(self) -> Array:
        """Mean over prompts, ``[L, H]``."""
        counted = np.isfinite(self.values).sum(0)
        total = np.nansum(self.values, 0)
        return np.where(counted > 0, total / np.maximum(counted, 1), np.nan)

    def interval(self, seed: int = 0, resamples: int = 2000) -> tuple[Array, Array]:
        """Bounds ``[L, H]`` of the 95 % interval over prompts (bootstrap); infinite with a single prompt.

        Of a share (``about["share"]``) it is widened for few prompts in log odds, and stays within 0 and 1.
        """
        if len(self.values) < 2:
            wide = np.full(self.mean.shape, math.inf)
            return -wide, wide
        picked = np.random.default_rng(seed).integers(0, len(self.values), (resamples, len(self.values)))
        counts = np.stack([np.bincount(row, minlength=len(self.values)) for row in picked]).astype(float)
        known = np.isfinite(self.values)
        total = np.tensordot(counts, np.nan_to_num(self.values), 1)
        means = total / np.maximum(np.tensordot(counts, known.astype(float), 1), 1e-9)
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        widen = math.sqrt(len(self.values) / (len(self.values) - 1))  # a bootstrap of few is too narrow
        if not self.about.get("share"):
            return self.mean + widen * (low - self.mean), self.mean + widen * (high - self.mean)
        middle, low, high = (_log_odds(x) for x in (self.mean, low, high))
        return _share(middle + widen * (low - middle)), _share(middle + widen * (high - middle))

    def top(self, count: int, largest: bool = True) -> list[Head]:
        """The heads with the largest (or smallest) mean, best first; ties in the order of the table."""
        mean = -self.mean if largest else self.mean
        order = np.argsort(np.where(np.isnan(mean), np.inf, mean), axis=None, kind="stable")
        known = int(np.isfinite(mean).sum())
        return [(int(i // mean.shape[1]), int(i % mean.shape[1])) for i in order[: min(count, known)]]

    def names(self, heads: Sequence[Head]) -> tuple[str, ...]:
        """``layer.head`` of each, as the specs of strategies take them."""
        return tuple(f"{self.layers[row]}.{head}" for row, head in heads)

    def ranks(self) -> Array:
        """Rank of each head by its mean, 1 the greatest, ties shared; NaN where there is no score."""
        flat = -self.mean.ravel()
        ranks = np.full(flat.shape, np.nan)
        known = np.flatnonzero(np.isfinite(flat))
        _, group, counts = np.unique(flat[known], return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks[known] = (last - (counts - 1) / 2)[group]
        return ranks.reshape(self.mean.shape)

    def correlation(self, other: HeadTable) -> float:
        """Spearman's rank correlation with ``other`` over the heads that both know; NaN below three of them."""
        self._check_shape(other)
        both = np.isfinite(self.mean) & np.isfinite(other.mean)
        if both.sum() < 3:
            return math.nan
        mine, theirs = (
            HeadTable("", ("",), np.where(both, table.mean, np.nan).reshape(1, -1)).ranks()[0][both.ravel()]
            for table in (self, other)
        )
        if mine.std() == 0 or theirs.std() == 0:
            return math.nan
        return float(np.corrcoef(mine, theirs)[0, 1])

    def overlap(self, other: HeadTable, count: int) -> tuple[int, float]:
        """How many of both tables' ``count`` greatest heads are the same, and the chance of as many or more.

        The chance is that of a hypergeometric draw: ``count`` heads picked blindly.
        """
        self._check_shape(other)
        heads = int((np.isfinite(self.mean) & np.isfinite(other.mean)).sum())
        shared = len(set(self.top(count)) & set(other.top(count)))
        ways = sum(
            math.comb(count, i) * math.comb(heads - count, count - i)
            for i in range(shared, count + 1)
            if count - i <= heads - count
        )
        return shared, ways / math.comb(heads, count)

    def minus(self, other: HeadTable) -> HeadTable:
        """Differences; prompt by prompt where both have as many, of the means otherwise."""
        self._check_shape(other)
        paired = len(self.values) == len(other.values)
        values = self.values - other.values if paired else (self.mean - other.mean)[None]
        about = {**self.about, "share": False, "minus": other.about}
        return HeadTable(f"{self.name}, difference", self.sites, values, about, self.layers)

    def plot(self, path: str | Path) -> Path:
        """Draw the means over layers and heads into a file: its suffix is the format, such as SVG or PNG."""
        from matplotlib.figure import Figure

        mean = self.mean
        signed = bool((mean[np.isfinite(mean)] < 0).any())
        limit = float(np.nanmax(np.abs(mean))) if np.isfinite(mean).any() else 1.0
        figure = Figure(figsize=(2 + 0.3 * mean.shape[1], 1.5 + 0.25 * mean.shape[0]), layout="constrained")
        axes = figure.add_subplot()
        drawn = axes.imshow(mean, cmap="PuOr_r" if signed else "cividis", vmin=-limit if signed else 0, vmax=limit)
        axes.set(xlabel="head", ylabel="layer", title=self.name)
        axes.set_yticks(range(len(self.layers)), [str(layer) for layer in self.layers])
        figure.colorbar(drawn)
        figure.savefig(path)
        return Path(path)

    def _check_shape(self, other: HeadTable) -> None:
        if self.values.shape[1:] != other.values.shape[1:]:
            raise UserError(
                f"{self.name} has {self.values.shape[1:]} layers and heads, {other.name} {other.values.shape[1:]}"
            )

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` takes, fit for ``json.dumps``: NaN becomes null."""
        values = np.where(np.isfinite(self.values), self.values, None).tolist()  # type: ignore[call-overload]
        return {
            "name": self.name, "sites": list(self.sites), "layers": list(self.layers), "values": values,
            "about": self.about,
        }  # fmt: skip

    @staticmethod
    def from_dict(document: dict[str, Any]) -> HeadTable:
        """The table that :meth:`to_dict` made ``document`` of."""
        values = np.array(document["values"], dtype=float)
        return HeadTable(
            document["name"], tuple(document["sites"]), values, document["about"], tuple(document["layers"])
        )


def _log_odds(share: Array) -> Array:
    inside = np.clip(share, 1e-12, 1 - 1e-12)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _share(odds: Array) -> Array:
    """The share of its log odds; the reverse of :func:`_log_odds`."""
    return np.asarray(1 / (1 + np.exp(-odds)))


def listed(table: HeadTable, heads: Sequence[Head], form: str = ".2f") -> str:
    """``layer.head (mean)`` of each, for a sentence; the mean written as ``form`` says."""
    named = zip(table.names(heads), heads, strict=True)
    return ", ".join(f"{name} ({table.mean[head]:{form}})" for name, head in named)


def layer_matched_heads(heads: Sequence[Head], num_heads: int, seed: int, avoid: Sequence[Head] = ()) -> list[Head]:
    """As many heads drawn at random from the same layers: the control of every ablation.

    Args:
        heads: the heads that are ablated.
        num_heads: of a layer.
        seed: of the draw.
        avoid: heads never drawn; they give way where a layer has too few others.

    Returns:
        One head for each of ``heads``, of the same row, none twice.
    """
    source = np.random.default_rng(seed)
    drawn: list[Head] = []
    for row in sorted({row for row, _ in heads}):
        count = sum(row == other for other, _ in heads)
        order = [int(h) for h in source.permutation(num_heads)]
        order.sort(key=lambda h, row=row: (row, h) in set(avoid))  # type: ignore[misc]
        drawn += [(row, h) for h in order[:count]]
    return drawn


@dataclass(frozen=True)
class AblationCurve:
    """The score as more and more heads are ablated, best first, beside random heads of the same layers.

    Attributes:
        counts: heads ablated, ``[C]``.
        heads: as ``layer.head``, in the order of ablation.
        ranked: score with the first ``counts`` of them ablated, ``[C]``.
        control: the same for draws of random heads of the same layers, ``[D, C]``.
    """

    counts: tuple[int, ...]
    heads: tuple[str, ...]
    ranked: Array
    control: Array


def ablation_curve(
    table: HeadTable, counts: Sequence[int], score: Callable[[tuple[str, ...]], float], draws: int = 5, seed: int = 0
) -> AblationCurve:  # fmt: skip
    """Ablate the heads that ``table`` ranks highest, and as a control as many of the same layers at random.

    Args:
        table: the ranking.
        counts: how many heads to ablate; 0 gives the untouched model.
        score: of the model without the heads named ``layer.head``, as the strategy ``ablate`` takes them.
        draws: of the control.
        seed: of the draws.
    """
    order = table.top(max(counts))
    width = table.values.shape[2]
    ranked = np.array([score(table.names(order[:count])) for count in counts])
    control = np.array(
        [
            [
                score(table.names(layer_matched_heads(order[:count], width, seed + draw, avoid=order[:count])))
                for count in counts
            ]
            for draw in range(draws)
        ]
    )
    return AblationCurve(tuple(counts), table.names(order), ranked, control)
