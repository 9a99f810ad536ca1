# SPDX-License-Identifier: Apache-2.0
"""Attention by another's maps, without a map: values are mixed in place of columns."""

import torch
from torch import Tensor

from ...call import AttentionCall
from .._maps import select_queries
from .._pairs import of_rows, sdpa
from ._pair import Columns, repeated

__all__ = ["by_words", "in_joint", "part"]

Pair = tuple[Tensor, Tensor]  # rows of the sources, and of their targets


def part(call: AttentionCall, rows: Tensor) -> AttentionCall:
    """The call of some rows."""
    mask, bias = of_rows(call.mask, rows), of_rows(call.bias, rows)
    return call.replace(q=call.q[rows], k=call.k[rows], v=call.v[rows], mask=mask, bias=bias)


def by_words(call: AttentionCall, pair: Pair, columns: Columns) -> Tensor:
    """Cross-attention ``[rows, T, H, d]`` of targets whose columns are carried over from their sources."""
    source, target = (part(call, rows) for rows in pair)
    matrix, own, factor = (repeated(x, len(target.q)) for x in columns)
    v = target.v * factor[:, None, :, None]
    out = sdpa(source, source.k, matrix[:, None] @ v)
    return out + sdpa(target, target.k, v * own[:, None, :, None]) if bool(own.any()) else out


def in_joint(
    call: AttentionCall, pair: Pair, columns: Columns | None, carried: bool, text: slice, image: slice
) -> Tensor:  # fmt: skip
    """Joint attention ``[rows, N, H, d]`` of the targets' image queries.

    The map of an image query is its attention over text, and what that leaves times a distribution over image tokens;
    the former is carried over by ``columns``, unless they are None, the latter is the source's if ``carried``. Values
    have three more parts: those of text, those of the image, and two channels that sum the attention to either.
    """
    source, target = (part(call, rows) for rows in pair)
    v, width = target.v, target.v.shape[-1]
    words = v[:, :, text]
    one = words.new_ones(len(words), words.shape[2])
    if columns is None:
        mixed, seen, kept, own = torch.zeros_like(words), 0 * one, words, one
    else:
        matrix, own, factor = (repeated(x, len(words)) for x in columns)
        words = words * factor[:, None, :, None]
        mixed, seen, kept = matrix[:, None] @ words, matrix.sum(2), words * own[:, None, :, None]
    found = []
    for rows, values, counted in ((source, mixed, seen), (target, kept, own)):
        wide = v.new_zeros(*v.shape[:3], 2 * width + 2)
        wide[:, :, text, :width], wide[:, :, text, -2] = values, counted[:, None]
        wide[:, :, image, width:-2], wide[:, :, image, -1] = v[:, :, image], 1.0
        found.append(sdpa(select_queries(rows, image), rows.k, wide).split((width, width, 1, 1), -1))
    (theirs, there, mass, shown), (ours, here, more, seen_here) = found
    picture = there / shown.clamp(min=1e-12) if carried else here / seen_here.clamp(min=1e-12)
    out: Tensor = theirs + ours + (1 - mass - more).clamp(min=0) * picture
    return out
