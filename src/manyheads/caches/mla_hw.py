# SPDX-License-Identifier: Apache-2.0
"""Decode models with latent attention (DeepSeek and kin) without expanding their cache.

Geens and Verhelst, "Hardware-Centric Analysis of DeepSeek's Multi-Head Latent Attention", arXiv 2506.02523. MLA caches
one latent and one rotary key per token, ``[B, 1, S, r + dr]``. Transformers expands keys and values of all heads from
all S latents at every step: 2 S r H (dn + dv) FLOPs to attend once. Absorbing ``W_UK`` into the query and ``W_UV`` into
the output instead lets all heads attend to the latents themselves; for DeepSeek-V3 (r 512, dr 64, H 128, dn = dv = 128)
at S = 4096 that is 1.2 GFLOP instead of 138. The result is the same up to rounding, nothing is dropped, and the cache
is as small as the model's own.

Which schedule is cheapest depends on the number of queries and on the hardware: many queries share one expansion, so
above :func:`manyheads.attention.mla.crossover` (171 queries per row for DeepSeek-V3, in FLOPs) ``expand`` wins.
``schedule=auto`` takes what the roofline model of :mod:`manyheads.attention.mla` predicts to be faster.

What the paper calls *reuse* and *recompute* (a merged ``W_UQ^T W_UK``, stored or formed on the fly) acts on the query
latent. Inside an unmodified module the query arrives projected and rotated, so the two cannot be run here; they are in
``manyheads.attention.mla`` with the same cost model. The first forward of a sequence is the model's own in every
schedule: it has just expanded all the tokens that there are. The paper models hardware in simulation and releases no
module; the store, the dispatch and the calibration fields are ours.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..attention import mla, reference
from ..call import AttentionCall, Latent, Site, Store
from ..errors import UserError
from ..strategy import Cache

__all__ = ["LatentStore", "MLAHw"]

_BLOCK = 256  # tokens by which a store grows
_ALIGNED = 16  # tokens, a divisor of it: as many logits fill whole words of a GPU's memory in any dtype


@dataclass(frozen=True, kw_only=True)
class MLAHw(Cache):
    """Attend to latents where that is cheaper than expanding them.

    Attributes:
        schedule: ``absorb`` (after the first forward), ``expand`` (what transformers does), or ``auto``: by the model.
        peak_tflops: TFLOP/s of matrix products in the model's dtype, for ``auto``; by the device's name if not given.
        bandwidth_gbs: GB/s of main memory, likewise.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    schedule: Literal["auto", "absorb", "expand"] = field(
        default="auto", metadata={"help": "auto (by the roofline model), absorb or expand"}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "TFLOP/s of matrix products, for auto; by the device's name when not given"}
    )
    bandwidth_gbs: float | None = field(
        default=None, metadata={"help": "GB/s of main memory, for auto; by the device's name when not given"}
    )

    def __post_init__(self) -> None:
        if self.schedule not in ("auto", "absorb", "expand"):
            raise UserError(f"mla_hw: schedule is auto, absorb or expand, not {self.schedule!r}")
        for name in ("peak_tflops", "bandwidth_gbs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"mla_hw: {name} is a positive number, not {value}")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal and site.latent is not None and site.window is None

    def store(self, site: Site) -> "LatentStore":
        return LatentStore(self, site)

    def platform(self, device: torch.device, itemsize: int) -> mla.Platform:
        """The hardware that ``auto`` reckons with, for elements of ``itemsize`` bytes.

        Raises:
            UserError: the device is not known, and its two figures are not given.
        """
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = None if self.peak_tflops is None else self.peak_tflops * 1e12
        bandwidth = None if self.bandwidth_gbs is None else self.bandwidth_gbs * 1e9
        if peak and bandwidth and device.type != "cpu":
            return mla.Platform(peak, bandwidth, overhead=3e-6)
        known = mla.platform_of(name, itemsize)
        return replace(known, peak_flops=peak or known.peak_flops, bandwidth=bandwidth or known.bandwidth)


class LatentStore(Store):
    """Latents and rotary keys of one layer, side by side in one tensor ``[B, 1, C, r + dr]``; room to grow is zero.

    ``append`` hands back the new tokens only, so the module expands no more than those; :meth:`attend` answers for all.
    Where it may not (another strategy acts at the site, sinks, dropout) or the schedule says ``expand``, :meth:`mask`
    gives the call keys and values of all tokens. The mask of a forward covers all columns, so padding needs no record.
    """

    computes: ClassVar[bool] = True

    def __init__(self, strategy: MLAHw, site: Site) -> None:
        assert site.latent is not None
        super().__init__(site)
        self.strategy = strategy
        self.latent: Latent = site.latent
        self.dims = mla.Dims(
            self.latent.num_heads, self.latent.rank, self.latent.nope_dim, self.latent.rope_dim, self.latent.v_dim
        )
        self._platform: mla.Platform | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._held: Tensor | None = None
        self._seen = 0

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def rows(self) -> int | None:
        return None if self._held is None else self._held.shape[0]

    @property
    def keys(self) -> Tensor | None:
        """Latents ``[B, 1, S, r]``."""
        return None if self._held is None else self._held[:, :, : self.seen, : self.dims.rank]

    @property
    def values(self) -> Tensor | None:
        """Rotary keys ``[B, 1, S, dr]``."""
        return None if self._held is None else self._held[:, :, : self.seen, self.dims.rank :]

    @property
    def held(self) -> list[Tensor | None]:
        return [self._held]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next T tokens, latents ``[B, 1, T, r]`` and rotary keys ``[B, 1, T, dr]``; return just these."""
        if k.shape[1] != 1 or (k.shape[3], v.shape[3]) != (self.dims.rank, self.dims.rope_dim):
            raise UserError(
                f"mla_hw: {self.site.name} caches tensors of shape {tuple(k.shape)} and {tuple(v.shape)}, not latents "
                f"of {self.dims.rank} and {self.dims.rope_dim} channels; this version of the model cannot be absorbed"
            )
        end = self.seen + k.shape[2]
        if self._held is None or end > self._held.shape[2]:
            larger = k.new_zeros(k.shape[0], 1, -(-end // _BLOCK) * _BLOCK, k.shape[3] + v.shape[3])
            if self._held is not None:
                larger[:, :, : self.seen] = self._held[:, :, : self.seen]
            self._held = larger
        self._held[:, :, self.seen : end, : self.dims.rank] = k
        self._held[:, :, self.seen : end, self.dims.rank :] = v
        self._seen = end
        return k, v

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Attention over all tokens in latent space ``[B, T, H, dv]``; None where the model's own is to run."""
        new = call.q.shape[2]
        if new == self.seen or call.softcap is not None or call.sinks is not None or call.dropout:
            return None
        if self._schedule(call) == "expand":
            return None
        return mla.absorb(
            call.q, self._all(_ALIGNED), _up(self.latent, call.q), self.dims, scale=call.scale, mask=self._mask(call),
            bias=call.bias, seen=self.seen,
        )  # fmt: skip

    def mask(self, call: AttentionCall) -> AttentionCall:
        """Give the call keys and values of all tokens, where it has those of the new ones only."""
        if call.k.shape[2] == self.seen:
            return call
        k, v = mla.keys_values(self._all(1), _up(self.latent, call.q), self.dims)
        return call.replace(k=k, v=v, mask=self._mask(call), is_causal=False)

    def evict(self, call: AttentionCall) -> None:
        """Nothing is dropped."""

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows ``[B']``."""
        if self._held is not None:
            self._held = self._held[rows.to(self._held.device)]

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self._seen = max(0, self._seen - count)
        if self._held is not None:
            self._held[:, :, self.seen :] = 0

    def state_dict(self) -> dict[str, Any]:
        return {"held": self._held, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._held, self._seen = state["held"], state["seen"]

    def _all(self, multiple: int) -> Tensor:
        """All tokens, and zeros after them up to a multiple."""
        if self._held is None:
            raise RuntimeError(f"{self.site.name}: attention ran before its cache was written")
        return self._held[:, :, : -(-self.seen // multiple) * multiple]

    def _mask(self, call: AttentionCall) -> Tensor | None:
        """The call's mask over all tokens, causality included."""
        if not call.is_causal:
            return call.mask
        causal = reference.causal_mask(call.q.shape[2], self.seen, call.q.device)[None, None]
        return causal if call.mask is None else call.mask & causal

    def _schedule(self, call: AttentionCall) -> mla.Schedule:
        if self.strategy.schedule != "auto":
            return self.strategy.schedule
        batch, _, new, _ = call.q.shape
        itemsize = call.q.element_size()
        if self._platform is None:
            self._platform = self.strategy.platform(call.q.device, itemsize)
        about = 1 << (self.seen - 1).bit_length()  # a power of two, so that the choice is looked up and not reckoned
        return mla.choose(self.dims, batch, new, about, self._platform, itemsize)


def _up(latent: Latent, q: Tensor) -> Tensor:
    """The up-projection per head, ``[H, dn + dv, r]``."""
    up: Tensor = latent.weight().to(q.dtype).unflatten(0, (latent.num_heads, -1))
    return up
