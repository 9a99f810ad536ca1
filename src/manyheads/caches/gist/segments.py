# SPDX-License-Identifier: Apache-2.0
"""Where gists stand among the tokens of a text, what sees what, and at which positions.

Legend: L tokens of a segment, r tokens a gist stands for, t = L / r gists of a segment, T tokens, G gists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ...errors import UserError

__all__ = ["Columns", "Granularity", "Positions", "Segments", "visible"]

Granularity = Literal["fine", "coarse"]
Positions = Literal["compressed", "original"]


@dataclass(frozen=True)
class Columns:
    """Tokens and gists as attention sees them, each field ``[n]``.

    Attributes:
        segment: number of the segment.
        place: order within it, tokens at even numbers.
        gist: whether it is a gist.
        memory: whether it is one as later segments have it.
        sees_own: of a token: whether it sees gists of its own segment that stand before it.
        position: of its rotation.
    """

    segment: Tensor
    place: Tensor
    gist: Tensor
    memory: Tensor
    sees_own: Tensor
    position: Tensor

    def join(self, *others: Columns) -> Columns:
        """These, and then the others."""
        return Columns(*(torch.cat([getattr(x, f.name) for x in (self, *others)]) for f in fields(self)))


def visible(queries: Columns, keys: Columns) -> Tensor:
    """The gist mask ``[n queries, n keys]``, True = sees.

    A token or gist sees the memory of earlier segments, and of its own segment the tokens at or before it; gists of its
    own segment before it if it is a gist too, or a token that ``sees_own``.
    """
    segment, place = queries.segment[:, None], queries.place[:, None]
    own = (keys.segment == segment) & (keys.place <= place) & ~keys.memory
    own = own & (~keys.gist | (queries.gist | queries.sees_own)[:, None])
    return own | (keys.memory & (keys.segment < segment))


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The geometry of a text under gists.

    Attributes:
        length: L.
        ratio: r, a divisor of L.
        granularity: ``fine``, a gist after every r tokens, or ``coarse``, all behind the last token.
        positions: ``compressed``: a segment begins where the memory ends, i t, and in the memory gists stand at 0, 1,
            2, ...; ``original``: as in the text, a gist at the last token that it stands for.
    """

    length: int
    ratio: int
    granularity: Granularity = "fine"
    positions: Positions = "compressed"

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.length < 1 or self.length % self.ratio:
            raise UserError(
                f"gist: a segment of {self.length} tokens has no whole number of gists at {self.ratio} each"
            )

    @property
    def gists(self) -> int:
        """t."""
        return self.length // self.ratio

    def tokens(self, start: int, stop: int, last: bool, device: torch.device | str | None = None) -> Columns:
        """Tokens ``start`` to ``stop`` of the text.

        ``last``: nothing comes behind them yet, so that the segment of the last one, whole or not, is still read as if
        there were no gists.
        """
        at = torch.arange(start, stop, device=device)
        segment, within = at // self.length, at % self.length
        no = torch.zeros_like(at, dtype=torch.bool)
        sees = (segment < (stop - 1) // self.length) if last else ~no
        position = at if self.positions == "original" else segment * self.gists + within
        return Columns(segment, 2 * within, no, no, sees, position)

    def gists_of(self, first: int, stop: int, device: torch.device | str | None = None) -> Columns:
        """Gists of the segments ``first`` to ``stop``, as their own segment has them."""
        at = torch.arange(first * self.gists, stop * self.gists, device=device)
        segment, number = at // self.gists, at % self.gists
        ends = (number + 1) * self.ratio - 1  # the last token that it stands for
        fine = self.granularity == "fine"
        place = 2 * ends + 1 if fine else 2 * self.length + number
        if self.positions == "original":
            position = segment * self.length + ends
        else:
            position = segment * self.gists + (ends if fine else self.length + number)
        yes = torch.ones_like(at, dtype=torch.bool)
        return Columns(segment, place, yes, ~yes, yes, position)

    def memory_of(self, gists: Columns) -> Columns:
        """The same gists as later segments have them, at their positions there."""
        position = gists.position
        if self.positions == "compressed":
            number = gists.place // (2 * self.ratio) if self.granularity == "fine" else gists.place - 2 * self.length
            position = gists.segment * self.gists + number
        yes = torch.ones_like(gists.gist)
        return Columns(gists.segment, gists.place, yes, yes, yes, position)

    def mask(self, tokens: int, device: torch.device | str | None = None) -> Tensor:
        """The explicit mask of one pass, ``[T + G, T + G + G]``: tokens, gists, and the gists as memory."""
        own = self.gists_of(0, tokens // self.length, device)
        columns = self.tokens(0, tokens, True, device).join(own)
        return visible(columns, columns.join(self.memory_of(own)))
