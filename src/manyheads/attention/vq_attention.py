# SPDX-License-Identifier: Apache-2.0
"""Attention over keys that are codewords, linear in the length; and codebooks that follow their keys.

Where every key is one of S codewords, keys that are alike need one score: softmax over all keys is softmax over the
codewords, each with the log of how many keys it stands for as a bias and the mean of their values as its value
(Transformer-VQ, arXiv 2309.16354):

    o_t = sum_s n_s exp(q_t C_s) mean_s / sum_s n_s exp(q_t C_s)        cost T S (d + dv)

A text is cut into blocks of L tokens. What is near, a query's own block and the one before it (and the one behind it,
where both sides are seen), is read key by key, with a bias by distance; what is farther is read by codeword. All of it
is one softmax, which is dense softmax over the quantised keys. ``block=0`` reads everything by codeword.

Legend: B rows, H heads, T tokens, S codewords, L tokens of a block, n blocks, W columns of a window: 2 L or 3 L.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from . import product_codes
from .masks import neighbours
from .reference import softmax, widened

__all__ = ["VQState", "bias_size", "codewords", "follow", "quantize", "vq_attention"]

_GOLDEN = (5**0.5 - 1) / 2
_LEAST = 0.01  # of a count that divides, as in Transformer-VQ


@dataclass(frozen=True, slots=True)
class VQState:
    """What causal attention remembers; its size does not depend on the length.

    Attributes:
        k, v: ``[B, H, 2 L, d]``, the block before the one that is begun, and that.
        codes: ``[B, H, 2 L]`` of those keys; None without codewords.
        counts, sums: ``[B, H, S]`` and ``[B, H, S, dv]``, keys of each codeword before, and the sum of their values.
        seen: ``[B]`` tokens so far.
    """

    k: Tensor
    v: Tensor
    codes: Tensor | None
    counts: Tensor | None
    sums: Tensor | None
    seen: Tensor

    def reorder(self, rows: Tensor) -> "VQState":
        codes, counts, sums = (None if x is None else x[rows] for x in (self.codes, self.counts, self.sums))
        return VQState(self.k[rows], self.v[rows], codes, counts, sums, self.seen[rows])

    def detach(self) -> "VQState":
        sums = None if self.sums is None else self.sums.detach()
        return VQState(self.k.detach(), self.v.detach(), self.codes, self.counts, sums, self.seen)

    @property
    def nbytes(self) -> int:
        held = (self.k, self.v, self.codes, self.counts, self.sums, self.seen)
        return sum(x.nbytes for x in held if x is not None)


def bias_size(block: int, causal: bool) -> int:
    """Distances between a query and what it reads key by key."""
    return 2 * block if causal else 4 * block - 1


def codewords(sums: Tensor, counts: Tensor) -> Tensor:
    """``[H, S, d]`` of running sums ``[H, S, d]`` and counts ``[H, S]``: their means."""
    return sums / counts.clamp(min=_LEAST)[..., None]


def quantize(k: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[B, H, T]`` of the codewords ``[H, S, d]`` nearest to ``k [B, H, T, d]``, and these in its place."""
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        table = codebook[None, :, None]
        codes = product_codes.encode(k, table)
        return codes[:, :, 0].long(), product_codes.decode(codes, table).to(k.dtype)


