# SPDX-License-Identifier: Apache-2.0
"""Lenses: strategies that only look. They name statistics of the weights, get them exact, and sum up over prompts.

Any number of lenses share one forward: the weights of a call are made once, a block of rows at a time, for all of them
(:mod:`manyheads.calls.statistics`). A lens changes no bit of what the model computes.

    spans = TokenSpans({"system": [[(0, 12)]]})
    with manyheads.watch(model, "active_dormant", "strategy_attention", roles=spans) as seen:
        model(**inputs)
    seen.compute("active_dormant").tables["sink"].top(5)

A forward without earlier tokens starts new prompts; tokens decoded after it go on with them, row by row, so that
decoding with a cache of any make and one forward over the whole give the same results. How many tokens came before is
what the model's cache says. Beam search, which reorders rows, does not; a cache that is cut back is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .calls.statistics import Statistic
from .calls.weights import measure
from .errors import UserError
from .heads import HeadTable
from .strategy import AttentionWatch, BlockParts, Residual

if TYPE_CHECKING:
    from .call import AttentionCall, Site

__all__ = [
    "AttentionView", "Lens", "LensGroup", "LensResult", "Memory", "PerToken", "RunningMean", "TokenSpans", "device_of",
    "stack_ragged", "table", "table_of",
]  # fmt: skip

Memory = dict[str, Any]
Span = tuple[int, int]
_SHARED = "shared"  # where the lenses of one site keep what they share


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` takes its inputs, the processor where nothing says it: offloaded weights stand on ``meta``."""
    held = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return next((device for device in held if device.type != "meta"), torch.device("cpu"))


class TokenSpans:
    """Which tokens play which part: ``bos``, ``system``, ``response``, ``image``, ... for each row of a batch.

    ``bos`` is the first token of every row where it is not given, ``response`` holds every token past the known ones
    where it is not given: what is generated.

    Args:
        spans: for each role, for each row, its spans ``(start, stop)`` among all columns, padding counted. One row
            stands for every row of a batch.
        source: likewise for the keys of cross-attention.
    """

    def __init__(
        self,
        spans: Mapping[str, Sequence[Sequence[Span]]] | None = None,
        source: Mapping[str, Sequence[Sequence[Span]]] | None = None,
    ) -> None:
        self.spans, self.source = dict(spans or {}), dict(source or {})

    def mask(self, role: str, columns: Tensor, batch: int, cross: bool = False) -> Tensor:
        """``[B, N]``, True where the token at position ``columns [N]`` has the role.

        Raises:
            UserError: the role is not known.
        """
        spans = self.source if cross else self.spans
        if role not in spans:
            if role == "response" and not cross:
                known = max((stop for rows in spans.values() for row in rows for _, stop in row), default=0)
                return (columns >= known)[None].expand(batch, -1)
            raise UserError(f"no token has the role {role!r}; known are {', '.join(sorted(spans)) or 'none'}")
        rows = spans[role]
        if len(rows) not in (1, batch):
            raise UserError(f"the role {role!r} is given for {len(rows)} rows, and the batch has {batch}")
        made = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=columns.device)
        for row, pieces in enumerate(rows):
            for start, stop in pieces:
                made[row] |= (columns >= start) & (columns < stop)
        return made.expand(batch, -1)


