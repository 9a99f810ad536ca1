# SPDX-License-Identifier: Apache-2.0
"""The protocol of an eviction strategy: which tokens matter (score), which may never go, how many stay, and when."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator
from torch import Tensor

from ..attention.budget import Budget, as_budget
from ..attention.codec import KVCodec
from ..attention.protect import Protect, Protected, as_protect, within
from ..call import AttentionCall, Site
from ..errors import UserError
from ..strategy import Cache, Strategy
from ._view import CacheView, QueryWindow

__all__ = ["SCHEDULES", "CachePolicy", "CacheView", "Schedule", "must_stay", "why_not_fixed"]


def _as_schedule(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


SCHEDULES = "prefill, turn, chunk, step, or every that many tokens"
Schedule = Annotated[str | int, BeforeValidator(_as_schedule)]


@dataclass(frozen=True, kw_only=True)
class CachePolicy(Cache):
    """Which tokens stay: the best-scored ones of each head within a budget, the rest is dropped.

    A policy overrides :meth:`score`, and where its paper does so :meth:`protected_mask`, :meth:`head_budgets`,
    :meth:`layer_budgets`, :meth:`merge` or the storage (:attr:`codec`). Kept keys keep their rotary positions. Ties go
    to the newer token.

    Attributes:
        budget: fraction in (0, 1] of the tokens seen (1.0 keeps all), or a whole number of slots, per head. A fraction
            never cuts into the protected tokens, so a text no longer than these is kept whole; a number of slots that
            cannot hold them is refused.
        schedule: when to evict: ``prefill`` (once, after the first prompt), ``turn`` (after every prompt, so that a
            fraction is one of a whole chat; what scores by queries goes by those since the last time), ``chunk`` (after
            every forward of more than one token, which is every chunk of a prompt in chunks), ``step`` (after every
            forward), or a number m (when m more tokens have come).
        sinks: first tokens that are never dropped.
        recent: last tokens that are never dropped.
        protect: spans of tokens that are never dropped, nor changed by merging (:mod:`manyheads.attention.protect`).
            The budget is then a target, which they may exceed. What is kept in few bits keeps them so, too.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})
    dense_prefill: ClassVar[bool] = True
    has_budget: ClassVar[bool] = True

    budget: Budget = field(default=0.5, metadata={"help": "fraction (0, 1] of the tokens seen, or a number of slots"})
    schedule: Schedule = field(default="prefill", metadata={"help": SCHEDULES})
    sinks: int = field(default=0, metadata={"help": "first tokens that are never dropped"})
    recent: int = field(default=0, metadata={"help": "last tokens that are never dropped"})
    protect: Protect = field(default=Protected(), metadata={"help": "tokens never dropped: system, or 0-39+60-70"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        object.__setattr__(self, "protect", as_protect(self.protect))
        if self.schedule not in ("prefill", "turn", "chunk", "step") and not (
            isinstance(self.schedule, int) and self.schedule > 0
        ):
            raise UserError(f"{self.slug}: schedule is prefill, turn, chunk, step or a number, not {self.schedule!r}")
        if self.sinks < 0 or self.recent < 0:
            raise UserError(f"{self.slug}: sinks and recent count tokens and cannot be negative")
        if isinstance(self.budget, int):
            self.check(self.budget)

    def check(self, slots: int) -> None:
        """Raise UserError when ``slots`` cannot hold the protected tokens."""
        if slots < self.protected:
            raise UserError(
                f"{self.slug}: a budget of {slots} slots cannot hold its {self.protected} protected tokens; "
                "give a larger budget or a longer text"
            )

    @property
    def protected(self) -> int:
        """Tokens per row that are never dropped: the least budget in slots."""
        return self.sinks + self.recent

    @property
    def waits(self) -> bool:
        """Whether a prompt that comes in chunks is compressed after its last alone."""
        return self.schedule in ("prefill", "turn")

    @property
    def window(self) -> int:
        """How many of the last queries :meth:`score` needs; 0 for none."""
        return 0

    @property
    def gathers(self) -> bool:
        """Whether statistics of the queries are gathered as they come."""
        return self.accumulated_attention or self.needs_queries

    @property
    def record(self) -> int:
        """Queries of a shared prefill that a fork needs: the window, or all of them."""
        return 2**31 if self.gathers else self.window

    @property
    def codec(self) -> KVCodec | None:
        """How tokens are stored once they have left the last :attr:`codec_window`; None for the model's own dtype."""
        return None

    @property
    def codec_window(self) -> int:
        """Last tokens that stay in the model's dtype where there is a codec."""
        return 0

    def key_scale(self, view: CacheView) -> Tensor | None:
        """Positive factors ``[B, Hkv, d]`` on the keys before they are encoded, from the first forward; None for 1."""
        del view
        return None

    def should_evict(self, forwards: int, new: int, since: int) -> bool:
        """Whether to evict after forward number ``forwards`` of ``new`` tokens, ``since`` tokens after the last one."""
        if forwards == 1 or self.schedule == "step":
            return True
        return (self.schedule in ("turn", "chunk") and new > 1) or (
            isinstance(self.schedule, int) and since >= self.schedule
        )

    def selects(self, site: Site) -> bool:
        return Strategy.selects(self, site) and site.causal and site.layer is not None

    def score(self, view: CacheView) -> Tensor:
        """Importance of each slot, ``[B, Hkv, N]``; the highest stay."""
        raise NotImplementedError

    def protected_mask(self, view: CacheView) -> Tensor:
        """Slots that must stay, bool ``[B, Hs, N]``: the first ``sinks`` and last ``recent`` tokens of each row."""
        late = view.positions >= (view.counts - self.recent)[:, None, None]
        return (view.positions >= 0) & ((view.positions < self.sinks) | late)

    def protecting(self, protect: object) -> Self:
        return replace(self, protect=as_protect(protect))

    @property
    def protects_system(self) -> bool:
        return self.protect.system

    def observe(self, call: AttentionCall, queries: QueryWindow, state: dict[str, Tensor]) -> None:
        """Gather statistics of the queries of a forward into ``state``, whose tensors have the batch first."""
        raise NotImplementedError

    def layer_budgets(self, views: Mapping[int, CacheView]) -> Mapping[int, Tensor | float]:
        """Factors on the equal budget of each layer, scalar or ``[B]``, from the views of all layers."""
        raise NotImplementedError

    def head_budgets(self, view: CacheView, scores: Tensor, budgets: Tensor) -> Tensor | None:
        """Other budgets ``[B, Hs]`` than the equal ``budgets [B, Hs]``; None to keep them equal."""
        del view, scores, budgets
        return None

    def merge(self, view: CacheView, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """New stored keys and values ``[B, Hs, N, d]`` in which kept slots absorb dropped ones; None: just drop."""
        del view, kept
        return None


def must_stay(policy: CachePolicy, view: CacheView) -> Tensor:
    """The slots that ``policy`` protects and those that its ``protect`` names, bool ``[B, Hs, N]``."""
    mask = policy.protected_mask(view)
    return mask if view.spans is None else mask | within(view.positions, view.spans)


def why_not_fixed(policy: CachePolicy, site: Site) -> str | None:
    """Why what ``policy`` keeps at ``site`` cannot have a fixed size, and what to do instead; None where it can."""
    if policy.schedule not in ("prefill", "turn", "chunk"):
        return f"{policy.spec} evicts while it decodes, which cannot be compiled; leave room away or use schedule=chunk"
    if policy.accumulated_attention and policy.schedule != "prefill":
        return f"{policy.spec} goes on adding up attention while it decodes; use schedule=prefill"
    if site.window is not None or site.latent is not None:
        return f"{site.name} has a sliding window or latents and cannot be compiled; leave room away"
    return None
