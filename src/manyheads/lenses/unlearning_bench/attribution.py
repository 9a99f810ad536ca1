# SPDX-License-Identifier: Apache-2.0
"""Heads that answers hang on, by the gradient of a loss in a gate on every head's output.

    importance = mean over batches of |d L / d g| at g = 1, of g z        (Michel et al., 1905.10650)

Heads to unlearn in are those whose importance to what is to be forgotten exceeds that to what is kept by most, both as
shares of their sum over all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...call import AttentionCall, Site
from ...calls.edits import scale_heads
from ...heads import HeadTable
from ...lens import table_of
from ...strategy import AttentionPatch

__all__ = ["importance", "more_important"]


@dataclass(frozen=True, kw_only=True)
class _Gates(AttentionPatch):
    """A gate of 1 on the output of every head, with a gradient."""

    gates: dict[str, Tensor] = field(default_factory=dict, compare=False)
    sites: dict[str, Site] = field(default_factory=dict, compare=False)

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        name = call.site.name
        if name not in self.gates:
            self.sites[name] = call.site
            self.gates[name] = torch.ones(out.shape[2], device=out.device, requires_grad=True)
        return scale_heads(out, self.gates[name])


def importance(
    model: nn.Module, use: Callable[..., Any], losses: Iterable[Callable[[], Tensor]], name: str
) -> HeadTable:
    """Importance of each head of ``model`` to losses, ``[batches, L, H]``; no weight gets a gradient.

    Args:
        model: that ``use`` enters: of a vision-language model the decoder.
        use: :func:`manyheads.use`.
        losses: each reads a batch and gives a scalar.
        name: of the table.
    """
    rows: dict[str, list[Tensor]] = {}
    gates = _Gates()
    with use(model, gates), torch.enable_grad():
        for loss in losses:
            gates.gates.clear()
            found = torch.autograd.grad(loss(), list(gates.gates.values()))
            for site, slope in zip(gates.gates, found, strict=True):
                rows.setdefault(site, []).append(slope.detach().abs().double().cpu())
    sites = list(gates.sites.values())
    made = [torch.stack(rows[site.name]).numpy() for site in sites]
    return table_of(name, sites, made, prompts=len(made[0]), tokens=0)


def more_important(forget: HeadTable, retain: HeadTable) -> HeadTable:
    """The difference of the shares of two tables' importance, ``[1, L, H]``."""
    shares = [table.mean / table.mean.sum() for table in (forget, retain)]
    return HeadTable("more important to what is forgotten", forget.sites, (shares[0] - shares[1])[None], forget.about,
                     forget.layers)  # fmt: skip
