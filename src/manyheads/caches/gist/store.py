# SPDX-License-Identifier: Apache-2.0
"""What a layer remembers under gists: gists of the segments that are over, and the tokens of the one under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...attention import rope
from ...call import AttentionCall, Site, Store
from ...errors import UserError
from .segments import visible
from .weights import GistPiece

if TYPE_CHECKING:
    from . import Gist

__all__ = ["GistStore", "moved", "plain"]


def plain(keys: Tensor, call: AttentionCall, given: int) -> Tensor:
    """Keys of the gists of a call, ``[B, Hkv, G, d]`` behind ``given`` tokens, without their rotation."""
    if call.rotary is None:
        return keys
    return rope.unrotate(keys.to(torch.promote_types(keys.dtype, torch.float32)), _behind(call.rotary, given))


def moved(keys: Tensor, call: AttentionCall, piece: GistPiece) -> Tensor:
    """Keys of the gists of a call at their positions in the memory."""
    if piece.rotary is None or call.rotary is None:
        return keys
    return rope.rotate(plain(keys, call, piece.given), piece.rotary).to(keys.dtype)


def _behind(rotary: tuple[Tensor, Tensor], given: int) -> tuple[Tensor, Tensor]:
    return rotary[0][:, given:], rotary[1][:, given:]


class GistStore(Store):
    """The cache of one layer: memory first, then what has come of the segment under way."""

    covers_past: ClassVar[bool] = True

    def __init__(self, policy: Gist, site: Site, record: int = 0) -> None:
        super().__init__(site, record)
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        self._keys: Tensor | None = None  # [B, Hkv, m + n, d]
        self._values: Tensor | None = None
        self._memory = 0  # gists, m
        self._seen = 0

    @property
    def gists(self) -> int:
        """Gists in the memory."""
        return self._memory

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def rows(self) -> int | None:
        return None if self._keys is None else self._keys.shape[0]

    @property
    def keys(self) -> Tensor | None:
        return self._keys

    @property
    def values(self) -> Tensor | None:
        return self._values

    @property
    def held(self) -> list[Tensor | None]:
        return [self._keys, self._values]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._seen += self._piece.given
        self._keys = k if self._keys is None else torch.cat([self._keys, k], 2)
        self._values = v if self._values is None else torch.cat([self._values, v], 2)
        return self._keys, self._values

    def mask(self, call: AttentionCall) -> AttentionCall:
        """Give the call the gist mask ``[1, 1, T + G, m + n]`` of what is held; a single token sees it all."""
        piece = self._piece
        if call.q.shape[2] == 1:
            return call.replace(mask=None, is_causal=False)
        new, segments = piece.columns, self.policy.segments
        assert new is not None
        end, open_ = self._seen, self._keys.shape[2] - self._memory - len(new.gist)  # type: ignore[union-attr]
        device = call.q.device
        memory = segments.memory_of(segments.gists_of(0, self._memory // segments.gists, device))
        earlier = segments.tokens(end - piece.given - open_, end - piece.given, True, device)
        return call.replace(mask=visible(new, memory.join(earlier, new))[None, None], is_causal=False)

    def evict(self, call: AttentionCall) -> None:
        """At the end of a segment, keep its gists alone."""
        piece, k, v = self._piece, self._keys, self._values
        if not piece.closes or k is None or v is None:
            return
        gists = self.policy.segments.gists
        mine = moved(k[:, :, -gists:], call, piece)
        self._keys = torch.cat([k[:, :, : self._memory], mine], 2)
        self._values = torch.cat([v[:, :, : self._memory], v[:, :, -gists:]], 2)
        self._memory += gists

    def reorder(self, rows: Tensor) -> None:
        if self._keys is not None and self._values is not None:
            rows = rows.to(self._keys.device)
            self._keys, self._values = self._keys[rows], self._values[rows]

    def crop(self, count: int) -> None:
        """Forget the last tokens, as far as the segment under way goes."""
        if not count or self._keys is None or self._values is None:
            return
        if count > self._keys.shape[2] - self._memory:
            raise UserError("gist cannot go back into a segment that is over, its tokens are gone: use no assistant")
        self._keys, self._values = self._keys[:, :, :-count], self._values[:, :, :-count]
        self._seen -= count

    def state_dict(self) -> dict[str, Any]:
        return {"keys": self._keys, "values": self._values, "memory": self._memory, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._keys, self._values = state["keys"], state["values"]
        self._memory, self._seen = state["memory"], state["seen"]

    @property
    def _piece(self) -> GistPiece:
        piece = self.policy.trained.now.piece
        if piece is None:
            raise UserError(
                "a cache of gist is read with gist in use on the model: run it inside manyheads.use(model, 'gist:...')"
            )
        return piece
