# SPDX-License-Identifier: Apache-2.0
"""Gates while they are trained: attention in which a flag is a factor that a gradient passes through.

The exponential of a logit of key j is multiplied by its flag f_j, for every query but j's own. Straight-through: f is
the flag going forward and p going backward (df = dp); ``sigmoid`` takes p both ways. The loss of the text pulls what it
needs above the threshold, and

    eviction loss = sum over layers of | mean f - target |

pulls what is kept to the target. (Printed without the absolute value, the target would have no part in any gradient; a
hinge, max(0, mean f - target), is the other reading, ``hinge``.) The paper takes the mean of p. That can be had
(``counts="probability"``), but all p may then settle at the target, below the threshold, where nothing is kept: they
did on SmolLM2-135M, within ten steps. So by default the straight-through flags are counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...attention import reference
from ...call import AttentionCall, Site
from ...errors import UserError
from ...strategy import AttentionEdit
from .gates import Gates

__all__ = ["Counts", "Relaxation", "SoftGates", "eviction_loss"]

Counts = Literal["flags", "probability"]
Relaxation = Literal["straight_through", "sigmoid"]

FLOOR = 1e-12  # of a factor: its logarithm stays finite, and the gradient reaches what is dropped


@dataclass(frozen=True, kw_only=True)
class SoftGates(AttentionEdit):
    """Attention under gates that are being trained; whole texts, without a cache.

    Attributes:
        trained: the gates.
        threshold: of a flag.
        relaxation: what the factor is going forward, the flag (``straight_through``) or the probability (``sigmoid``).
        counts: what the eviction loss takes the mean of: the factors f (``flags``) or p (``probability``).
        counted, probabilities: by layer, of the latest forward: what is counted, and p, ``[B, Hkv, T]``.
    """

    trained: Gates = field(compare=False)
    threshold: float = 0.5
    relaxation: Relaxation = "straight_through"
    counts: Counts = "flags"
    counted: dict[int, Tensor] = field(default_factory=dict, compare=False)
    probabilities: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal and site.layer in self.trained.kv_heads

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Add the logarithm of the factors to the logits, but on the diagonal."""
        size, layer = call.k.shape[2], call.site.layer
        assert layer is not None
        if call.hidden is None or call.q.shape[2] != size:
            raise UserError(
                f"gates are trained on whole texts, without a cache: call {call.site.name} with use_cache=False"
            )
        real = None
        if call.mask is not None:  # a token that no query sees is padding
            real = call.mask.any(2).any(1).expand(call.q.shape[0], -1)
        p = reference.widened(self.trained.gate(layer)(call.hidden, real)).sigmoid()
        positions = torch.arange(size, device=p.device) if real is None else (real.long().cumsum(1) - 1)[:, None]
        p = p.masked_fill(positions < self.trained.sinks, 1.0)
        factor = p
        if self.relaxation == "straight_through":
            factor = (p > self.threshold).to(p.dtype) + (p - p.detach())
        self.probabilities[layer] = p
        self.counted[layer] = factor if self.counts == "flags" else p
        logs = (FLOOR + (1 - FLOOR) * factor).log()
        own = torch.eye(size, dtype=torch.bool, device=p.device)
        bias = reference.repeat_kv(logs[:, :, None], call.q.shape[1]).masked_fill(own, 0.0).to(call.q.dtype)
        return call.replace(bias=bias if call.bias is None else call.bias + bias)


def eviction_loss(counted: Iterable[Tensor], target: float, hinge: bool = False) -> Tensor:
    """Sum over layers of the distance of their mean ``[B, Hkv, T]`` from ``target``, or of what is above: scalar."""
    apart = torch.stack([x.mean() - target for x in counted])
    return (apart.clamp(min=0) if hinge else apart.abs()).sum()
