# SPDX-License-Identifier: Apache-2.0
"""Statistics of attention from their formulas, in float64 over a whole map, and what the kernels say of the same."""

from dataclasses import dataclass

import torch
from torch import Tensor

import manyheads
import tolerance
from kernels.cases import poisoned
from manyheads.calls.statistics import (
    Band,
    Columns,
    ColumnSum,
    Distance,
    Entropy,
    LogPowerSum,
    MeanLogWeight,
    Peak,
    Pooled,
    Statistic,
    WeightedSum,
)

KINDS = ("causal", "left", "right", "window", "all", "none")


@dataclass
class Case:
    """A call, and what is asked of its weights; all on the CPU, so that the float64 truth is cheap to have."""

    q: Tensor
    k: Tensor
    features: Tensor
    weight: Tensor
    profile: Tensor
    counted: Tensor
    kind: str
    spread: float = 1.0
    cells: int = 3

    @property
    def scale(self) -> float:
        return self.spread * self.q.shape[3] ** -0.5

    def spans(self) -> tuple[Tensor, Tensor] | None:
        """First and end of what each query sees, ``[B, T]``; None for causal."""
        batch, length, size = self.q.shape[0], self.q.shape[2], self.k.shape[2]
        own = (torch.arange(length) + size - length + 1).clamp(min=0).expand(batch, -1)
        zero, row = torch.zeros_like(own), torch.arange(batch)[:, None]
        made = {
            "left": (torch.minimum(zero + 7 * (row + 1), own), own),
            "right": (zero, torch.minimum(own, zero + size - 9 * row)),
            "window": ((own - 20).clamp(min=0), own),
            "all": (zero, zero + size),
            "none": (zero, own * (torch.arange(length) % 3 != 1)),
        }
        return made.get(self.kind)

    def mask(self) -> Tensor:
        """``[B, 1, T, S]``."""
        length, size = self.q.shape[2], self.k.shape[2]
        spans = self.spans()
        column = torch.arange(size)
        if spans is None:
            return (column <= torch.arange(length)[:, None] + size - length)[None, None]
        return ((column >= spans[0][..., None]) & (column < spans[1][..., None]))[:, None]

    def call(self, device: str = "cpu") -> "manyheads.AttentionCall":
        site = manyheads.Site("x", 0, 0, "self", True)
        mask = None if self.kind in ("causal", "all") else self.mask().to(device)
        q, k = self.q.to(device), self.k.to(device)
        return manyheads.AttentionCall(site, q, k, k, scale=self.scale, mask=mask, is_causal=self.kind == "causal")

    def statistics(self) -> dict[str, Statistic]:
        """The same as :meth:`truth`, fresh."""
        return {
            "entropy": Entropy(), "found": WeightedSum(self.features), "received": ColumnSum(self.weight),
            "band": Band(self.profile, self.counted), "pooled": Pooled(self.cells), "columns": Columns(self.index()),
            "distance": Distance(), "log": MeanLogWeight(self.sets()), "powers": LogPowerSum((2.0, 3.0)),
            "peak": Peak(),
        }  # fmt: skip

    def index(self) -> Tensor:
        return torch.arange(0, self.k.shape[2], 3)

    def sets(self) -> Tensor:
        """Of keys: the first, and every second of the others."""
        column = torch.arange(self.k.shape[2])
        return torch.stack([column == 0, column % 2 == 1], -1)[None]

    def logits_at(self, column: Tensor) -> Tensor:
        """The float64 logits in columns ``[B, H, T]``, -inf at -1: of two that nearly tie either may be named."""
        keys = self.k.double().repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        index = column.long().clamp(min=0)[..., None].expand(*column.shape, keys.shape[3])
        found = (self.q.double() * keys.gather(2, index)).sum(-1) * self.scale
        return found.masked_fill(column < 0, -torch.inf)

    def truth(self, shift: int = 0) -> dict[str, Tensor]:
        """From the map in float64; ``shift`` moves the keys along, for a wrong variant."""
        heads, length, size = self.q.shape[1], self.q.shape[2], self.k.shape[2]
        keys = self.k.double().roll(shift, 2).repeat_interleave(heads // self.k.shape[1], 1)
        x = torch.einsum("bhtd,bhsd->bhts", self.q.double(), keys) * self.scale
        x = x.masked_fill(~self.mask(), -torch.inf)
        lse = x.logsumexp(-1)
        a = (x - lse[..., None]).exp().nan_to_num()
        back = torch.arange(length)[:, None] + size - length - torch.arange(size)
        width = len(self.profile)
        near = torch.where((back >= 0) & (back < width), self.profile.double()[back.clamp(0, width - 1)], 0.0) * a
        both = [self.mask() & chosen for chosen in self.sets()[0].T]
        logs = [torch.where(m, x - lse[..., None], 0.0).sum(-1) / m.sum(-1) for m in both]
        high, wide = -(-length // self.cells), -(-size // self.cells)
        rows, columns = torch.arange(length) // high, torch.arange(size) // wide
        cells = a.new_zeros(*a.shape[:2], int(rows[-1]) + 1, size).index_add_(2, rows, a)
        cells = a.new_zeros(*cells.shape[:3], int(columns[-1]) + 1).index_add_(3, columns, cells)
        return {
            "lse": lse, "entropy": torch.special.entr(a).sum(-1), "found": a @ self.features[:, None].double(),
            "received": a.transpose(-1, -2) @ self.weight[:, None].double(), "band_rows": near.sum(-1),
            "band_columns": (near * self.counted[:, None, :, None]).sum(2), "pooled": cells / (high * wide),
            "columns": a[..., self.index()], "distance": (a * back).sum(-1), "log": torch.stack(logs, -1),
            "powers": torch.stack([a.pow(power).sum(-1).log() for power in (2, 3)], -1), "peak": x.amax(-1),
            "column": x.amax(-1),
        }  # fmt: skip

    def kernels(self, device: str = "cpu") -> dict[str, Tensor]:
        """What the kernels say, on uninitialised memory full of NaN."""
        from manyheads.kernels import probe

        q, k, given = self.q.to(device), self.k.to(device), self.spans()
        spans = None if given is None else (given[0].to(device), given[1].to(device))
        about = {"scale": self.scale, "spans": spans}
        rows = poisoned(
            probe.row_statistics, q, k, features=self.features.to(device), distance=True, peak=True, **about
        )
        lse, entropy, distance, found, peak, column = rows  # type: ignore[misc]
        received = poisoned(probe.column_sum, q, k, lse, self.weight.to(device), **about)
        near = poisoned(probe.band, q, k, lse, self.profile, queries=self.counted.to(device), **about)
        made = {
            "lse": lse, "entropy": entropy, "distance": distance, "found": found, "received": received,
            "band_rows": near[0], "band_columns": near[1], "peak": peak,
            "pooled": poisoned(probe.pool, q, k, lse, self.cells, **about),
        }  # fmt: skip
        assert all(x.dtype == torch.float32 for x in made.values())
        made["column"] = self.logits_at(column.cpu())
        return {name: x.cpu() for name, x in made.items()}


def build(
    dtype: torch.dtype, length: int, size: int, group: int, dim: int, kind: str = "causal", features: int = 3,
    rows: int = 1, width: int = 10, spread: float = 1.0, batch: int = 2,
) -> Case:  # fmt: skip
    """Queries in memory as a model lays them, not heads first. The features are an indicator, positions and noise."""
    q = torch.randn(batch, length, 2 * group, dim).to(dtype).transpose(1, 2)
    k = torch.randn(batch, 2, size, dim).to(dtype)
    made = torch.randn(batch, size, features)
    made[..., 0] = torch.arange(size) == 0
    made[..., 1:2] = torch.arange(size)[:, None].float() + 100_000
    weight = torch.rand(1, length, rows) * 30
    counted = torch.rand(batch, length) > 0.4
    return Case(q, k, made, weight, torch.arange(width, 0, -1).float(), counted, kind, spread)


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors; each feature and each row weight counts for itself, as they differ in size."""
    made = {}
    for name, x in got.items():
        apart = name in ("found", "received", "log")
        pairs = zip(x.unbind(-1), want[name].unbind(-1), strict=True) if apart else [(x, want[name])]
        made[name] = max(tolerance.error(a, b) for a, b in pairs)
    return made


def flat(case: Case, found: list[object]) -> dict[str, Tensor]:
    """Answers of ``measure`` in the order of ``statistics``, by the names of ``truth``."""
    made = dict(zip(case.statistics(), found, strict=True))
    rows, columns = made.pop("band")  # type: ignore[misc]
    peak, column = made.pop("peak")  # type: ignore[misc]
    at = case.logits_at(column.cpu())  # type: ignore[attr-defined]
    return {**made, "band_rows": rows, "band_columns": columns, "peak": peak, "column": at}  # type: ignore[dict-item]
