# SPDX-License-Identifier: Apache-2.0
"""Keys as product-quantisation codes: attention scores by table, and how far they can be from the exact ones.

A key of d channels is cut into g sub-vectors of w = d / g channels; each is stored as the number of the nearest of c
centroids of its own codebook (Jégou et al., "Product Quantization for Nearest Neighbor Search", IEEE TPAMI 2011). The
logit of a query is then a sum of g numbers out of a table of g x c products, made once for a query.

Legend: B rows, H query heads, Hkv key/value heads, G = H / Hkv, N tokens, g sub-vectors of w channels, c centroids.
Codes are ``[B, Hkv, g, N]``, uint8 up to 256 centroids and int16 above; centroids ``[B or 1, Hkv, g, c, w]``.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import kernels
from ..errors import UserError
from .reference import block_size, softmax, widened

__all__ = [
    "code_dtype", "decode", "encode", "fit", "key_error", "lookup_table", "output_bound", "select", "table_logits",
]  # fmt: skip

_MOST = 2**15  # centroids that a code can number


def code_dtype(centroids: int) -> torch.dtype:
    """What numbers so many centroids; raises UserError where nothing here does."""
    if not 1 <= centroids <= _MOST:
        raise UserError(f"a codebook has 1 to {_MOST} centroids, not {centroids}")
    return torch.uint8 if centroids <= 256 else torch.int16


def _parts(k: Tensor, groups: int) -> Tensor:
    """Sub-vectors ``[B, Hkv, g, N, w]`` of keys ``[B, Hkv, N, d]``."""
    if k.shape[3] % groups:
        raise UserError(f"{k.shape[3]} channels cannot be cut into {groups} sub-vectors of one size")
    parts: Tensor = k.unflatten(3, (groups, -1)).transpose(2, 3)
    return parts


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Number of the nearest centroid ``[P, N]`` of ``x [P, N, w]`` among ``[P, c, w]``; of equals the first."""
    squares = (centroids * centroids).sum(2)[:, None]
    nearest: Tensor = torch.baddbmm(squares, x, centroids.transpose(1, 2), alpha=-2.0).argmin(2)
    return nearest


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def fit(
    k: Tensor, groups: int, centroids: int, *, real: Tensor | None = None, iterations: int = 10, sample: int = 16384
) -> Tensor:  # fmt: skip
    """Codebooks of keys ``[B, Hkv, N, d]`` by k-means, for each row, head and sub-vector: ``[B, Hkv, g, c, w]``.

    Lloyd's iterations from tokens at equal distances, so that nothing is drawn and rows do not see each other. A
    centroid without tokens stays where it is. With at most c tokens every one of them is a centroid.

    Args:
        k: keys; the codebooks have their dtype, as they are stored.
        groups: sub-vectors of a key.
        centroids: of each codebook.
        real: bool ``[B, N]``, tokens and not padding; padding stands first in its row.
        iterations: of Lloyd.
        sample: most tokens of a row that are used, at equal distances.

    Raises:
        UserError: the channels cannot be cut into so many parts, or there are too many centroids for a code.
    """
    code_dtype(centroids)
    batch, heads, size, _ = k.shape
    held = torch.full((batch,), size, device=k.device) if real is None else real.sum(1)
    used = held.clamp(max=sample)

    def spread(count: int, among: Tensor, where: Tensor) -> Tensor:
        """``count`` places at equal distances among the first ``among`` of ``where [B]``: ``[B, count]``."""
        at = ((2 * torch.arange(count, device=k.device) + 1) * among[:, None]) // (2 * where[:, None].clamp(min=1))
        return at.clamp(max=(among - 1).clamp(min=0)[:, None])

    most = min(sample, size)
    token = (size - held)[:, None] + spread(most, held, used)
    weight = (torch.arange(most, device=k.device) < used[:, None]).to(widened(k[:, :, :0]).dtype)
    keys = k.gather(2, token.clamp(max=size - 1)[:, None, :, None].expand(-1, heads, -1, k.shape[3]))
    x = widened(_parts(keys, groups)).flatten(0, 2)  # [P, m, w]
    first = spread(centroids, used, torch.full_like(used, centroids))
    each = heads * groups
    found = x.gather(1, first.repeat_interleave(each, 0)[..., None].expand(-1, -1, x.shape[2]))
    for rows in _blocks(len(x), block_size(x, most * centroids)):
        some, mine = x[rows], found[rows]
        share = weight.repeat_interleave(each, 0)[rows]
        for _ in range(iterations):
            near = _nearest(some, mine)
            sums = torch.zeros_like(mine)
            sums.scatter_add_(1, near[..., None].expand_as(some), some * share[..., None])
            count = torch.zeros_like(mine[..., 0]).scatter_add_(1, near, share)
            mine = torch.where(count[..., None] > 0, sums / count[..., None].clamp(min=1), mine)
        found[rows] = mine
    return found.view(batch, heads, groups, centroids, -1).to(k.dtype)


