# SPDX-License-Identifier: Apache-2.0
"""The protocol of an eviction strategy: which tokens matter (score), which may never go, how many stay, and when."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import BeforeValidator
from torch import Tensor

from ..attention.budget import Budget, as_budget
from ..call import Site
from ..errors import UserError
from ..strategy import Strategy
from ._store import PolicyStore, View

__all__ = ["CachePolicy", "View"]


def _as_schedule(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Schedule = Annotated[str | int, BeforeValidator(_as_schedule)]


@dataclass(frozen=True, kw_only=True)
class CachePolicy(Strategy):
    """Base of the cache strategies: keep the best-scored tokens of each head within a budget, drop the rest.

    A policy overrides :meth:`score`, and where its paper does so :meth:`protect`, :meth:`allocate` or :meth:`merge`.
    Kept keys keep their rotary positions. Ties go to the newer token.

    Attributes:
        budget: fraction in (0, 1] of the tokens seen (1.0 keeps all), or a whole number of slots, per head.
        schedule: when to evict: ``prefill`` (once, after the first forward), ``chunk`` (after every forward of more
            than one token), ``step`` (after every forward), or a number m (when m more tokens have come).
        sinks: first tokens that are never dropped.
        recent: last tokens that are never dropped.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})
    dense_prefill: ClassVar[bool] = True  # the first forward attends to everything, so one prefill can serve many arms
    exact_chunks: ClassVar[bool] = False  # if evicting at every step: many tokens at once give what one by one does

    budget: Budget = field(default=0.5, metadata={"help": "fraction (0, 1] of the tokens seen, or a number of slots"})
    schedule: Schedule = field(default="prefill", metadata={"help": "prefill, chunk, step, or every that many tokens"})
    sinks: int = field(default=0, metadata={"help": "first tokens that are never dropped"})
    recent: int = field(default=0, metadata={"help": "last tokens that are never dropped"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_budget(self.budget))
        if self.schedule not in ("prefill", "chunk", "step") and not (
            isinstance(self.schedule, int) and self.schedule > 0
        ):
            raise UserError(f"{self.slug}: schedule is prefill, chunk, step or a number, not {self.schedule!r}")
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
    def window(self) -> int:
        """How many of the last queries :meth:`score` needs; 0 for none."""
        return 0

    def due(self, forwards: int, new: int, since: int) -> bool:
        """Whether to evict after forward number ``forwards`` of ``new`` tokens, ``since`` tokens after the last one."""
        if forwards == 1 or self.schedule == "step":
            return True
        return (self.schedule == "chunk" and new > 1) or (isinstance(self.schedule, int) and since >= self.schedule)

    def selects(self, site: Site) -> bool:
        return Strategy.selects(self, site) and site.causal and site.layer is not None

    def store(self, site: Site) -> PolicyStore:
        return PolicyStore(self, site)

    def score(self, view: View) -> Tensor:
        """Importance of each slot, ``[B, Hkv, N]``; the highest stay."""
        raise NotImplementedError

    def protect(self, view: View) -> Tensor:
        """Slots that must stay, bool ``[B, Hs, N]``: the first ``sinks`` and last ``recent`` tokens of each row."""
        late = view.positions >= (view.counts - self.recent)[:, None, None]
        return (view.positions >= 0) & ((view.positions < self.sinks) | late)

    def allocate(self, view: View, scores: Tensor, budgets: Tensor) -> Tensor | None:
        """Other budgets ``[B, Hs]`` than the equal ``budgets [B, Hs]``; None to keep them equal."""
        del view, scores, budgets
        return None

    def merge(self, view: View, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """New stored keys and values ``[B, Hs, N, d]`` in which kept slots absorb dropped ones; None: just drop."""
        del view, kept
        return None
