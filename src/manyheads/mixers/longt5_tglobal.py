# SPDX-License-Identifier: Apache-2.0
"""LongT5's encoder attention: a window around each token, and summaries of all blocks that are made on the fly.

Guo et al., "LongT5: Efficient Text-To-Text Transformer for Long Sequences", arXiv 2112.07916. With x the input of the
attention, k tokens of a block, and radius r:

    g_b       = RMSNorm(sum of x over block b)              no token of its own; gone after the layer
    query t   sees the keys at |t - s| <= r and all g_b, in one softmax, with one set of K and V projections
    bias      T5's 32 buckets of s - t, and a second table of 32 of b - block(t)

Sums, not means, and a learned scale; tokens behind the last whole block belong to it, and a text of less than k tokens
has no summaries. ``block=0`` is the paper's Local attention, which has neither.

It is encoder attention. The paper's decoder attends in full and no causal form is given: a block's sum would tell of
tokens to come. So a Decoder refuses it.

Differs from the released code: T5 leaves out ``1 / sqrt(head_dim)`` and starts W_q smaller by it; here the factor
stays, as in the softmax it is measured against, so T5's W_q is loaded times ``sqrt(head_dim)``. Every layer has bias
tables of its own, where T5 shares those of its first. Blocks are counted from the first token of a text wherever its
padding stands (in transformers, from the first column). The cost is ``T (3 r + T / k)``: linear up to some 3 r k, here
6,000 tokens, and quadratic with a factor of 1 / k beyond. Grouped queries are ours.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention.local_global import block_sums, blocks_and_counts, local_global_attention
from ..attention.masks import each_text
from ..attention.positions import t5_buckets
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import projections, split_heads, whole

__all__ = ["TransientGlobal"]

_BUCKETS = 32


@dataclass(frozen=True, kw_only=True)
class TransientGlobal(Mixer):
    """Local attention with transient globals, for encoders.

    Attributes:
        radius: tokens seen on either side.
        block: tokens of a summary; 0 for none, the paper's Local attention.
    """

    directions: ClassVar = ("bidirectional",)

    radius: int = field(default=127, metadata={"help": "tokens seen on either side"})
    block: int = field(default=16, metadata={"help": "tokens of a block that is summed up; 0: no summaries"})

    def __post_init__(self) -> None:
        if self.radius < 0 or self.block < 0:
            raise UserError(f"longt5_tglobal: radius and block count tokens, not {self.radius} and {self.block}")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal:
            raise UserError("longt5_tglobal: is encoder attention; the paper has no causal form")
        return Attention(config, self)


class Attention(nn.Module):
    """Multi-head attention over a window and summaries."""

    def __init__(self, config: MixerConfig, strategy: TransientGlobal) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections(config)
        self.buckets = nn.Embedding(_BUCKETS, config.num_heads)
        if strategy.block:
            self.side_buckets = nn.Embedding(_BUCKETS, config.num_heads)
            self.side_norm = nn.RMSNorm(config.dim, eps=1e-6)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Output ``[B, T, dim]`` of ``x [B, T, dim]``, padded anywhere by ``mask`` or packed; there is no state."""
        whole(state)
        return each_text(self._attend, x, mask, cu_seqlens), None

    def _attend(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Texts ``x [N, T, dim]`` that begin at column 0, of ``lengths [N]``."""
        config, size, length = self.config, self.strategy.block or x.shape[1] + 1, x.shape[1]
        window, count = min(self.strategy.radius + 1, length), x.shape[1] // size
        ends = torch.full(x.shape[:1], length, device=x.device) if lengths is None else lengths
        side = x.new_zeros(len(x), 0, x.shape[2])
        side_bias = x.new_zeros(config.num_heads, 1)
        if count:
            side = self.side_norm(block_sums(x, blocks_and_counts(ends, size, length)[0], count).to(x.dtype))
            side_bias = self._table(self.side_buckets, count)
        k, v, side_k, side_v = (
            split_heads(p(y), config.num_kv_heads) for y in (x, side) for p in (self.k_proj, self.v_proj)
        )
        out = local_global_attention(
            split_heads(self.q_proj(x), config.num_heads), k, v, side_k, side_v, scale=config.head_dim**-0.5,
            window=window, size=size, bias=self._table(self.buckets, window), side_bias=side_bias, lengths=lengths,
        )  # fmt: skip
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y

    def _table(self, buckets: nn.Embedding, reach: int) -> Tensor:
        """Biases ``[H, 2 reach - 1]`` by distance."""
        apart = torch.arange(1 - reach, reach, device=buckets.weight.device)
        return buckets.weight[t5_buckets(apart, _BUCKETS, causal=False)].T