@dataclass
class AttentionView:
    """One attention computation as a lens receives it.

    Attributes:
        call, out: of the port.
        memory: what this lens keeps at this site.
        roles: the parts of the tokens.
        valid: ``[B, T]``, queries that are tokens, not padding.
        keys: ``[B, S]``, keys that are tokens; what an edit put in front of them is none.
        start: tokens of each row, padding counted, before the first query.
        fresh: nothing came before: new prompts.
    """

    call: AttentionCall
    out: Tensor
    memory: Memory
    roles: TokenSpans
    valid: Tensor
    keys: Tensor
    start: int
    fresh: bool

    @property
    def _end(self) -> int:
        return self.start + self.call.q.shape[2]

    @property
    def cross(self) -> bool:
        """Whether the keys are of another sequence than the queries."""
        return self.call.site.kind == "cross"

    @property
    def query_positions(self) -> Tensor:
        """``[T]`` places of the queries in their row, padding counted."""
        return torch.arange(self.start, self._end, device=self.call.q.device)

    @property
    def key_positions(self) -> Tensor:
        """``[S]`` places of the keys in their row, padding counted; below 0 what an edit put in front."""
        size = self.call.k.shape[2]
        # a sliding-window cache holds the last keys only
        first = -self.call.prepended if self.cross else self._end - size
        return torch.arange(first, first + size, device=self.call.q.device)

    def first(self) -> Tensor:
        """``[B, S]``, True at the first token of each row; all False where a sliding cache holds it no more."""
        first = self.keys & (self.keys.long().cumsum(1) == 1)
        return first & self.memory[_SHARED]["whole"] if not self.cross else first

    def columns(self, role: str) -> Tensor:
        """``[B, S]``, True for keys with the role that are no padding."""
        if role == "bos" and role not in (self.roles.source if self.cross else self.roles.spans):
            return self.first()
        return self.roles.mask(role, self.key_positions, self.keys.shape[0], self.cross) & self.keys

    def rows(self, role: str) -> Tensor:
        """``[B, T]``, True for queries with the role that are no padding."""
        return self.roles.mask(role, self.query_positions, self.valid.shape[0]) & self.valid

    def add_mean(self, key: str, values: Tensor, rows: Tensor) -> None:
        """Keep under ``key`` the :class:`RunningMean` of ``values [B, ..., T]`` over ``rows``, broadcastable."""
        self.memory.setdefault(key, RunningMean()).add(values.masked_fill(~rows, 0).sum(-1), rows.sum(-1), self.fresh)

    def add_tokens(self, key: str, values: Tensor, rows: Tensor) -> None:
        """Keep under ``key`` the :class:`PerToken` of ``values [B, T]``, NaN elsewhere than at ``rows [B, T]``."""
        self.memory.setdefault(key, PerToken()).add(values.masked_fill(~rows, torch.nan), self.fresh)


class RunningMean:
    """Mean over the tokens of each prompt, ``[N, ...]``, as sums and counts; decoded tokens add to their prompt."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, total: Tensor, count: Tensor, fresh: bool) -> None:
        """Add ``total [B, ...]`` of ``count`` (broadcastable) things."""
        total = total.detach()
        count = count.to(total.dtype).expand_as(total)
        if fresh or not self.parts:
            self.parts.append((total, count))
        else:
            before, counted = self.parts[-1]
            self.parts[-1] = (before + total, counted + count)

    def mean(self) -> Any:
        """``[N, ...]`` float64; NaN where nothing was counted."""
        if not self.parts:
            return np.zeros((0,))
        total, count = (torch.cat([part[i].double().cpu() for part in self.parts]) for i in (0, 1))
        return (total / count.masked_fill(count == 0, torch.nan)).numpy()


class PerToken:
    """A value for each token of each prompt; NaN for padding. Decoded tokens are put behind their prompts."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, values: Tensor, fresh: bool) -> None:
        """Add ``values [B, T, ...]``."""
        if fresh or not self.parts:
            self.parts.append(values.detach())
        else:
            self.parts[-1] = torch.cat([self.parts[-1], values.detach()], 1)

    def rows(self) -> list[Any]:
        """One array ``[T, ...]`` for each prompt."""
        return [row.double().cpu().numpy() for part in self.parts for row in part]


