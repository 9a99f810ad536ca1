# SPDX-License-Identifier: Apache-2.0
"""Attention at two resolutions: exact within the blocks that matter, by means of blocks everywhere else.

Zeng et al., "Multi Resolution Analysis (MRA) for Approximate Self-Attention", arXiv 2207.10284. With blocks of b tokens
and the means Q^, K^, V^ of queries, keys and values in them, the score of a pair of blocks is ``low = Q^ K^T * scale``.
Of all pairs of a head those of the greatest ``low - max of its row`` are refined, ``per_row`` a row on average:

    refined pairs   exp(scale * q_t . k_s)                 token by token
    other pairs     count_j * exp(low_ij), value V^_j      one number for the block (MRA-2); nothing (MRA-2-s, sparse)

divided by their sum: one softmax over tokens and blocks, so weights are positive and rows sum to 1. Refined pairs are
read by the block-sparse engine, whose log-sum-exp joins them to the rest. It needs no training: it is put in place of
the attention of an encoder as it is, or is a layer of one that is trained.

    with manyheads.use(model, "mra:per_row=4"):
        embeddings = model(**batch).last_hidden_state

Its cost is ``T b per_row`` pairs of tokens and ``(T / b)^2`` of blocks. With all blocks refined it is softmax, and so
it is wherever queries and keys are constant within blocks. In MRA-2-s a row of blocks of which none is refined gives 0;
with one block a row or more there is none, for the greatest score of each row ranks first.

Differs from the released code: exactly so many pairs are refined, where it drops all that tie with the last of them
from the coarse part, so that sums lack them (greatest scores of rows always tie); blocks of padding do not count for
the budget, so that a padded text gives what it gives alone; no 1e-6 in the denominators; any block size and any length,
the last block may be a part of one. As an edit of a model, blocks are counted from its first column. As a layer it has
rotary positions, before the means. ``choose=band`` and ``choose=random`` are controls of ours: the same number of pairs
about the diagonal, or by chance.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.block_pattern import BlockPattern
from ..attention.masks import each_text
from ..attention.patterns import block_means
from ..attention.positions import rope_tables
from ..attention.reference import repeat_kv
from ..attention.sparse import block_sparse_attention, merge
from ..call import AttentionCall, MixerConfig, Site
from ..errors import UserError
from ..strategy import AttentionCompute, Mixer
from ._mixer import projections, split_heads, whole

__all__ = ["MRA", "mra_attention", "refined_blocks"]

Choose = Literal["score", "band", "random"]
_BEFORE_ALL = 5e3  # added to the score of what is always refined, as in the released code


def refined_blocks(
    low: Tensor, real: Tensor, per_row: float, *, first: int = 0, band: int = 0, choose: Choose = "score"
) -> Tensor:
    """Which pairs of blocks are read token by token.

    Args:
        low: ``[B, H, n, n]`` scores of pairs of blocks.
        real: ``[B, n]``, blocks that hold tokens.
        per_row: pairs for each row of real blocks, on average.
        first, band: rows and columns at the beginning, and diagonals (an odd number), that come before all others.
        choose: ``score``; or, as controls, ``band`` (nearest to the diagonal) or ``random`` (by a fixed seed).

    Returns:
        Booleans ``[B, H, n, n]``.
    """
    at = torch.arange(low.shape[-1], device=low.device)
    apart = (at[:, None] - at).abs()
    pairs = (real[:, :, None] & real[:, None])[:, None]
    score = low.detach().masked_fill(~pairs, -torch.inf)
    score = (score - score.amax(-1, keepdim=True)).nan_to_num(-torch.inf)
    if choose == "band":
        score = -(apart + at / (2 * len(at))).to(low.dtype).expand_as(low)
    if choose == "random":
        generator = torch.Generator().manual_seed(0)
        score = torch.rand(low.shape[1:], generator=generator).to(low.device, low.dtype).expand_as(low)
    prior = (apart <= band // 2) & (band > 0) | (at < first) | (at[:, None] < first)
    score = (score + _BEFORE_ALL * prior).masked_fill(~pairs, -torch.inf).flatten(2)
    held = real.sum(1)
    budget = torch.minimum((per_row * held).round().long(), held**2)
    rank = torch.zeros_like(score, dtype=torch.long)
    order = score.argsort(dim=2, descending=True, stable=True)
    rank.scatter_(2, order, torch.arange(score.shape[2], device=low.device).expand_as(order))
    return (rank < budget[:, None, None]).view_as(low)


def mra_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, per_row: float = 4, block: int = 32, sparse: bool = False,
    first: int = 0, band: int = 0, choose: Choose = "score", valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Bidirectional attention at two resolutions.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, T, d]``; each head for H / Hkv query heads.
        scale: factor on ``q k^T``.
        per_row: blocks refined for each row of blocks, on average over a head.
        block: tokens of a block.
        sparse: leave out what is not refined (MRA-2-s).
        first, band, choose: as for :func:`refined_blocks`.
        valid: ``[B, T]``, True for tokens; what stands elsewhere must be finite.

    Returns:
        ``[B, H, T, dv]`` in the dtype of q; gradients to q, k and v, also through the means, but not through the
        choice. A query that sees nothing gives 0.
    """
    batch, heads, length, _ = q.shape
    k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    q_mean, k_mean, v_mean = (block_means(x, block, valid) for x in (q, k, v))
    here = torch.ones(batch, length, dtype=torch.bool, device=q.device) if valid is None else valid
    counts = torch.nn.functional.pad(here, (0, -length % block)).unflatten(1, (-1, block)).sum(2)
    low = q_mean @ k_mean.mT * scale
    chosen = refined_blocks(low, counts > 0, per_row, first=first, band=band, choose=choose)
    pattern = BlockPattern.from_blocks(chosen, length, length, block_q=block, block_k=block)
    fine, lse = block_sparse_attention(q, k, v, pattern, scale=scale, causal=False, valid=valid, lse=True)
    if sparse:
        return fine
    rest = ~chosen & (counts > 0)[:, None, None]
    some = rest.any(-1)
    x = (low + counts.clamp(min=1).to(low.dtype).log()[:, None, None]).masked_fill(~rest, -torch.inf)
    x = x.masked_fill(~some[..., None], 0.0)
    coarse, rest_lse = x.softmax(-1) @ v_mean, x.logsumexp(-1).masked_fill(~some, -torch.inf)
    coarse, rest_lse = (y.repeat_interleave(block, 2)[:, :, :length] for y in (coarse, rest_lse))
    return merge([fine, coarse], [lse, rest_lse])[0]


