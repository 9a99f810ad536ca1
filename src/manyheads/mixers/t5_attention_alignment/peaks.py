# SPDX-License-Identifier: Apache-2.0
"""How peaked attention is: logits of a few rows of every site of a model, and what they say at a temperature."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...attention import reference
from ...call import AttentionCall, Site
from ...strategy import AttentionEdit
from .._mixer import SoftmaxMixer, positions_of, split_heads

__all__ = ["Peak", "LogitRecorder", "keys_seen", "peakedness", "real", "softmax_sites", "variance"]

Peak = Literal["entropy", "pmax"]


def real(bias: Tensor) -> Tensor:
    """Where additive logits are a bias and not a mask."""
    return bias > torch.finfo(bias.dtype).min / 4


def keys_seen(call: AttentionCall) -> Tensor:
    """How many keys each row may attend to, ``[B or 1, H or 1, T or 1]``."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    allowed = call.mask
    if call.bias is not None:  # a float mask may stand in it
        allowed = real(call.bias) if allowed is None else allowed & real(call.bias)
    if call.is_causal and allowed is not None:
        allowed = allowed & reference.causal_mask(queries, keys, call.q.device)
    if allowed is not None:
        return allowed.expand(*allowed.shape[:-1], keys).sum(-1)
    if call.is_causal:
        return torch.arange(keys - queries + 1, keys + 1, device=call.q.device)[None, None]
    return torch.full((1, 1, 1), keys, device=call.q.device)


def softmax_sites(model: nn.Module) -> Sequence[tuple[Site, SoftmaxMixer]]:
    """The mixers of a Decoder that take a temperature."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, SoftmaxMixer) and hasattr(m, "temperature")]
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

    inner: Any
    rows: int
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        chosen: bool = self.inner.selects(site)
        return chosen

    def edit(self, call: AttentionCall) -> AttentionCall:
        queries, keys = call.q.shape[2], call.k.shape[2]
        count = min(self.rows, queries)
        if call.site.causal or call.is_causal:  # those that see the most
            rows = torch.arange(queries - count, queries, device=call.q.device)
        else:
            rows = torch.linspace(0, queries - 1, count, device=call.q.device).round().long()

        def taken(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[-2] == 1 else x[..., rows, :]

        bias, mask = taken(call.bias), taken(call.mask)
        x = reference.logits(call.q[:, :, rows].float(), call.k.float(), scale=call.scale, bias=bias)
        if bias is not None:
            x = x.masked_fill(~real(bias), -torch.inf)
        if mask is not None:
            x = x.masked_fill(~mask, -torch.inf)
        if call.is_causal:
            late = torch.arange(keys, device=x.device) > (keys - queries + rows)[:, None]
            x = x.masked_fill(late, -torch.inf)
        seen = keys_seen(call)
        self.found[call.site.index] = x, seen if seen.shape[-1] == 1 else seen[..., rows]
        edited: AttentionCall = self.inner.edit(call)
        return edited

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[nn.Module]:
        """The same on a Decoder: its softmax mixers have no port, so their input is read."""

        def read(site: Site, mixer: Any, args: tuple[Tensor, ...]) -> None:
            x, was = args[0], mixer.temperature
            mixer.temperature = None
            at = positions_of(x.shape[0], x.shape[1], x.device, None, None, None)
            q = mixer.transform_q(split_heads(mixer.q_proj(x), mixer.config.num_heads), at, at.amax(1) + 1)
            k = mixer.transform_k(split_heads(mixer.k_proj(x), mixer.config.num_kv_heads), at, at.amax(1) + 1)
            mask = mixer.spec.dense(x.shape[1], x.shape[1], device=x.device)
            self.edit(AttentionCall(site, q, k, k, mixer.scale, mask=mask, bias=mixer.bias(at, at)))
            mixer.temperature = was

        hooks = [
            mixer.register_forward_pre_hook(partial(read, site))
            for site, mixer in softmax_sites(model)
            if self.selects(site)
        ]
        try:
            with self.inner.on(model):
                yield model
        finally:
            for hook in hooks:
                hook.remove()


def peakedness(x: Tensor, tau: Tensor, kind: Peak) -> Tensor:
    """Mean over rows of the entropy (nats) or of the largest weight of ``x [B, H, R, S] / tau``: ``[H]``."""
    scaled = x.double() / tau[..., None]
    log_p = scaled.log_softmax(-1)
    if kind == "pmax":
        return log_p.amax(-1).exp().mean((0, 2))
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1).mean((0, 2))


def variance(x: Tensor) -> Tensor:
    """Variance of the logits of a row, mean over rows: ``[B, H, R, S] -> [H]``."""
    seen = x > -torch.inf
    count = seen.sum(-1).clamp(min=1)
    mean = torch.where(seen, x, 0.0).double().sum(-1) / count
    square = torch.where(seen, x - mean[..., None], 0.0).square().sum(-1) / count
    return square.mean((0, 2))
