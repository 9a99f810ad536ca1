# SPDX-License-Identifier: Apache-2.0
"""How peaked attention is: logits of a few rows of every site of a model, and what they say at a temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ...attention import reference
from ...call import AttentionCall, Site
from ...strategy import AttentionEdit
from .._mixer import SoftmaxMixer, positions_of

if TYPE_CHECKING:
    from . import AttentionAlignment

__all__ = ["LogitRecorder", "Peak", "keys_seen", "peakedness", "real", "softmax_sites", "variance"]

Peak = Literal["entropy", "pmax"]


def real(bias: Tensor) -> Tensor:
    """Where additive logits are a bias and not a mask."""
    return bias > torch.finfo(bias.dtype).min / 4


def _visible(call: AttentionCall) -> Tensor | None:
    """All that masks ``call``, a float mask that stands in its bias too: broadcastable to ``[B, H, T, S]``."""
    allowed = call.allowed()
    if call.bias is None:
        return allowed
    return real(call.bias) if allowed is None else allowed & real(call.bias)


def keys_seen(call: AttentionCall) -> Tensor:
    """How many keys each row may attend to, ``[B or 1, H or 1, T or 1]``."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    if call.is_causal and call.mask is None and call.bias is None:  # needs no mask of all pairs
        return torch.arange(keys - queries + 1, keys + 1, device=call.q.device)[None, None]
    allowed = _visible(call)
    if allowed is None:
        return torch.full((1, 1, 1), keys, device=call.q.device)
    return allowed.expand(*allowed.shape[:-1], keys).sum(-1)


def softmax_sites(model: nn.Module) -> Sequence[tuple[Site, SoftmaxMixer]]:
    """The softmax mixers of a Decoder."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, SoftmaxMixer)]
    return [
        (Site(name, i, m.config.layer, "self", True, m.config.num_heads, m.config.num_kv_heads, m.spec.window), m)
        for i, (name, m) in enumerate(found)
    ]


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

        def taken(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[-2] == 1 else x[..., rows, :]

        few = call.replace(q=call.q[:, :, rows], mask=taken(call.mask), bias=taken(call.bias))
        x = reference.logits(few.q.float(), few.k.float(), scale=few.scale, bias=few.bias)
        if (allowed := _visible(few)) is not None:
            x = x.masked_fill(~allowed, -torch.inf)
        self.found[call.site.index] = x, keys_seen(few)
        return self.inner.edit(call)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """The same on a Decoder: its softmax mixers have no port, so their input is read."""

        def read(site: Site, mixer: SoftmaxMixer, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            at = positions_of(x.shape[0], x.shape[1], x.device, None, None, None)
            q, k = mixer.queries_and_keys(x, at, at.amax(1) + 1)
            mask = mixer.spec.dense(x.shape[1], x.shape[1], device=x.device)
            self.edit(AttentionCall(site, q, k, k, mixer.scale, mask=mask, bias=mixer.bias(at, at)))

        with ExitStack() as stack:
            for site, mixer in softmax_sites(model):
                if self.selects(site):
                    stack.enter_context(mixer.register_forward_pre_hook(partial(read, site)))
            yield stack.enter_context(self.inner.on(model))


def peakedness(x: Tensor, tau: Tensor, kind: Peak) -> Tensor:
    """Mean over rows of the entropy (nats) or of the largest weight of ``x [B, H, R, S] / tau``: ``[H]``."""
    p = (x.double() / tau[..., None]).softmax(-1)
    return (p.amax(-1) if kind == "pmax" else torch.special.entr(p).sum(-1)).mean((0, 2))


def variance(x: Tensor) -> Tensor:
    """Variance of the logits of a row, mean over rows: ``[B, H, R, S] -> [H]``."""
    seen = x.double().masked_fill(x == -torch.inf, torch.nan)
    return (seen - seen.nanmean(-1, keepdim=True)).square().nanmean(-1).mean((0, 2))