@torch.no_grad()
def follow(
    sums: Tensor, counts: Tensor, k: Tensor, codes: Tensor, *, gamma: float, dead: float = 0.0,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Running sums ``[H, S, d]`` and counts ``[H, S]`` of codewords after keys that took them; their means follow.

    Args:
        sums, counts: before.
        k, codes: ``[B, H, T, d]`` and ``[B, H, T]``.
        gamma: share of what was that stays; with 0 a codeword is the mean of its keys, one step of Lloyd's.
        dead: a codeword of a lower count becomes one of these keys with a count of 1. Keys are taken by multiples of
            the golden ratio, spread over rows and places alike; nothing is drawn.
        valid: ``[B, T]``, True for tokens.
    """
    with torch.autocast(k.device.type, enabled=False):
        k = k.detach().to(sums.dtype)
        here = k.new_ones(len(k), k.shape[2]) if valid is None else valid.to(k.dtype)
        taken = one_hot(codes, sums.shape[1]).to(k.dtype) * here[:, None, :, None]  # [B, H, T, S]
        counts = gamma * counts + (1 - gamma) * taken.sum((0, 2))
        sums = gamma * sums + (1 - gamma) * (taken.mT @ k).sum(0)
        keys, size = k.transpose(0, 1).flatten(1, 2), sums.shape[1]  # [H, B * T, d]
        order = here.flatten().argsort(descending=True, stable=True)  # tokens first
        spread = torch.arange(1, size + 1, device=k.device, dtype=torch.float64) * _GOLDEN % 1 * here.sum()
        fresh = keys[:, order[spread.long().clamp(max=len(order) - 1)]]
        gone = (counts < dead) & (here.sum() > 0)
        return torch.where(gone[..., None], fresh, sums), counts.masked_fill(gone, 1.0)


def vq_attention(
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor | None = None, codebook: Tensor | None = None, *, block: int,
    scale: float = 1.0, causal: bool = True, bias: Tensor | None = None, lengths: Tensor | None = None,
    state: VQState | None = None, impl: Literal["auto", "blocks", "dense"] = "auto",
) -> tuple[Tensor, VQState | None]:  # fmt: skip
    """Softmax attention of texts that begin at column 0, what is far by codeword.

    Args:
        q: ``[B, H, T, d]``.
        k: ``[B, H, T, d]``, quantised keys; gradients reach those that are read key by key.
        v: ``[B, H, T, dv]``.
        codes: ``[B, H, T]`` of the keys; None to see nothing but what is near.
        codebook: ``[H, S, d]``.
        block: tokens of a block; 0, where both sides are seen, to read all by codeword.
        scale: factor on ``q k^T``.
        causal: the past only.
        bias: ``[bias_size(block, causal)]``, added to scores of what is near: by the distance of the key before the
            query from 0 on, or from ``1 - 2 block`` on where both sides are seen.
        lengths: ``[B]`` tokens of each text; None for T.
        state: what came before, of a causal call.
        impl: ``blocks`` is the linear form; ``dense`` reads every key, for the same answer, which costs less in texts
            that have few keys beside their codewords; ``auto`` takes that for these.

    Returns:
        ``[B, H, T, dv]``, and the state after the last token of each text, None where both sides are seen.
    """
    length, device = q.shape[2], q.device
    ends = torch.full(q.shape[:1], length, device=device) if lengths is None else lengths
    if codebook is None or codes is None:
        codebook = codes = None
    size = 0 if codebook is None else codebook.shape[1]
    if not block:
        assert not causal and codes is not None and codebook is not None
        return _all_by_code(q, v, codes, codebook, ends, scale), None
    if state is not None and length == 1:
        return _step(q, k, v, codes, codebook, block, scale, bias, ends, state)
    grid = _Grid(block, length, ends, None if state is None else state.seen, causal)
    few = 2 * block + size * (1 + 2 * v.shape[3] // block)  # a block has sums of values beside its scores
    if state is None and (impl == "dense" or (impl == "auto" and 1 < length <= few)):
        out = _by_key(q, k, v, block, scale, causal, bias, ends, size > 0)
        if not causal:
            return out, None
        far = (torch.arange(length, device=device) < (ends[:, None] // block - 1) * block)[:, None, None]
        counts, sums = (None, None) if codes is None else _by_code(codes[:, :, None], v[:, :, None], far, size)
        counts, sums = (None if x is None else x[:, :, 0] for x in (counts, sums))
        codes = None if codes is None else grid.keys(codes[..., None])[..., 0]
        return out, grid.after(grid.keys(k), grid.keys(v), codes, counts, sums)
    k = grid.keys(k, None if state is None else state.k)
    v = grid.keys(v, None if state is None else state.v)
    counts, sums = None, None
    if codes is not None:
        before = None if state is None or state.codes is None else state.codes[..., None]
        codes = grid.keys(codes[..., None], before)[..., 0]
        counts, sums = _by_code(codes, v, grid.valid[:, None], size)
        if causal:
            counts = _earlier(counts, None if state is None else state.counts)
            sums = _earlier(sums, None if state is None else state.sums)
        else:
            counts, sums = _elsewhere(counts), _elsewhere(sums)
    columns = torch.arange((2 if causal else 3) * block, device=device)
    apart = (block + torch.arange(block, device=device))[None, None, :, None] - columns  # [1, 1, L, W]
    seen = neighbours(grid.valid[:, None, ..., None], causal)[..., 0][:, 0, grid.first :, None]
    allowed = seen & (apart >= 0) if causal else seen.expand(-1, -1, block, -1)
    added = None if bias is None else _biases(bias, apart, causal)
    near_k, near_v = (neighbours(x, causal)[:, :, grid.first :] for x in (k, v))
    of_queries = (x if x is None else x[:, :, grid.first : grid.first + near_k.shape[2]] for x in (counts, sums))
    out = grid.back(_joint(grid.queries(q), near_k, near_v, allowed[:, None], added, scale, codebook, *of_queries))
    if not causal:
        return out, None
    return out, grid.after(k, v, codes, grid.behind(counts), grid.behind(sums))


def _biases(bias: Tensor, apart: Tensor, causal: bool) -> Tensor:
    """By distance, query less key; what is too far for ``bias`` gets something."""
    return bias[(apart if causal else apart + len(bias) // 2).clamp(0, len(bias) - 1)]


def _by_key(
    q: Tensor, k: Tensor, v: Tensor, block: int, scale: float, causal: bool, bias: Tensor | None, ends: Tensor,
    far: bool,
) -> Tensor:  # fmt: skip
    """Dense attention; keys that are far are constants, as codewords are."""
    at = torch.arange(q.shape[2], device=q.device)
    apart, near = at[:, None] - at, ((at // block)[:, None] - at // block).abs() <= 1
    x = widened(q @ k.mT)
    if far and k.requires_grad:
        x = torch.where(near, x, widened(q @ k.detach().mT))
    x = x * scale if bias is None else x * scale + _biases(bias, apart, causal) * near
    seen = (near | far) & ((apart >= 0) | (not causal)) & (at < ends[:, None, None, None])
    out: Tensor = softmax(x, seen.expand(x.shape)).to(v.dtype) @ v
    return out


def _all_by_code(q: Tensor, v: Tensor, codes: Tensor, codebook: Tensor, ends: Tensor, scale: float) -> Tensor:
    """``[B, H, T, dv]`` of a text that is one block, of which nothing is read key by key."""
    here = (torch.arange(v.shape[2], device=v.device) < ends[:, None])[:, None, None]
    counts, sums = _by_code(codes[:, :, None], v[:, :, None], here, codebook.shape[1])
    none, nobody = q.new_zeros(*q.shape[:2], 1, 0, q.shape[3]), here[..., None, :0]
    out = _joint(q[:, :, None], none, v[:, :, None, :0], nobody, None, scale, codebook, counts, sums)
    return out[:, :, 0]


def _step(
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor | None, codebook: Tensor | None, block: int, scale: float,
    bias: Tensor | None, ends: Tensor, state: VQState,
) -> tuple[Tensor, VQState]:  # fmt: skip
    """One more token of each text, or of some (``ends [B]`` is 0 or 1)."""
    begun, columns = state.seen % block, torch.arange(2 * block, device=q.device)
    apart = (block + begun)[:, None] - columns  # [B, 2 L]
    older = state.seen >= block  # there is a block before
    seen = (apart >= 0) & ((columns >= block) | older[:, None])
    full = (ends > 0) & (begun == block - 1)  # after this token the block is the one before

    def put(held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """With the new token ``[B, H, 1, d]``, and as it will be kept."""
        place = (block + begun)[:, None, None, None].expand_as(new)
        now = held.scatter(2, place, new.to(held.dtype))
        return now, torch.where(full[:, None, None, None], now.roll(-block, 2), now)

    (near_k, kept_k), (near_v, kept_v) = put(state.k, k), put(state.v, v)
    added = None if bias is None else _biases(bias, apart, True)[:, None, None]
    counts, sums, kept = state.counts, state.sums, state.codes
    far = (None if x is None else x[:, :, None] for x in (counts, sums))
    out = _joint(
        q[:, :, None], near_k[:, :, None], near_v[:, :, None], seen[:, None, None, None], added, scale, codebook, *far
    )
    if counts is not None and sums is not None and kept is not None and codes is not None:
        share = (full & older)[:, None, None].to(sums.dtype)
        old = kept[:, :, :block]
        counts = counts.scatter_add(2, old, share.expand(old.shape))
        values = widened(near_v[:, :, :block]) * share[..., None]
        sums = sums.scatter_add(2, old[..., None].expand(values.shape), values.to(sums.dtype))
        kept = put(kept[..., None], codes[..., None])[1][..., 0]
    return out[:, :, 0], VQState(kept_k, kept_v, kept, counts, sums, state.seen + ends)


def _joint(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None, scale: float,
    codebook: Tensor | None = None, counts: Tensor | None = None, sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One softmax over ``k [B, H, n, W, d]`` and codewords ``[H, S, d]``: ``[B, H, n, Lq, dv]``."""
    x = widened(q @ k.mT) * scale
    x = x if bias is None else x + bias.unsqueeze(-4)
    allowed = allowed.expand(x.shape)
    if codebook is None or counts is None or sums is None:
        alone: Tensor = softmax(x, allowed).to(v.dtype) @ v
        return alone
    far = widened(q @ codebook[:, None].to(q.dtype).mT) * scale + counts.clamp(min=1).log()[..., None, :]
    some = (counts > 0)[..., None, :].expand(far.shape)
    weights = softmax(torch.cat([x, far], -1), torch.cat([allowed, some], -1)).to(v.dtype)
    near, rest = weights.split([x.shape[-1], far.shape[-1]], -1)
    means = sums / counts.clamp(min=1)[..., None]
    out: Tensor = near @ v + rest @ means.to(v.dtype)
    return out


def _by_code(codes: Tensor, v: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Keys of each codeword in each block ``[B, H, n, S]``, and the sums of their values ``[B, H, n, S, dv]``.

    ``codes [B, H, n, L]``, ``v [B, H, n, L, dv]`` and ``valid [B, 1, n, L]``; no codeword is counted in bfloat16.
    """
    taken = one_hot(codes, size).to(widened(v[..., :0]).dtype) * valid[..., None]
    return taken.sum(-2), widened(taken.to(v.dtype).mT @ v)


def _earlier(x: Tensor, begun: Tensor | None = None) -> Tensor:
    """Of blocks ``x [B, H, n, ...]`` the sums of those before the last but one, ``[B, H, n + 1, ...]``.

    Entry j is what a query in block j reads by codeword: ``begun``, and blocks up to j - 2.
    """
    first = torch.zeros_like(x[:, :, :1]) if begun is None else begun[:, :, None].to(x.dtype)
    total = torch.cat([first, first + x.cumsum(2)], 2)  # before block j
    return torch.cat([first, total[:, :, :-1]], 2)


def _elsewhere(x: Tensor) -> Tensor:
    """Of blocks ``x [B, H, n, ...]`` the sums of those that are neither the same nor beside it, likewise."""
    return _earlier(x)[:, :, :-1] + _earlier(x.flip(2))[:, :, :-1].flip(2)


class _Grid:
    """Tokens laid out by block: those of the state before the new ones, so that blocks begin where they would."""

    def __init__(self, block: int, length: int, ends: Tensor, seen: Tensor | None, causal: bool) -> None:
        self.block, self.length, self.device = block, length, ends.device
        self.first = int(causal)  # blocks without queries
        self.begun = None if seen is None else seen % block  # tokens in the block that is begun
        self.seen, self.ends = torch.zeros_like(ends) if seen is None else seen, ends
        self.count = -(-(length + (0 if seen is None else block - 1)) // block)  # blocks of queries
        columns = torch.arange(self.count * block, device=ends.device)
        here = columns < ((0 if self.begun is None else self.begun) + ends)[:, None]
        if causal:
            here = torch.cat([(self.seen >= block)[:, None].expand(-1, block), here], 1)
        self.valid = here.unflatten(1, (-1, block))  # [B, n, L]
        first = 0 if self.begun is None else self.begun[:, None]
        self.last = (
            (0 if self.begun is None else self.begun) + ends
        ) // block  # the block before that of the next token
        self.order = columns - first  # number of the new token, below 0 for those of the state

    def keys(self, new: Tensor, held: Tensor | None = None) -> Tensor:
        """``new [B, H, T, d]`` behind what the state holds ``[B, H, 2 L, d]``: ``[B, H, n, L, d]``."""
        wide = self.count * self.block
        if held is None:
            x = pad(new, (0, 0, self.first * self.block, wide - self.length))
        else:
            assert self.begun is not None
            old = torch.arange(wide, device=self.device) < self.begun[:, None]
            place = torch.where(old, torch.arange(wide, device=self.device) + self.block, self.order + 2 * self.block)
            both = torch.cat([held.to(new.dtype), new], 2)
            x = torch.cat([both[:, :, : self.block], _take(both, place.clamp(max=both.shape[2] - 1))], 2)
        return _parted(x, self.block)

    def queries(self, q: Tensor) -> Tensor:
        """``[B, H, n, Lq, d]`` of ``q [B, H, T, d]``."""
        if self.begun is None:
            return _parted(pad(q, (0, 0, 0, self.count * self.block - self.length)), self.block)
        return _parted(_take(q, self.order.clamp(0, self.length - 1)), self.block)

    def back(self, out: Tensor) -> Tensor:
        """``[B, H, T, dv]`` of what queries give."""
        out = out.flatten(2, 3)
        if self.begun is None:
            return out[:, :, : self.length]
        return _take(out, self.begun[:, None] + torch.arange(self.length, device=self.device))

    def behind(self, by_block: Tensor | None) -> Tensor | None:
        """Of what :func:`_earlier` gives, that of the next token."""
        rows = torch.arange(len(self.ends), device=self.device)
        return None if by_block is None else by_block[rows, :, self.last + 1]

    def after(
        self, k: Tensor, v: Tensor, codes: Tensor | None, counts: Tensor | None, sums: Tensor | None
    ) -> VQState:  # fmt: skip
        """The state behind the last token."""
        place = self.last[:, None] * self.block + torch.arange(2 * self.block, device=self.device)

        def near(x: Tensor) -> Tensor:
            return _take(pad(x.flatten(2, 3), (0, 0, 0, self.block)), place)

        codes = None if codes is None else near(codes[..., None])[..., 0]
        return VQState(near(k), near(v), codes, counts, sums, self.seen + self.ends)


def _parted(x: Tensor, block: int) -> Tensor:
    """``[B, H, n * L, d] -> [B, H, n, L, d]``."""
    parts: Tensor = x.unflatten(2, (-1, block))
    return parts


def _take(x: Tensor, place: Tensor) -> Tensor:
    """``x [B, H, N, d]`` at ``place [B, M]``."""
    return x.gather(2, place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
