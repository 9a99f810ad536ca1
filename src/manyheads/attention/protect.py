# SPDX-License-Identifier: Apache-2.0
"""Spans of tokens that no cache strategy may drop: a system prompt, the schema of a tool.

    protect = "system"                          the tokens of the system message, found where there are messages
            | span {"+" span} {"/" ...}         "0-39+60-70": those tokens of every row; "/" parts the rows of a batch

In Python a span is ``(start, stop)``, as in a slice: ``[(0, 40), (60, 71)]`` for every row, or a list of such for each.
Tokens are counted within their row, padding left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from ..errors import UserError

__all__ = ["Protect", "Protected", "as_protect", "within"]

_HOW = "write protect=0-39+60-70, or protect=system"


@dataclass(frozen=True)
class Protected:
    """What may not be dropped; its text is what a spec says.

    Attributes:
        rows: spans ``(start, stop)`` of each row, one list for every row, or none.
        system: the span of the system message, which is not known yet: see ``Cache.protecting``.
    """

    rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    system: bool = False

    def __bool__(self) -> bool:
        return self.system or any(self.rows)

    def __str__(self) -> str:
        if self.system:
            return "system"
        return "/".join("+".join(f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in row) for row in self.rows)

    def check(self) -> None:
        """Raise UserError where the system message was not found yet."""
        if self.system:
            raise UserError(
                "protect=system is known where there are messages: in generate, ask and the chat tasks; elsewhere give "
                "the tokens, as protect=[(0, 40)], which manyheads.models.chat.system_span finds"
            )

    def tensor(self, batch: int, device: torch.device) -> Tensor | None:
        """Spans of each row ``[batch, n, 2]`` int64, (0, 0) where a row has fewer; None where there are none.

        Rows are repeated, each in place, where a batch holds them several times, as ``generate`` does.

        Raises:
            UserError: the batch has other rows, or the system message was not found yet.
        """
        if not self:
            return None
        self.check()
        if batch % len(self.rows):
            raise UserError(f"protect names {len(self.rows)} rows, and the batch has {batch}: give one, or as many")
        most = max(map(len, self.rows))
        spans = torch.tensor([[*row, *[(0, 0)] * (most - len(row))] for row in self.rows], device=device)
        return spans.repeat_interleave(batch // len(self.rows), 0)


def as_protect(value: Any) -> Protected:
    """Read what is to be protected, as the module says.

    Raises:
        UserError: it is no list of spans.
    """
    if isinstance(value, Protected):
        return value
    if isinstance(value, str):
        text = value.strip()
        if text == "system":
            return Protected(system=True)
        value = [_spans(row) for row in text.split("/")] if text else None
    if value is None:
        return Protected()
    if not isinstance(value, Sequence):
        raise UserError(f"protect is a list of spans (start, stop), not {value!r}: {_HOW}")
    flat = bool(value) and isinstance(value[0], Sequence) and len(value[0]) > 0 and isinstance(value[0][0], int)
    return Protected(_rows([value] if flat else value))


def _rows(rows: Any) -> tuple[tuple[tuple[int, int], ...], ...]:
    made = []
    for row in rows:
        try:
            spans = tuple((int(start), int(stop)) for start, stop in row)
        except (TypeError, ValueError):
            raise UserError(f"protect: {row!r} is no list of spans (start, stop): {_HOW}") from None
        if wrong := next((span for span in spans if not 0 <= span[0] < span[1]), None):
            raise UserError(f"protect: {wrong} holds no token, a span starts at 0 or later and stops behind it")
        made.append(spans)
    return tuple(made)


def _spans(text: str) -> list[tuple[int, int]]:
    spans = []
    for part in filter(None, text.split("+")):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"protect: {part!r} is no span: {_HOW}")
        spans.append((int(first), int(last if dash else first) + 1))
    return spans


def within(positions: Tensor, spans: Tensor) -> Tensor:
    """Whether ``positions [B, ...]`` lie in any of their row's ``spans [B, n, 2]``; bool of the same shape."""
    spans = spans.unflatten(0, (-1, *[1] * (positions.ndim - 1)))  # [B, 1, ..., n, 2]
    at = positions[..., None]
    return ((at >= spans[..., 0]) & (at < spans[..., 1])).any(-1)


Protect = Annotated[Protected, BeforeValidator(as_protect)]