def encode(k: Tensor, centroids: Tensor) -> Tensor:
    """Codes ``[B, Hkv, g, N]`` of keys ``[B, Hkv, N, d]``: of the nearest centroids, as these are stored.

    A GPU compares without writing distances down, and may differ where two centroids are equally near up to rounding.
    """
    if k.is_cuda and k.dtype in (torch.float32, torch.bfloat16, torch.float16) and kernels.available():
        from ..kernels import product_codes as fast

        return fast.encode(k, centroids, code_dtype(centroids.shape[3]))
    batch, heads, size, _ = k.shape
    groups, count = centroids.shape[2], centroids.shape[3]
    x = widened(_parts(k, groups)).flatten(0, 2)
    mine = widened(centroids).to(x.dtype).expand(batch, heads, -1, -1, -1).flatten(0, 2)
    codes = x.new_empty(len(x), size, dtype=code_dtype(count))
    many = block_size(x, count * max(1, size))
    for rows in _blocks(len(x), many):
        for tokens in _blocks(size, block_size(x, count)):
            codes[rows, tokens] = _nearest(x[rows, tokens], mine[rows]).to(codes.dtype)
    return codes.view(batch, heads, groups, size)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """Keys ``[B, Hkv, N, d]`` in the dtype of the centroids, as the codes ``[B, Hkv, g, N]`` have them."""
    batch, heads, _, size = codes.shape
    width = centroids.shape[4]
    where = codes.long()[..., None].expand(-1, -1, -1, -1, width)
    return centroids.expand(batch, -1, -1, -1, -1).gather(3, where).transpose(2, 3).reshape(batch, heads, size, -1)


def lookup_table(q: Tensor, centroids: Tensor, scale: float) -> Tensor:
    """Products of each part of a query with each centroid, ``[B, Hkv, g, c, G]``, at least float32.

    Args:
        q: ``[B, H, d]``.
        centroids: of keys as they are attended to, rotary positions included.
        scale: factor on ``q k^T``.
    """
    heads, groups = centroids.shape[1:3]
    parts = widened(q).unflatten(1, (heads, -1)).unflatten(3, (groups, -1))  # [B, Hkv, G, g, w]
    table: Tensor = widened(centroids).to(parts.dtype) @ (parts * scale).permute(0, 1, 3, 4, 2)
    return table


def table_logits(table: Tensor, codes: Tensor) -> Tensor:
    """Logits ``[B, H, N]`` of a table ``[B, Hkv, g, c, G]`` and codes: the sum of what each code points at."""
    batch, heads, groups, _, group = table.shape
    x = table.new_zeros(batch, heads, codes.shape[3], group)
    for i in range(groups):
        x += table[:, :, i].gather(2, codes[:, :, i].long()[..., None].expand(-1, -1, -1, group))
    return x.transpose(2, 3).flatten(1, 2)


