# SPDX-License-Identifier: Apache-2.0
"""Our own lenses, beside those of the papers: where the mass of every head goes, its map, and the norm of its output.

Private to the verbs ``inspect`` and ``doctor``. Shapes as in :mod:`manyheads.calls.statistics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import Site
from ..calls.statistics import Entropy, Pooled, Rows, Statistic
from ..lens import AttentionView, Lens, LensResult, Memory, table
from ..strategy import Residual

__all__ = ["FAR", "FIRST", "NEAR", "AttentionBreakdown", "HeadOutputNorm", "Parts"]

FIRST, SELF, PREVIOUS, NEAR, FAR = "first token", "itself", "previous token", "2 to 16 back", "farther"
_REACH = 17  # distances that are near: 0 to 16


@dataclass
class Parts(Rows):
    """How the mass of each row is shared: named columns, then by distance over all others, ``[B, H, T, F + 4]``.

    Attributes:
        columns: ``[B, S, F]`` indicators, disjoint; the distances count columns with none of them: the token itself,
            the one before, 2 to 16 back, farther.
    """

    columns: Tensor

    def update(self, rows: Tensor, start: int, length: int) -> None:
        size = rows.shape[3]
        named = rows @ self.columns[:, None].to(rows.dtype)
        free = rows * (1 - self.columns.sum(-1))[:, None, None].to(rows.dtype)
        at = size - length + start + torch.arange(rows.shape[2], device=rows.device)
        index = at[:, None] - torch.arange(_REACH, device=rows.device)  # [t, W] columns by distance
        band = free.gather(3, index.clamp(min=0).expand(*rows.shape[:2], -1, -1)) * (index >= 0)
        near = torch.stack([band[..., 0], band[..., 1], band[..., 2:].sum(-1)], -1)
        far = free.sum(-1, keepdim=True) - near.sum(-1, keepdim=True)
        self.put(torch.cat([named, near, far.clamp(min=0)], -1), start, length)


@dataclass(frozen=True, kw_only=True)
class AttentionBreakdown(Lens):
    """Share of the mass by part, entropy, and pooled maps.

    Attributes:
        size: cells of a map on a side at most; 0 for none.
        roles: whose columns are parts of their own.
    """

    size: int = field(default=256, metadata={"help": "cells of a map on a side at most; 0 for none"})
    roles: tuple[str, ...] = field(default=(), metadata={"help": "roles whose columns are parts of their own"})

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts, in the order of :class:`Parts`."""
        return (FIRST, *self.roles, SELF, PREVIOUS, NEAR, FAR)

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        taken = view.first()
        columns = [taken]
        for role in self.roles:
            mine = view.columns(role) & ~taken
            columns.append(mine)
            taken = taken | mine
        asked: dict[str, Statistic] = {"parts": Parts(torch.stack(columns, -1).float()), "entropy": Entropy()}
        return asked | ({"map": Pooled(self.size)} if self.size else {})

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        rows = view.rows("response") if view.roles.spans else view.valid
        length, count = view.valid.shape[1], view.keys.long().cumsum(1)
        place = count[:, -length:] if view.call.site.causal else count[:, -1:].expand(-1, length)  # tokens to look at
        rows = (rows & (place > 1))[:, None]  # the first token attends to itself: no choice, no row
        for i, name in enumerate(self.parts):
            view.add_mean(name, found["parts"][..., i], rows)
        view.add_mean("entropy", found["entropy"] / place.clamp(min=2)[:, None].log(), rows)
        if "map" in found:
            self._add_map(view.memory, found["map"].sum(0).cpu(), len(found["map"]))

    @staticmethod
    def _add_map(memory: Memory, pooled: Tensor, count: int) -> None:
        """Prompts of another length than the first make a map of another shape and are left out."""
        total, n = memory.get("map", (torch.zeros_like(pooled), 0))
        if total.shape == pooled.shape:
            memory["map"] = (total + pooled, n + count)

    def named(self, sites: Sequence[tuple[Site, Memory]]) -> tuple[str, ...]:
        """Names of the parts at ``sites``."""
        return self.parts

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        tables = {name: table(f"mass on {name}", sites, name, share=True) for name in self.named(sites)}
        tables["entropy"] = table("entropy of the weights, 1 where they are even", sites, "entropy", share=True)
        maps = {
            (row, head): (memory["map"][0][head] / memory["map"][1]).numpy()
            for row, (_, memory) in enumerate(sites)
            if "map" in memory
            for head in range(memory["map"][0].shape[0])
        }
        ahead = any(not site.causal and site.kind == "self" for site, _ in sites)
        return LensResult(tables=tables, maps=maps, notes=[f"Tokens ahead count as {FAR}."] if ahead else [])


@dataclass(frozen=True, kw_only=True)
class HeadOutputNorm(Lens, Residual):
    """How much each head adds to the residual stream, and whether NaN or infinity is among the numbers."""

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        memory, valid = view.memory, view.valid
        out = view.out.float() * valid[..., None, None]
        gram = memory["gram"] if "gram" in memory else self._gram(view)
        if gram is not None:
            written = torch.einsum("bthv,hvw,bthw->bth", out, gram, out).clamp(min=0).sqrt()
        else:
            written = out.norm(dim=-1)
        memory["gram"] = gram
        view.add_mean("written", written.nan_to_num(0, 0, 0).transpose(1, 2), valid[:, None])
        bad = (~torch.isfinite(view.out)).flatten(2).any(-1) & valid
        memory["outputs"] = memory.get("outputs", 0) + int(bad.sum())

    @staticmethod
    def _gram(view: AttentionView) -> Tensor | None:
        """Products ``[H, dv, dv]`` of the columns of each head in the output projection; None where it is not known."""
        output, heads = view.call.site.output, view.out.shape[2:]
        weight = None if output is None else output().detach().float()
        if weight is None or weight.shape[1] != heads[0] * heads[1]:
            return None
        square = weight.unflatten(1, heads)  # [D, H, dv]
        return torch.einsum("dhv,dhw->hvw", square, square)

    def residual(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        memory["hidden"] = memory.get("hidden", 0) + int((~torch.isfinite(hidden.detach())).any(-1).sum())
        return hidden

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        bad = [{"site": site.name, "outputs": m["outputs"], "hidden": m.get("hidden", 0)} for site, m in sites]
        tables = {"written": table("norm of what a head adds to the stream", sites, "written")}
        blind = [site.name for site, m in sites if m.get("gram") is None]
        notes = [
            f"The output projection of {name} is not known: norms are of its heads' outputs." for name in blind[:1]
        ]
        return LensResult(tables=tables, records={"tokens with NaN or infinity": bad}, notes=notes)
