# SPDX-License-Identifier: Apache-2.0
"""A cache strategy that changes one thing about another: its scores, its budgets, or how its tokens are stored."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..attention.codec import KVCodec
from ..call import AttentionCall
from ..errors import UserError
from ..spec import parse, read
from ._policy import Schedule
from ._strategy import EvictionStrategy
from ._view import CacheView, QueryWindow

__all__ = ["Wrapper"]


@dataclass(frozen=True, kw_only=True)
class Wrapper(EvictionStrategy):
    """Base of strategies around another: everything is the base's, except what a subclass overrides.

    Attributes:
        base: spec of the strategy inside, ``snapkv`` or ``snapkv(window_size=16)``; budget, schedule, sinks and recent
            are given outside.
        schedule: the base's own unless given.
    """

    base: str = field(default="snapkv", metadata={"help": "strategy inside: snapkv, or snapkv(window_size=16)"})
    schedule: Schedule = field(
        default="base", metadata={"help": "prefill, turn, chunk, step, a number; the base's if not given"}
    )

    def __post_init__(self) -> None:
        base = read(self.base)
        object.__setattr__(self, "base", base.nested)
        inside = parse(base.nested)
        if not isinstance(inside, EvictionStrategy) or type(inside).store is not EvictionStrategy.store:
            raise UserError(f"{self.slug} cannot stand around {inside.slug}, which keeps its cache in a way of its own")
        if "budget" in base.fields:
            raise UserError(f"{self.slug}: give the budget outside, {self.slug}:base={inside.slug},budget=...")
        if self.schedule == "base":
            object.__setattr__(self, "schedule", inside.schedule)
        if self.codec is not None and inside.accumulated_attention and self.schedule != "prefill":
            raise UserError(f"{self.slug} packs its tokens, and {inside.slug} adds up attention: use schedule=prefill")
        for name in ("sinks", "recent"):
            object.__setattr__(self, name, max(getattr(self, name), getattr(inside, name)))
        super().__post_init__()
        _ = self.inner  # refuses now what the base cannot do with this budget

    @functools.cached_property
    def inner(self) -> EvictionStrategy:
        """The base, with the budget and protection of this strategy."""
        inside = parse(self.base)
        assert isinstance(inside, EvictionStrategy)
        if not inside.has_budget:
            if self.budget != 1.0:
                raise UserError(
                    f"{inside.slug} keeps every token, so {self.slug} around it has no budget; "
                    f"choose another base, as {self.slug}:base=snapkv,budget={self.budget}"
                )
            return inside
        return dataclasses.replace(
            inside, budget=self.budget, schedule=self.schedule, sinks=self.sinks, recent=self.recent, layers=self.layers
        )

    @property
    def has_budget(self) -> bool:  # type: ignore[override]
        return self.inner.has_budget

    @property
    def protected(self) -> int:
        return self.inner.protected

    @property
    def kept_whole(self) -> int:
        return self.inner.kept_whole

    @property
    def window(self) -> int:
        return self.inner.window

    @property
    def accumulated_attention(self) -> bool:  # type: ignore[override]
        return self.inner.accumulated_attention

    @property
    def cross_layer(self) -> bool:  # type: ignore[override]
        return self.inner.cross_layer

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return self.inner.needs_queries

    @property
    def codec(self) -> KVCodec | None:
        return self.inner.codec

    @property
    def codec_window(self) -> int:
        return self.inner.codec_window

    def key_scale(self, view: CacheView) -> Tensor | None:
        return self.inner.key_scale(view)

    def observe(self, call: AttentionCall, queries: QueryWindow, state: dict[str, Tensor]) -> None:
        self.inner.observe(call, queries, state)

    def layer_budgets(self, views: Mapping[int, CacheView]) -> Mapping[int, Tensor | float]:
        return self.inner.layer_budgets(views)

    def score(self, view: CacheView) -> Tensor:
        return self.inner.score(view)

    def protected_mask(self, view: CacheView) -> Tensor:
        return self.inner.protected_mask(view)

    def head_budgets(self, view: CacheView, scores: Tensor, budgets: Tensor) -> Tensor | None:
        return self.inner.head_budgets(view, scores, budgets)

    def merge(self, view: CacheView, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.inner.merge(view, kept)
