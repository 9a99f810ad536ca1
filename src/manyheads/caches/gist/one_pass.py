# SPDX-License-Identifier: Apache-2.0
"""A whole text under gists in one forward, as it is trained.

All tokens come first and all gists behind them; the keys and values of gists stand there once more, turned to their
places in the memory, and the mask says who sees which: what segment by segment gives, in one pass.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...call import AttentionCall, Site
from ...errors import UserError
from ...strategy import AttentionEdit, Interleaved, LinearCompute
from .segments import visible
from .store import moved, plain
from .weights import GistPiece, Gists, check_site

__all__ = ["GistPass"]


@dataclass(frozen=True, kw_only=True)
class GistPass(LinearCompute, Interleaved, AttentionEdit):
    """A whole text in one forward under the explicit gist mask, without a cache: for training.

    Attributes:
        trained: the gists.
        gather: have the piece keep keys and values of its gists.
        latest: the piece of the latest forward.
    """

    trained: Gists = field(compare=False)
    gather: bool = False
    latest: list[GistPiece] = field(default_factory=list, compare=False)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal

    def selects_linear(self, name: str, layer: int | None) -> bool:
        return name in self.trained.layers

    def linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Callable[[Tensor], Tensor]:
        return self.trained.compute(weight, bias, name)

    def pieces(self, embeds: Tensor, seen: int, cached: bool) -> Iterator[GistPiece] | None:
        """Everything at once."""
        if self.trained.now.off:
            return None
        if cached:
            raise UserError("gists are trained on whole texts, without a cache: call the model with use_cache=False")
        return self._whole(embeds)

    def _whole(self, embeds: Tensor) -> Iterator[GistPiece]:
        self.trained.check(embeds)
        segments, size = self.trained.segments, embeds.shape[1]
        own = segments.gists_of(0, size // segments.length, embeds.device)
        columns, memory = segments.tokens(0, size, True, embeds.device).join(own), segments.memory_of(own)
        piece = GistPiece(
            torch.cat([embeds, self.trained.embedded(own, embeds)], 1), columns.position, size,
            visible(columns, columns.join(memory))[None, None], memory.position, columns=columns,
            keys={}, values={},
        )  # fmt: skip
        self.trained.now.piece = piece
        self.latest[:] = [piece]
        try:
            yield piece
        finally:
            self.trained.now.piece = None

    def edit(self, call: AttentionCall) -> AttentionCall:
        """The gists once more as the memory of later segments, and the mask."""
        piece = self.trained.now.piece
        if piece is None:
            return call
        check_site(call.site)
        k, v = call.k[:, :, piece.given :], call.v[:, :, piece.given :]
        if self.gather and piece.keys is not None and piece.values is not None:
            assert call.site.layer is not None
            piece.keys[call.site.layer], piece.values[call.site.layer] = plain(k, call, piece.given), v
        return call.replace(
            k=torch.cat([call.k, moved(k, call, piece)], 2), v=torch.cat([call.v, v], 2), mask=piece.mask,
            is_causal=False,
        )  # fmt: skip
