# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over words to which embeddings of their boxes are added: what Skim-Attention is compared with.

With ``position=rope`` it has the sum of LayoutLM (arXiv 1912.13318), order and boxes; with ``position=none`` the order
is replaced by the layout, the paper's BERT+SkimEmbeddings, but trained from scratch.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ...call import MixerConfig
from ...errors import UserError
from ...strategy import Mixer
from .._mixer import positions_of
from .._positions import Position, PositionedMixer, Positions
from .layout import LayoutEmbedding

__all__ = ["SkimEmbeddings"]


@dataclass(frozen=True, kw_only=True)
class SkimEmbeddings(Mixer):
    """Layout embeddings at the input of an encoder with softmax attention.

    Attributes:
        position: how attention is told of the order: ``rope``, ``t5`` or ``none``.
        resolution: rows of the tables of coordinates.
    """

    directions: ClassVar = ("bidirectional",)

    position: Position = field(default="rope", metadata={"help": "order of the text: rope, t5 or none"})
    resolution: int = field(default=1024, metadata={"help": "rows of the tables of coordinates"})

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal:
            raise UserError(f"{self.slug}: is of encoders, as the attention that it stands beside")
        mixer = PositionedMixer(config, Positions(self.position))
        return mixer if config.layer else _Embedded(config, self)


class _Embedded(PositionedMixer):
    """The first layer, which embeds the boxes for all."""

    def __init__(self, config: MixerConfig, strategy: SkimEmbeddings) -> None:
        super().__init__(config, Positions(strategy.position))
        self.layout = LayoutEmbedding(config.dim, "all", strategy.resolution)

    def prepare(
        self, x: Tensor, *, layout: Tensor | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The words ``x [B, T, dim]`` plus embeddings of their boxes ``layout [B, T, 4]``."""
        at = positions_of(x.shape[0], x.shape[1], x.device, mask, None, cu_seqlens)
        return x + self.layout(layout, at), {}
