# SPDX-License-Identifier: Apache-2.0
"""Looking at one call with several lenses: which tokens it has, whether they go on, and the weights once for all."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..calls.weights import measure
from ..errors import UserError
from .results import Memory
from .view import SHARED, AttentionView, Memo, TokenSpans

if TYPE_CHECKING:
    from ..call import AttentionCall
    from .base import Lens

__all__ = ["Memos", "look"]

_MEMOS = 4  # of the kinds of layers of a model, each with a mask of its own


class Memos:
    """The :class:`~manyheads.lens.view.Memo` of each kind of layer in the forward under way.

    Layers are of one kind where they have the same mask and saw the same tokens before.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, Any, Tensor | None, TokenSpans, Memo]] = []

    def find(
        self, call: AttentionCall, roles: TokenSpans, before: Tensor | None, fresh: bool
    ) -> Memo:  # fmt: skip
        """The memo of calls like this one."""
        given = (
            call.q.shape[:1], call.q.shape[2:3], call.k.shape[2:3], call.prepended, call.step, call.site.kind,
            call.is_causal, fresh, call.q.device,
        )  # fmt: skip
        for known, mask, seen, parts, memo in self._made:
            if known == given and mask() is call.mask and seen is before and parts is roles:
                return memo
        memo = Memo()
        held: Any = (lambda: None) if call.mask is None else weakref.ref(call.mask)  # a mask may be large
        self._made = [*self._made[1 - _MEMOS :], (given, held, before, roles, memo)]
        return memo


def look(
    lenses: Sequence[tuple[Lens, Memory]], call: AttentionCall, out: Tensor, roles: TokenSpans, shared: Memory,
    memos: Memos | None = None, decoded: bool = False,
) -> None:  # fmt: skip
    """Gather the statistics of every lens, make the weights once, update every lens.

    Args:
        lenses: each with what it keeps at the site.
        call, out: of the port.
        roles: of the forward.
        shared: what all lenses keep at the site.
        memos: of the forward.
        decoded: whether the queries are tokens that came one at a time.
    """
    slots = None if call.cache is None else call.cache.places
    if slots is not None and (blind := [lens for lens, _ in lenses if not lens.reads_slots]):
        raise UserError(
            f"{blind[0].slug} reads keys where they stand, and {call.site.name} has dropped some: take a cache that "
            "keeps all (full), or the lens head_statistics, which reads what is kept"
        )
    fresh = not _goes_on(call, shared, int(call.step))
    memo = (memos or Memos()).find(call, roles, None if fresh else shared.get("valid"), fresh)
    valid, keys = _tokens(call, shared, memo, fresh, slots is not None)
    views, wanted = [], []
    for lens, memory in lenses:
        memory[SHARED] = shared
        view = AttentionView(call, out, memory, roles, valid, keys, int(call.step), fresh, slots, memo, decoded)
        views.append(view)
        wanted.append(lens.statistics(view))
    answers = iter(measure(call, [statistic for named in wanted for statistic in named.values()]))
    for (lens, _), view, named in zip(lenses, views, wanted, strict=True):
        with torch.no_grad():
            lens.update(view, {name: next(answers) for name in named})


def _tokens(call: AttentionCall, shared: Memory, memo: Memo, fresh: bool, compressed: bool) -> tuple[Tensor, Tensor]:
    """Which queries and keys are tokens.

    A query sees itself unless it is padding. In decoding the mask says nothing of the keys a sliding window has left
    behind, so what was seen before is kept.
    """
    (batch, _, length, _), more = call.q.shape, call.prepended
    size, start = call.k.shape[2] - more, int(call.step)
    shared |= {
        "fresh": fresh, "start": start, "end": start + length,
        "past": None if call.past is None else weakref.ref(call.past),
    }  # fmt: skip
    mask = call.mask

    def ones() -> Tensor:
        return torch.ones(batch, 1, dtype=torch.bool, device=call.q.device)

    if call.site.kind == "cross":

        def of_source() -> tuple[Tensor, Tensor]:
            if mask is None:
                keys = ones().expand(-1, size)
            else:
                keys = mask.any(1).any(1).expand(batch, size + more)[:, more:]
            return ones().expand(-1, length), pad(keys, (more, 0))

        made: tuple[Tensor, Tensor] = memo.once("tokens", of_source)
        return made

    def find() -> tuple[Tensor, Tensor, Tensor]:
        if mask is None or compressed:
            valid = ones().expand(-1, length)
        else:
            seen = mask.any(1).expand(batch, -1, -1)  # [B, T or 1, S]
            row = torch.arange(length, device=mask.device)
            valid = seen[:, row if seen.shape[1] > 1 else row * 0, row + more + size - length]
        before = shared["valid"] if not fresh else ones().expand(-1, start)
        if fresh and mask is not None and start and not compressed:  # tokens that nobody looked at as they came
            held = mask.any(1).any(1).expand(batch, -1)[:, more : more + size - length]
            before = torch.cat([before[:, : start - held.shape[1]], held], 1)
        history = torch.cat([before, valid], 1)
        if compressed:
            return history, valid, pad(ones().expand(-1, size), (more, 0))
        return history, valid, pad(history[:, -size:], (more, 0))

    history, valid, keys = memo.once("tokens", find)
    shared["valid"], shared["whole"] = history, not compressed and history.shape[1] == size
    return valid, keys


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