def select(logits: Tensor, lse: Tensor, need: Tensor | int) -> Tensor:
    """Lowest logit ``[B, H]`` that is kept, so that the best-scored tokens have a mass, or are a number.

    Args:
        logits: ``[B, H, N]``, -inf where there is nothing to keep.
        lse: ``[B, H]`` log-sum-exp that makes weights of logits.
        need: mass that what is kept must have at least, ``[B, H]``; or how many tokens are kept.

    Returns:
        +inf where nothing is needed, -inf where all that there is does not suffice. Tokens that tie with the last one
        are kept with it.
    """
    if not logits.shape[2]:
        return torch.full_like(lse, -torch.inf)
    if isinstance(need, int):
        top: Tensor = logits.topk(min(max(1, need), logits.shape[2]), 2).values
        return top[..., -1]
    best = logits.sort(2, descending=True).values
    mass = (best - lse[..., None]).exp().cumsum(2)
    at = (mass < need[..., None]).sum(2)
    lowest = best.gather(2, at.clamp(max=best.shape[2] - 1)[..., None])[..., 0]
    lowest = torch.where(at >= best.shape[2], -torch.inf, lowest)
    return torch.where(need <= 0, torch.inf, lowest)


def key_error(k: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """Euclidean distance of each key ``[B, Hkv, N, d]`` from what its code says, ``[B, Hkv, N]``."""
    distance: Tensor = torch.linalg.vector_norm(widened(k) - widened(decode(codes, centroids)), dim=3)
    return distance


def output_bound(error: Tensor, kept: Tensor | float, value: Tensor | float, *, renormalize: bool = True) -> Tensor:
    """The most by which attention over coded keys and its kept tokens can be from exact attention over all.

    Logits that are at most ``error`` off change a softmax by at most ``tanh(error / 2)`` in total variation: the worst
    case raises a set by ``error`` and lowers the rest. An average of values moves by at most twice that times the
    largest value. What is left out, a mass of ``1 - kept``, adds twice itself times the largest value if the rest is
    brought back to a sum of one, and once if it is not.

    Args:
        error: most that a logit is off, ``scale * |q| * max key_error``.
        kept: mass of the kept tokens under the coded keys.
        value: largest norm of a value.
        renormalize: whether kept weights are brought back to a sum of one.
    """
    lost = (2.0 if renormalize else 1.0) * (1.0 - torch.as_tensor(kept))
    return (2.0 * torch.tanh(error / 2) + lost) * value


def weights(logits: Tensor, mask: Tensor | None, top_p: float, top_k: int, always: Tensor, renormalize: bool) -> Tensor:
    """Weights ``[B, H, T, S]`` of the tokens that are kept, 0 for the others.

    Args:
        logits: ``[B, H, T, S]``.
        mask: who may be attended to, broadcastable; None for all.
        top_p: mass of attention that the kept tokens have at least.
        top_k: instead of it, how many tokens are kept beside those of ``always``; 0 for ``top_p``.
        always: tokens that are kept whatever they score, broadcastable; their mass counts.
        renormalize: bring the kept weights back to a sum of one.
    """
    whole = softmax(logits, mask)
    free = logits.masked_fill(always if mask is None else always | ~mask, -torch.inf)
    shape = logits.shape
    flat, lse = free.flatten(0, 2)[None], whole.new_zeros(1, math.prod(shape[:3]))
    masses = whole.masked_fill(~always, 0.0).sum(3).flatten()[None]
    if top_k:
        lowest = select(flat, lse, top_k)
    else:
        rest = torch.where(free == -torch.inf, 0.0, whole).flatten(0, 2)[None]
        need = torch.full_like(masses, math.inf) if top_p >= 1 else top_p - masses
        lowest = select(rest.log(), lse, need)
        flat = rest.log()
    kept = ((flat >= lowest[..., None]) & (flat > -torch.inf)).view(shape) | always
    whole = whole.masked_fill(~kept, 0.0)
    return whole / whole.sum(3, keepdim=True).clamp(min=1e-30) if renormalize else whole