@dataclass(frozen=True, kw_only=True)
class MRA(AttentionCompute, Mixer):
    """Attention at two resolutions, MRA-2 and MRA-2-s.

    Attributes:
        per_row: blocks refined for each row of blocks, on average.
        block: tokens of a block.
        sparse: MRA-2-s, without the coarse part.
        first, band: blocks at the beginning, and diagonals of blocks, that are always refined.
        choose: ``score``, or the controls ``band`` and ``random``.
    """

    directions: ClassVar = ("bidirectional",)

    per_row: float = field(default=4, metadata={"help": "blocks refined for each row of blocks, on average"})
    block: int = field(default=32, metadata={"help": "tokens of a block"})
    sparse: bool = field(default=False, metadata={"help": "MRA-2-s: leave out what is not refined"})
    first: int = field(default=0, metadata={"help": "blocks at the beginning that are always refined"})
    band: int = field(default=0, metadata={"help": "diagonals of blocks that are always refined, an odd number"})
    choose: Choose = field(default="score", metadata={"help": "score, or the controls band and random"})

    def __post_init__(self) -> None:
        if self.per_row < 0 or self.block < 1 or min(self.first, self.band) < 0:
            raise UserError(f"{self.slug}: blocks count tokens and budgets blocks: {self.spec}")
        if self.sparse and self.per_row == 0:
            raise UserError(f"{self.slug}: without blocks and without their means there is nothing to attend to")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.kind == "self" and not site.causal

    def attend(self, call: AttentionCall) -> Tensor:
        call.require_softmax()
        if call.bias is not None or call.softcap is not None or call.sinks is not None or call.is_causal:
            raise UserError(f"{self.slug}: {call.site.name} has a bias, cap, sinks or is causal: block means miss that")
        if call.dropout:
            raise UserError(f"{self.slug}: has no dropout on weights; set attention dropout to 0")
        return self.attention(call.q, call.k, call.v, call.scale, _keys(call)).transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None) -> Tensor:
        """See :func:`mra_attention`."""
        return mra_attention(
            q, k, v, scale=scale, per_row=self.per_row, block=self.block, sparse=self.sparse, first=self.first,
            band=self.band, choose=self.choose, valid=valid,
        )  # fmt: skip

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal:
            raise UserError("mra: means of blocks tell of tokens to come; it is encoder attention")
        return Attention(config, self)


def _keys(call: AttentionCall) -> Tensor | None:
    """Which keys are tokens ``[B, T]``, of a mask that is the same for all queries and heads."""
    if call.k.shape[2] != call.q.shape[2]:
        raise UserError(f"mra: {call.site.name} has {call.q.shape[2]} queries for {call.k.shape[2]} keys; it needs all")
    if call.mask is None:
        return None
    batch, _, length, _ = call.q.shape
    mask = call.mask.expand(batch, -1, length, length)
    valid = mask.any(1).any(1)
    queries = valid[:, None, :, None]  # of padding may see anything
    if bool((queries & (mask != valid[:, None, None])).any()):
        raise UserError(f"mra: the mask of {call.site.name} is not padding alone, which means of blocks miss")
    return valid


class Attention(nn.Module):
    """A layer of an encoder, with rotary positions."""

    def __init__(self, config: MixerConfig, strategy: MRA) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections(config)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Output ``[B, T, dim]`` of ``x [B, T, dim]``, padded anywhere by ``mask`` or packed; there is no state."""
        whole(state)
        return each_text(self._text, x, mask, cu_seqlens), None

    def _text(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        config, at = self.config, torch.arange(x.shape[1], device=x.device)[None]
        q = split_heads(self.q_proj(x), config.num_heads)
        k, v = (split_heads(p(x), config.num_kv_heads) for p in (self.k_proj, self.v_proj))
        tables = rope_tables(at, config.head_dim)
        q, k = (rope.rotate(y, tables).to(y.dtype) for y in (q, k))
        valid = None if lengths is None else at < lengths[:, None]
        out = self.strategy.attention(q, k, v, config.head_dim**-0.5, valid)
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y
