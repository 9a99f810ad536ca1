# SPDX-License-Identifier: Apache-2.0
"""Store old tokens in 4 bits, after making the channels of a key alike so that 4 bits are enough.

Oh et al., "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration", arXiv 2505.20839;
of that paper the cache. :mod:`.linear` has its linear layers: ``use(model, "fireq.linear", "fireq")`` is both. Keys and
values are stored as INT4 with one scale per token and head. A few channels of a key are much
larger than the others, the same ones in every token: they set the scale, and the other channels round to zero.
So every channel of a key is multiplied by a factor first and the query is divided by it, which leaves q k unchanged:

    pre:  s_i = s_{i+d/2} = alpha / max_t sqrt(k_{t,i}^2 + k_{t,i+d/2}^2)     per key/value head and rotary pair
    post: s_i = beta / max_t |k_{t,i}|     for the top_k channels of largest max_t |k_{t,i}| and for their partners

where k are the keys of head dimension d. A rotation changes neither the norm of a pair nor a factor that both share:
the pre factors commute with rotary positions, and a maximum over few positions holds for all. ``both`` is the paper's
scheme: post factors for the outlying pairs, pre factors for the others.

Differences. The paper folds the pre factors into W_k and W_q, found on 10 texts of 2,048 tokens; here the cache
multiplies rotated keys and the attention divides queries, which is the same number, the model stays as it is, and the
factors come from the first forward of each sequence itself (the prompt, or its first chunk) and are fixed from then on.
What alpha and beta have in common drops out in the scale of the token. A channel counts as at least 1/1000 of the
largest of its head, so that one silent in the prompt cannot drown the others when it speaks (ours). The last
``window_tokens`` tokens stay in the model's dtype, where factors on keys and queries cost a rounding, and each token is
quantised once, when it leaves them (ours; the paper quantises at once). Codes are -7..7 as absmax / 7 gives them; the
scale is rounded to bfloat16 before the codes are made (the released code: after). Queries stay in the model's dtype:
the paper's FP8 queries serve its prefill kernel, which is not built here.

Sliding-window layers hold few tokens and are left as the base strategy keeps them; latent caches (MLA) are refused.
"""

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...attention import rope
from ...attention.budget import Budget
from ...attention.codec import KVCodec, kv_codec
from ...call import Site
from ...errors import UserError
from .._store import PolicyStore
from .._strategy import EvictionStrategy
from .._view import CacheView
from .._wrap import Wrapper
from .linear import FireQLinear

__all__ = ["FireQ", "FireQLinear"]

_FLOOR = 1e-3  # of the largest channel of the head, the least that a channel counts as
_BLOCK = 4096  # keys looked at together


@dataclass(frozen=True, kw_only=True)
class FireQ(Wrapper):
    """INT4 or FP8 storage (or FP8 keys with INT4 values) of what ``base`` keeps, with keys scaled by rotary pair.

    A cached vector takes d / 2 bytes as INT4 or d bytes as FP8, and 2 bytes of scale.

    Attributes:
        base: strategy that says what is kept, ``full`` for everything.
        budget: of the base; 1.0 keeps every token.
        bits: ``int4``, ``fp8``, or ``k8v4`` for FP8 keys and INT4 values.
        window_tokens: last tokens in the model's dtype. Nearby tokens get most of the attention; 64 cost 4 % of the
            model's own cache at 1,600 tokens.
        scaling: factors on the keys: ``pre``, ``post``, ``both`` or ``none``.
        alpha: size of a scaled pair.
        beta: size of a scaled outlying channel. With ``post`` alone the other channels keep their size, and beta must
            be near it: far below, the outlying channels themselves round to zero.
        top_k: outlying channels per head.
    """

    base: str = field(default="full", metadata={"help": "strategy that says what is kept: full, snapkv(...), ..."})
    budget: Budget = field(default=1.0, metadata={"help": "of the base: fraction (0, 1], or a number of slots"})
    bits: str = field(default="int4", metadata={"help": "int4, fp8, or k8v4: FP8 keys, INT4 values"})
    window_tokens: int = field(default=64, metadata={"help": "last tokens that stay in the model's dtype"})
    scaling: str = field(default="both", metadata={"help": "factors on the keys: pre, post, both or none"})
    alpha: float = field(default=1.0, metadata={"help": "size of a scaled pair"})
    beta: float = field(default=1.0, metadata={"help": "size of a scaled outlying channel"})
    top_k: int = field(default=3, metadata={"help": "outlying channels per head"})

    def __post_init__(self) -> None:
        if self.scaling not in ("pre", "post", "both", "none"):
            raise UserError(f"fireq: scaling is pre, post, both or none, not {self.scaling!r}")
        if self.window_tokens < 0 or self.top_k < 0:
            raise UserError("fireq: window_tokens and top_k count and cannot be negative")
        if not (self.alpha > 0 and self.beta > 0):
            raise UserError(f"fireq: alpha and beta are sizes above 0, not {self.alpha} and {self.beta}")
        kv_codec(self.bits)
        super().__post_init__()

    @property
    def lossless(self) -> bool:
        return False

    @functools.cached_property
    def inner(self) -> EvictionStrategy:
        """The base, which keeps at least the tokens that are not encoded yet."""
        inner = super().inner
        return replace(inner, recent=max(inner.recent, self.window_tokens)) if inner.has_budget else inner

    @property
    def codec(self) -> KVCodec:
        return kv_codec(self.bits)

    @property
    def codec_window(self) -> int:
        return self.window_tokens

    def store(self, site: Site) -> PolicyStore:
        if site.latent is not None:
            raise UserError(
                f"fireq cannot store {site.name}: its cache holds latents, which have no rotary pairs to scale"
            )
        return self.inner.store(site) if site.window is not None else super().store(site)

    def key_scale(self, view: CacheView) -> Tensor | None:
        if self.scaling == "none":
            return None
        if view.rotary is None:
            raise UserError(
                f"fireq: the rotary pairs of {view.site.name} are unknown, the model passes on no cosines and sines in "
                "halves; store its keys unscaled with scaling=none"
            )
        rotary_dim = view.rotary[0].shape[-1]
        norms = sizes = view.k.new_zeros(*view.k.shape[:2], view.k.shape[3], dtype=torch.float32)  # [B, Hkv, d]
        for k, positions in zip(view.k.split(_BLOCK, 2), view.positions.split(_BLOCK, 2), strict=True):
            k = torch.where((positions >= 0)[..., None], k.float(), 0.0)  # padding has no say
            norms = torch.maximum(norms, rope.pair_norms(k, rotary_dim).amax(2))
            sizes = torch.maximum(sizes, k.abs().amax(2))
        norms, sizes = _floored(norms), _floored(sizes)
        factors = self.alpha / norms if self.scaling != "post" else torch.ones_like(norms)
        if self.scaling != "pre":
            chosen = sizes.topk(min(self.top_k, sizes.shape[-1]), -1).indices
            outlying = torch.zeros_like(sizes, dtype=torch.bool).scatter(-1, chosen, True)
            outlying |= outlying[..., rope.partners(sizes.shape[-1], rotary_dim, sizes.device)]
            factors = torch.where(outlying, self.beta / sizes, factors)
        return factors


def _floored(top: Tensor) -> Tensor:
    """Largest magnitudes ``[B, Hkv, d]``, none under the floor; 1 in a head without any."""
    whole = top.amax(-1, keepdim=True)
    return torch.where(whole > 0, torch.maximum(top, _FLOOR * whole), 1.0)
