# SPDX-License-Identifier: Apache-2.0
"""Drop the channels of the keys that the last queries have least use for.

Xu et al., "ThinK: Thinner Key Cache by Query-Driven Pruning", arXiv 2407.21018. Logits are sums over channels, and few
channels carry them. What a head loses of Q K^T by dropping channel i is the outer product of two columns, whose
Frobenius norm is the product of theirs, so the channels that stay are the best of

    score_i = ||Q_[:, i]|| * ||K_[:, i]||        Q the last ``window_size`` queries of the prompt, K the keys that stay

in each key/value head; with grouped queries ||Q_[:, i]||^2 is averaged over the group. Values stay whole, and so do the
keys of the prompt's last ``recent_size`` tokens, as released, and all that comes after it. Tokens are kept by ``base``,
all of them by default: ThinK over SnapKV is ``think:base=snapkv,budget=0.25``, whose bytes are about
(1 + ``channels``) / 2 of what that budget says.

Shapes: pruned keys are stored as ``[B, Hs, N, kept]`` beside the numbers of their channels ``[B, Hs, kept]``, and read
back with zeros in the rest, one layer at a time: the bytes that are held are smaller, and nothing is faster. The whole
keys of the last tokens lie beside them, so that these are held in both forms.

Differs: the paper also prunes channels of values, in an appendix. Keys of layers with a sliding window, which are few,
stay whole. Caches of latents are refused, and decoding is not
compiled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import reference
from ..attention.budget import Budget
from ..call import Site
from ..errors import UserError
from ._policy import Schedule
from ._store import PolicyStore
from ._view import CacheView, QueryWindow
from ._wrap import Wrapper

__all__ = ["ThinK"]


@dataclass(frozen=True, kw_only=True)
class ThinK(Wrapper):
    """Keys in the channels that the last queries use, of the tokens that ``base`` keeps.

    Attributes:
        channels: part of the channels of every key that stays; the paper drops 0.4 or 0.5 of them.
        window_size: last queries of the prompt that judge.
        recent_size: last tokens of the prompt whose keys stay whole.
        schedule: always prefill: channels are chosen once.
    """

    base: str = field(default="full", metadata={"help": "strategy that keeps the tokens: full, or snapkv"})
    budget: Budget = field(default=1.0, metadata={"help": "of the base, in tokens"})
    schedule: Schedule = field(default="prefill", metadata={"help": "always prefill"})
    channels: float = field(default=0.6, metadata={"help": "part of the channels of a key that stays, above 0 to 1"})
    window_size: int = field(default=32, metadata={"help": "last queries that judge the channels"})
    recent_size: int = field(default=32, metadata={"help": "last tokens of the prompt whose keys stay whole"})

    def __post_init__(self) -> None:
        if not 0 < self.channels <= 1 or self.window_size < 1 or self.recent_size < 0:
            raise UserError("think: channels is a part of a key, above 0 to 1; window_size is 1, recent_size 0 or more")
        if self.schedule != "prefill":
            raise UserError(f"think chooses channels once: its schedule is prefill, not {self.schedule}")
        super().__post_init__()

    @property
    def lossless(self) -> bool:
        return self.channels == 1.0 and self.inner.lossless

    @property
    def window(self) -> int:
        return max(self.window_size, self.inner.window)

    def layer_budgets(self, views: Mapping[int, CacheView]) -> Mapping[int, Tensor | float]:
        return super().layer_budgets({layer: self._seen(view) for layer, view in views.items()})

    def score(self, view: CacheView) -> Tensor:
        return super().score(self._seen(view))

    def _seen(self, view: CacheView) -> CacheView:
        """What the base would see: the queries that it asks for."""
        window = self.inner.window
        return replace(view, queries=view.queries.last(window) if window and view.queries is not None else None)

    def store(self, site: Site) -> "ThinKStore":
        if site.latent is not None:
            raise UserError(f"think drops channels of keys, and {site.name} caches latents: choose snapkv or keydiff")
        return ThinKStore(self, site)


class ThinKStore(PolicyStore):
    """Slots whose keys are kept apart: the pruned ones of the prompt, and whole ones of what came after it."""

    policy: ThinK

    def reset(self) -> None:
        super().reset()
        self._pruned: Tensor | None = None  # [B, Hs, N, kept]
        self._channels: Tensor | None = None  # [B, Hs, kept]
        self._recent: Tensor | None = None  # [B, Hs, R, d], whole
        self._slots: Tensor | None = None  # [B, Hs, R], where these are
        self._later: Tensor | None = None  # [B, Hs, M, d]

    @property
    def why_not_fixed(self) -> str | None:
        return f"{self.policy.spec} reads its keys back at every step, which cannot be compiled; leave room away"

    @property
    def held(self) -> list[Tensor | None]:
        return [*super().held, *self._own.values()]

    @property
    def keys(self) -> Tensor | None:
        return super().keys if self._pruned is None else self._whole()

    @property
    def _own(self) -> dict[str, Tensor | None]:
        """What is held beside the slots, each with the batch first."""
        return {
            "pruned": self._pruned, "channels": self._channels, "recent": self._recent, "slots": self._slots,
            "later": self._later,
        }  # fmt: skip

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self._later is None:
            return super().update(k, v)
        self._later = torch.cat([self._later, k], 2)
        _, values = super().update(k[..., :0], v)
        return self._whole(), values

    def compress(self, view: CacheView, share: Tensor | float | None = None) -> None:
        super().compress(view, share)
        slots, policy = self.live, self.policy
        keep = round(policy.channels * view.k.shape[-1])
        windowed = self.site.window is not None  # tokens leave such a layer one by one
        if windowed or self._waiting is not None or self._pruned is not None or keep == view.k.shape[-1]:
            return
        assert view.queries is not None
        held = (slots.positions() >= 0)[..., None]
        score = channel_scores(view.queries, slots.keys.masked_fill(~held, 0.0), policy.window_size)
        channels = score.topk(max(1, keep), -1).indices.sort(-1).values
        self._pruned = slots.keys.gather(3, channels[:, :, None].expand(-1, -1, slots.size, -1))
        self._channels = channels.to(torch.int16)
        self._slots = slots.positions().topk(min(policy.recent_size, slots.size), -1).indices.int()
        at = self._slots.long()[..., None].expand(-1, -1, -1, slots.keys.shape[3])
        self._recent = slots.keys.gather(2, at)
        self._later, slots.keys = slots.keys[:, :, :0].clone(), slots.keys[..., :0].clone()
        slots._room = None

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self._set({name: None if x is None else x[rows.to(x.device)] for name, x in self._own.items()})

    def crop(self, count: int) -> None:
        if self._later is not None and count > self._later.shape[2]:
            raise UserError("a cache of think cannot be cropped into its prompt: the channels dropped there are gone")
        super().crop(count)
        if self._later is not None:
            self._later = self._later[:, :, : self._later.shape[2] - count]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "own": self._own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._set(state["own"])

    def _set(self, own: dict[str, Tensor | None]) -> None:
        self._pruned, self._channels, self._later = own["pruned"], own["channels"], own["later"]
        self._recent, self._slots = own["recent"], own["slots"]

    def _whole(self) -> Tensor:
        """Keys ``[B, Hs, N, d]``, with zeros where channels are dropped."""
        pruned, later, recent = self._pruned, self._later, self._recent
        assert pruned is not None and later is not None and recent is not None
        assert self._channels is not None and self._slots is not None
        keys = pruned.new_zeros(*pruned.shape[:3], later.shape[3])
        at = self._channels.long()[:, :, None].expand_as(pruned)
        keys = keys.scatter_(3, at, pruned)
        keys = keys.scatter_(2, self._slots.long()[..., None].expand_as(recent), recent)
        return torch.cat([keys, later], 2)


def channel_scores(queries: QueryWindow, keys: Tensor, window: int) -> Tensor:
    """Squared scores ``[B, Hkv, d]`` of the channels of ``keys [B, Hkv, N, d]``, zero where there is no token."""
    last = queries.last(window)
    real = (last.positions >= 0)[:, None, :, None]
    asked = reference.widened(last.q).masked_fill(~real, 0.0).square().sum(2)  # [B, H, d]
    grouped: Tensor = asked.unflatten(1, (keys.shape[1], -1)).mean(2)
    return grouped * reference.widened(keys).square().sum(2)
