# SPDX-License-Identifier: Apache-2.0
"""Multi-dimensional damped moving averages of each channel, the structured memory of Mega (arXiv 2209.10655).

Channel d has m averages that forget at rates of their own, and reads a weighted sum of them:

    h_t = alpha beta x_t + (1 - alpha delta) h_{t-1}        y_t = sum over m of eta h_t        alpha, delta in (0, 1)

As :mod:`.recurrence` does it: within chunks of tokens by what a token adds to each later one, a state between chunks.
So the cost is linear in T and what comes later changes nothing before it, not even by a rounding, as an FFT would.
"""

import torch
from torch import Tensor

from .reference import widened

__all__ = ["damped_average"]

_CHUNK = 128  # tokens; the work of a token grows with it, and steps in a row with its inverse


def damped_average(
    x: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, *, state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The averages of texts that begin at column 0, weighed.

    Args:
        x: ``[B, T, D]``, 0 behind the end of a text.
        alpha, delta: ``[D, m]`` in (0, 1).
        beta, eta: ``[D, m]``.
        state: ``[B, D, m]``, the averages after what came before.
        lengths: ``[B]`` tokens of each text; None for T.

    Returns:
        ``[B, T, D]`` in the dtype of x, and the averages after the last token of each text, float32 (float64 for
        float64).
    """
    with torch.autocast(x.device.type, enabled=False):
        given, (batch, length, _) = x.dtype, x.shape
        x, size = widened(x), max(1, min(_CHUNK, length))
        count = -(-length // size)
        chunks = torch.nn.functional.pad(x, (0, 0, 0, count * size - length)).unflatten(1, (count, size))
        at = torch.arange(size + 1, device=x.device)
        enter, decay = (alpha * beta).to(x.dtype), torch.log1p(-alpha * delta).to(x.dtype)
        kept = (at[:, None, None] * decay).exp()  # [C + 1, D, m], after so many tokens
        weight = (kept[:size] * enter * eta).sum(-1)  # [C, D], of a token after so many
        apart = at[:size, None] - at[:size]
        within = weight[apart.clamp(min=0)].masked_fill(apart[..., None] < 0, 0.0)  # [C, C, D]
        new = torch.einsum("bnsd,sdm->nbdm", chunks, kept[:size].flip(0) * enter)
        h = x.new_zeros(batch, *alpha.shape) if state is None else state.to(x.dtype)
        before = [h]
        for i in range(count):  # the only sequential part
            before.append(torch.addcmul(new[i], before[-1], kept[size]))
        starts = torch.stack(before, 1)  # [B, n + 1, D, m]
        y = torch.einsum("tsd,bnsd->bntd", within, chunks)
        y = y + torch.einsum("bndm,tdm->bntd", starts[:, :count], kept[1:] * eta)
        ends = torch.full((batch,), length, device=x.device) if lengths is None else lengths
        return y.flatten(1, 2)[:, :length].to(given), _after(chunks, starts, kept, enter, ends, size)


def _after(chunks: Tensor, starts: Tensor, kept: Tensor, enter: Tensor, ends: Tensor, size: int) -> Tensor:
    """The averages after ``ends [B]`` tokens: those before the chunk that is begun, and its tokens."""
    rows, whole, rest = torch.arange(len(ends), device=ends.device), ends // size, ends % size
    last = torch.nn.functional.pad(chunks, (0, 0, 0, 0, 0, 1))[rows, whole]  # [B, C, D]
    apart = rest[:, None] - 1 - torch.arange(size, device=ends.device)  # [B, C]
    weight = kept[apart.clamp(min=0)].masked_fill((apart < 0)[..., None, None], 0.0) * enter  # [B, C, D, m]
    return kept[rest] * starts[rows, whole] + torch.einsum("bcd,bcdm->bdm", last, weight)
