# SPDX-License-Identifier: Apache-2.0
"""A reference block that fields share."""

from torch import Tensor, nn

__all__ = ["Transformer"]


class Transformer(nn.TransformerEncoderLayer):
    """A Transformer's block of torch, normalised before each part."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__(dim, heads, width, dropout, "gelu", batch_first=True, norm_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, T, dim]``, where ``mask [B, T]`` is True."""
        return super().forward(x, src_key_padding_mask=~mask)