@dataclass
class LensResult:
    """What a lens computed.

    Attributes:
        tables: scores of heads (or of layers: a single column), by name.
        series: for each name, for each prompt, a value for each token, NaN for padding.
        channels: for each name ``[L, H, d]``.
        maps: pooled attention maps ``[R, C]`` of (row of the tables, head).
        curves: for each name, lines by their names over the first of them, as lists of numbers.
        records: for each name, things that were found one by one, as plain values by name: spikes, events, spans.
        notes: sentences for a reader, computed from the figures.
    """

    tables: dict[str, HeadTable] = field(default_factory=dict)
    series: dict[str, list[Any]] = field(default_factory=dict)
    channels: dict[str, Any] = field(default_factory=dict)
    maps: dict[tuple[int, int], Any] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def table(name: str, sites: Sequence[tuple[Site, Memory]], key: str, /, **about: Any) -> HeadTable:
    """One table of the means that every site keeps under ``key``, a :class:`RunningMean` of ``[N]`` or ``[N, H]``."""
    return table_of(name, [site for site, _ in sites], [memory[key].mean() for _, memory in sites], **about)


def table_of(name: str, sites: Sequence[Site], rows: Sequence[Any], /, **about: Any) -> HeadTable:
    """One table of the scores ``[N]`` or ``[N, H]`` of each site; NaN where a site has fewer prompts or heads."""
    rows = [row[:, None] if row.ndim == 1 else row for row in rows]
    layers = tuple(site.index if site.layer is None else site.layer for site in sites)
    return HeadTable(name, tuple(site.name for site in sites), stack_ragged(rows).swapaxes(0, 1), about, layers)


def stack_ragged(rows: Sequence[Any]) -> Any:
    """``[L, M, N]`` float64 of arrays ``[m, n]``, NaN where one has fewer rows or columns than the largest."""
    made = np.full((len(rows), *(max(row.shape[axis] for row in rows) for axis in (0, 1))), np.nan)
    for i, row in enumerate(rows):
        made[i, : row.shape[0], : row.shape[1]] = row
    return made


class Lens(AttentionWatch):
    """Base of strategies that only look. A subclass overrides ``statistics``, ``update`` and ``compute``."""

    asks: ClassVar[bool] = False  # it is about answers: without a text it is tried on questions with known ones

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
        """Look at a call alone; :class:`LensGroup` does it for several lenses at once."""
        _look([(self, call.state)], call, out, TokenSpans(), call.state.setdefault(_SHARED, {}))


