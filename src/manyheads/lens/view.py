# SPDX-License-Identifier: Apache-2.0
"""One attention computation as a lens receives it, and which of its tokens play which part."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .results import Memory, PerToken, RunningMean

if TYPE_CHECKING:
    from ..call import AttentionCall

__all__ = ["SHARED", "AttentionView", "Memo", "Span", "TokenSpans", "device_of", "max_positions"]

Span = tuple[int, int]
SHARED = "shared"  # where the lenses of one site keep what they share
_BEHIND_PADDING = frozenset(  # the first token's position is behind that of padding
    {"camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` takes its inputs, the processor where nothing says it: offloaded weights stand on ``meta``."""
    held = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return next((device for device in held if device.type != "meta"), torch.device("cpu"))


def max_positions(config: Any) -> int | None:
    """Tokens that a model reads at most, by its config, or that of its text decoder; None where it does not say."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if most and getattr(config, "model_type", "") in _BEHIND_PADDING:
        most -= config.pad_token_id + 1
    return int(most) if most else None


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


def counted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What is not among ``rows [..., T]``, and how many are."""
    return ~rows, rows.sum(-1, dtype=torch.float32)


class Memo:
    """What is the same at every layer of a forward and is made at the first: parts of the tokens, what is made of them.

    A lens has hundreds of such small tensors, and at short lengths making them would take longer than the attention.
    """

    def __init__(self) -> None:
        self.made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives the first time. It is shared and must not be changed."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def counted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is not among ``rows [..., T]``, and how many are; the same rows are known by where they lie."""
        key = "counted", rows.data_ptr(), rows.shape, rows.stride()
        _, others, count = self.once(key, lambda: (rows, *counted(rows)))
        return others, count


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
        slots: ``[B, Hkv, S]``, the place of what each slot of a compressed cache holds; None where keys stand in place.
        memo: of this forward.
        decoded: the queries came one at a time: each is a step of a generation.
    """

    call: AttentionCall
    out: Tensor
    memory: Memory
    roles: TokenSpans
    valid: Tensor
    keys: Tensor
    start: int
    fresh: bool
    slots: Tensor | None = None
    memo: Memo = field(default_factory=Memo)
    decoded: bool = False

    @property
    def end(self) -> int:
        """Tokens of each row, padding counted, up to the last query."""
        return self.start + self.call.q.shape[2]

    @property
    def before(self) -> Tensor:
        """``[B, N]``, all columns up to the last query that are tokens, whether or not their keys are held."""
        made: Tensor = self.memory[SHARED]["valid"]
        return made

    @property
    def cross(self) -> bool:
        """Whether the keys are of another sequence than the queries."""
        return self.call.site.kind == "cross"

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for all layers with the same tokens; see :class:`Memo`."""
        return self.memo.once(key, make)

    @property
    def query_positions(self) -> Tensor:
        """``[T]`` places of the queries in their row, padding counted."""
        made: Tensor = self.once(
            "query positions", lambda: torch.arange(self.start, self.end, device=self.call.q.device)
        )  # fmt: skip
        return made

    @property
    def key_positions(self) -> Tensor:
        """``[S]`` places of the keys in their row, padding counted; below 0 what an edit put in front."""
        size = self.call.k.shape[2]
        # a sliding-window cache holds the last keys only
        first = -self.call.prepended if self.cross else self.end - size
        device = self.call.q.device
        made: Tensor = self.once("key positions", lambda: torch.arange(first, first + size, device=device))
        return made

    def first(self) -> Tensor:
        """``[B, S]``, True at the first token of each row; all False where a sliding cache holds it no more."""

        def make() -> Tensor:
            first = self.keys & (self.keys.long().cumsum(1) == 1)
            return first & self.memory[SHARED]["whole"] if not self.cross else first

        made: Tensor = self.once("first", make)
        return made

    def columns(self, role: str) -> Tensor:
        """``[B, S]``, True for keys with the role that are no padding."""
        if role == "bos" and role not in (self.roles.source if self.cross else self.roles.spans):
            return self.first()
        made: Tensor = self.once(
            ("columns", role),
            lambda: self.roles.mask(role, self.key_positions, self.keys.shape[0], self.cross) & self.keys,
        )
        return made

    def rows(self, role: str) -> Tensor:
        """``[B, T]``, True for queries with the role that are no padding."""
        made: Tensor = self.once(
            ("rows", role), lambda: self.roles.mask(role, self.query_positions, self.valid.shape[0]) & self.valid
        )
        return made

    def add_mean(self, key: str, values: Tensor, rows: Tensor, own: bool = False) -> None:
        """Keep under ``key`` the :class:`RunningMean` of ``values [B, ..., T]`` over ``rows``, broadcastable.

        Args:
            key: of the memory.
            values: of each row.
            rows: boolean, those that count.
            own: they are of this layer alone, so that nothing of them is kept for others.
        """
        others, count = counted(rows) if own else self.memo.counted(rows)
        self.memory.setdefault(key, RunningMean()).add(values.masked_fill(others, 0).sum(-1), count, self.fresh)

    def add_tokens(self, key: str, values: Tensor, rows: Tensor) -> None:
        """Keep under ``key`` the :class:`PerToken` of ``values [B, T]``, NaN elsewhere than at ``rows [B, T]``."""
        others, _ = self.memo.counted(rows)
        self.memory.setdefault(key, PerToken()).add(values.masked_fill(others, torch.nan), self.fresh)
