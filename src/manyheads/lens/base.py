# SPDX-License-Identifier: Apache-2.0
"""The base of lenses, and several of them as one strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..calls.statistics import Statistic
from ..strategy import AttentionWatch, BlockParts, Residual
from .looking import Memos, look
from .results import LensResult, Memory
from .view import SHARED, AttentionView, TokenSpans
from .waiting import BLOCK, Waiting

if TYPE_CHECKING:
    from ..call import AttentionCall, Site

__all__ = ["Lens", "LensGroup"]


class Lens(AttentionWatch):
    """Base of strategies that only look. A subclass overrides ``statistics``, ``update`` and ``compute``."""

    asks: ClassVar[bool] = False  # it is about answers: without a text it is tried on questions with known ones
    reads_slots: ClassVar[bool] = False  # it can read caches that dropped tokens

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        """Statistics of the weights of this call, by name; none where q, k, v and out are enough."""
        return {}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        """Add the values ``found`` of these statistics to ``view.memory``: :class:`RunningMean`, :class:`PerToken`."""

    @property
    def edits_model(self) -> bool:
        """Whether this lens, as it is set, also edits the model: it is then opened by ``manyheads.use``."""
        return False

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        """The result from what was kept at each site."""
        raise NotImplementedError

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        """Look at a call alone; :class:`LensGroup` does it for several lenses at once, and lets tokens wait."""
        decoded = call.q.shape[2] == 1 and bool(int(call.step))
        look([(self, call.state)], call, out, TokenSpans(), call.state.setdefault(SHARED, {}), None, decoded)


@dataclass(frozen=True, kw_only=True)
class LensGroup(AttentionWatch, BlockParts):
    """Several lenses as one strategy, so that they share the weights of a call.

    Attributes:
        lenses: the lenses.
        state: the roles of the forward at hand, which may be changed between forwards.
    """

    lenses: tuple[Lens, ...] = ()
    state: dict[str, Any] = field(default_factory=lambda: {"no roles": TokenSpans()}, compare=False)

    @property
    def spec(self) -> str:
        return ", ".join(lens.spec for lens in self.lenses)

    def selects(self, site: Site) -> bool:
        return any(lens.selects(site) for lens in self.lenses)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        shared = call.state.get(SHARED)
        if shared is None:
            shared = call.state[SHARED] = {}
        waiting: Waiting | None = shared.get("waiting")
        if waiting is None:
            waiting = shared["waiting"] = Waiting()
        if len(waiting.rows) < BLOCK and waiting.joins(call, out):
            return
        if waiting.rows:
            self._look_at(waiting, call.site, call.state, call if waiting.goes_on(call) else None)
        if not waiting.begins(call, out):
            self._look(call, out, call.state, call.q.shape[2] == 1 and bool(int(call.step)))

    def follow(self, state: Memory, past: Any, qkv: Any, rest: Any, out: Tensor) -> bool:
        waiting: Waiting | None = state.get(SHARED, {}).get("waiting")
        return waiting is not None and len(waiting.rows) < BLOCK and waiting.follow(past, qkv, None, rest, out)

    def _look(self, call: AttentionCall, out: Tensor, memory: Memory, decoded: bool) -> None:
        memos = self.state.setdefault("memos", Memos())
        chosen, roles = list(self._at(call.site, memory)), self.state.get("roles") or self.state["no roles"]
        look(chosen, call, out, roles, memory[SHARED], memos, decoded)

    def _look_at(self, waiting: Waiting, site: Site, memory: Memory, now: AttentionCall | None) -> None:
        """Look at what waited, and at what its block made of it."""
        call, out = waiting.together(now)
        hidden, parts = waiting.blocks(call.q.shape[2])
        self._look(call, out, memory, True)
        if parts is not None:
            self.parts(site, parts[0], parts[1], parts[2], memory)
        if hidden is not None:
            self.residual(site, hidden, memory)

    def entering(self, state: Memory, past: Any) -> None:
        if (waiting := state.get(SHARED, {}).get("waiting")) is not None:
            waiting.entering(past)

    def settle(self, site: Site, state: Memory) -> None:
        waiting: Waiting | None = state.get(SHARED, {}).get("waiting")
        if waiting is not None and len(waiting):
            self._look_at(waiting, site, state, None)

    @property
    def reads_residual(self) -> bool:
        return any(isinstance(lens, Residual) and lens.reads_residual for lens in self.lenses)

    @property
    def reads_parts(self) -> bool:
        return any(isinstance(lens, BlockParts) and lens.reads_parts for lens in self.lenses)

    def parts(self, site: Site, before: Tensor, parts: dict[str, Tensor], hidden: Tensor, memory: Memory) -> None:
        waiting = memory.get(SHARED, {}).get("waiting")
        if waiting is not None and len(waiting.parts) < len(waiting):
            waiting.parts.append((before, parts, hidden))
            return
        for lens, mine in self._at(site, memory):
            if isinstance(lens, BlockParts):
                lens.parts(site, before, parts, hidden, mine)

    def residual(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        waiting = memory.get(SHARED, {}).get("waiting")
        if waiting is not None and len(waiting.hidden) < len(waiting):
            waiting.hidden.append(hidden.detach() if hidden.requires_grad else hidden)
            return hidden
        for lens, mine in self._at(site, memory):
            if isinstance(lens, Residual):
                lens.residual(site, hidden, mine)
        return hidden

    def _at(self, site: Site, memory: Memory) -> Iterator[tuple[Lens, Memory]]:
        """The lenses that look at ``site``, each with what it keeps there."""
        for i, lens in enumerate(self.lenses):
            if lens.selects(site):
                mine = memory.setdefault(str(i), {})
                mine[SHARED] = memory.get(SHARED, {})
                yield lens, mine

    def of(self, index: int, sites: Sequence[tuple[Site, Memory]]) -> list[tuple[Site, Memory]]:
        """What lens number ``index`` kept, by site."""
        return [(site, memory[str(index)]) for site, memory in sites if str(index) in memory]