@dataclass(frozen=True, kw_only=True)
class LensGroup(AttentionWatch, BlockParts):
    """Several lenses as one strategy, so that they share the weights of a call.

    Attributes:
        lenses: the lenses.
        state: the roles of the forward at hand, which may be changed between forwards.
    """

    lenses: tuple[Lens, ...] = ()
    state: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def spec(self) -> str:
        return ", ".join(lens.spec for lens in self.lenses)

    def selects(self, site: Site) -> bool:
        return any(lens.selects(site) for lens in self.lenses)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        shared = call.state.setdefault(_SHARED, {})
        chosen = list(self._at(call.site, call.state))
        _look(chosen, call, out, self.state.get("roles") or TokenSpans(), shared)

    @property
    def reads_residual(self) -> bool:
        return any(isinstance(lens, Residual) and lens.reads_residual for lens in self.lenses)

    @property
    def reads_parts(self) -> bool:
        return any(isinstance(lens, BlockParts) and lens.reads_parts for lens in self.lenses)

    def parts(self, site: Site, before: Tensor, parts: dict[str, Tensor], hidden: Tensor, memory: Memory) -> None:
        for lens, mine in self._at(site, memory):
            if isinstance(lens, BlockParts):
                lens.parts(site, before, parts, hidden, mine)

    def residual(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        for lens, mine in self._at(site, memory):
            if isinstance(lens, Residual):
                lens.residual(site, hidden, mine)
        return hidden

    def _at(self, site: Site, memory: Memory) -> Iterator[tuple[Lens, Memory]]:
        """The lenses that look at ``site``, each with what it keeps there."""
        for i, lens in enumerate(self.lenses):
            if lens.selects(site):
                mine = memory.setdefault(str(i), {})
                mine[_SHARED] = memory.get(_SHARED, {})
                yield lens, mine

    def of(self, index: int, sites: Sequence[tuple[Site, Memory]]) -> list[tuple[Site, Memory]]:
        """What lens number ``index`` kept, by site."""
        return [(site, memory[str(index)]) for site, memory in sites if str(index) in memory]


def _look(
    lenses: Sequence[tuple[Lens, Memory]], call: AttentionCall, out: Tensor, roles: TokenSpans, shared: Memory
) -> None:  # fmt: skip
    """Gather the statistics of every lens, make the weights once, update every lens."""
    valid, keys, start, fresh = _tokens(call, shared)
    views, wanted = [], []
    for lens, memory in lenses:
        memory[_SHARED] = shared
        view = AttentionView(call, out, memory, roles, valid, keys, start, fresh)
        views.append(view)
        wanted.append(lens.statistics(view))
    answers = iter(measure(call, [statistic for named in wanted for statistic in named.values()]))
    for (lens, _), view, named in zip(lenses, views, wanted, strict=True):
        with torch.no_grad():
            lens.update(view, {name: next(answers) for name in named})


def _tokens(call: AttentionCall, shared: Memory) -> tuple[Tensor, Tensor, int, bool]:
    """Which queries and keys are tokens, how many came before, and whether new prompts begin.

    A query sees itself unless it is padding. In decoding the mask says nothing of the keys a sliding window has left
    behind, so what was seen before is kept.
    """
    (batch, _, length, _), more = call.q.shape, call.prepended
    size, start = call.k.shape[2] - more, int(call.step)
    everything, mask = torch.ones(batch, 1, dtype=torch.bool, device=call.q.device), call.mask
    fresh = not _goes_on(call, shared, start)
    shared |= {
        "fresh": fresh, "start": start, "end": start + length,
        "past": None if call.past is None else weakref.ref(call.past),
    }  # fmt: skip
    if call.site.kind == "cross":
        keys = everything.expand(-1, size) if mask is None else mask.any(1).any(1).expand(batch, size + more)[:, more:]
        return everything.expand(-1, length), pad(keys, (more, 0)), start, fresh
    if call.cache is not None:
        raise UserError("a lens reads keys where they stand; look at the model without a cache strategy")
    if mask is None:
        valid = everything.expand(-1, length)
    else:
        seen = mask.any(1).expand(batch, -1, -1)  # [B, T or 1, S]
        row = torch.arange(length, device=mask.device)
        valid = seen[:, row if seen.shape[1] > 1 else row * 0, row + more + size - length]
    before = shared["valid"] if not fresh else everything.expand(-1, start)
    if fresh and mask is not None and start:  # tokens that nobody looked at as they came
        held = mask.any(1).any(1).expand(batch, -1)[:, more : more + size - length]
        before = torch.cat([before[:, : start - held.shape[1]], held], 1)
    history = torch.cat([before, valid], 1)
    shared["valid"], shared["whole"] = history, history.shape[1] == size
    return valid, pad(history[:, -size:], (more, 0)), start, fresh


def _goes_on(call: AttentionCall, shared: Memory, start: int) -> bool:
    """Whether the queries follow those of the last call: the same cache counts as many tokens as were seen."""
    before, known = shared.get("past"), shared.setdefault("caches", weakref.WeakSet())
    if not start or "end" not in shared or call.past is not (None if before is None else before()):
        if start and call.past in known:
            raise UserError(
                f"two sequences go on by turns at {call.site.name}, and a lens follows one at a time: finish one "
                "first, or watch each by itself"
            )
        if call.past is not None:
            known.add(call.past)
        return False
    if shared["end"] > start:
        raise UserError(
            f"the cache at {call.site.name} was cut back from {shared['end']} tokens to {start}, and a lens "
            "counted them: generate without an assistant model, and go on from a prompt with a copy of its cache"
        )
    return bool(shared["end"] == start)
