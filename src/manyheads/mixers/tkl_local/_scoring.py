# SPDX-License-Identifier: Apache-2.0
"""The score of a document by its passages: kernels of cosines, windows, saturation, and the best regions."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, normalize, pad

__all__ = ["PassageScore", "Saturation", "best_regions", "kernels", "window_sums"]

_CENTRES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
_WIDTH = 0.1
_STRIDE = 2
_LEAST = 1e-10  # of a sum of kernels, so that it has a logarithm
_AROUND = (0, -1, 1, -2, 2)  # neighbours of a peak that count with it
_START = 0.014  # of weights that are to change the score little at first


def kernels(cosines: Tensor, centres: Tensor, width: float = _WIDTH) -> Tensor:
    """``exp(-(c - mu)^2 / 2 width^2)``, ``[B, Q, K, T]`` of cosines ``[B, Q, T]`` and ``centres [K]``."""
    return torch.exp((cosines[:, :, None] - centres[:, None]).square() * (-0.5 / width**2))


def window_sums(x: Tensor, size: int) -> Tensor:
    """Sums ``[..., W]`` over windows of ``size`` places that begin at every second one, of ``x [..., T]``.

    Not from a running sum: in float32 a small sum would be the difference of two large ones.
    """
    flat = avg_pool1d(x.reshape(-1, 1, x.shape[-1]), size, _STRIDE) * size
    return flat.view(*x.shape[:-1], -1)


def best_regions(scores: Tensor, there: Tensor, count: int, apart: int) -> tuple[Tensor, Tensor]:
    """The ``count`` best windows of which each is ``apart`` windows from the others, and two on either side of each.

    Args:
        scores: ``[B, W]``.
        there: ``[B, W]``, whether there is such a window.
        count: of peaks.
        apart: windows from one peak to the next at least.

    Returns:
        indices ``[B, 5, count]`` of windows, peaks first, and whether there is one, likewise.
    """
    free, places = there, torch.arange(scores.shape[1], device=scores.device)
    peaks, found = [], []
    for _ in range(count):
        best = scores.masked_fill(~free, -torch.inf).argmax(1)
        peaks.append(best)
        found.append(free.any(1))
        free = free & ((places - best[:, None]).abs() >= apart)
    around = torch.tensor(_AROUND, device=scores.device)[:, None]
    at = torch.stack(peaks, 1)[:, None] + around
    inside = (at >= 0) & (at < scores.shape[1])
    at = at.clamp(0, scores.shape[1] - 1)
    held = there.gather(1, at.flatten(1)).view_as(at)
    return at, inside & held & torch.stack(found, 1)[:, None]


class Saturation(nn.Module):
    """``a max(x, 1e-10)^(1 / b) - c`` with a, b, c by query word and words in the window: ``ln x`` at first, nearly."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(dim, 1, bias=False)
        self.norm = nn.LayerNorm(2)
        self.curve = nn.Linear(2, 3)
        nn.init.uniform_(self.curve.weight, -_START, _START)
        nn.init.constant_(self.curve.bias, 100.0)

    def forward(self, x: Tensor, query: Tensor, words: Tensor) -> Tensor:
        """Of sums ``x [B, Q, K, W]`` for ``query [B, Q, dim]`` and ``words [B, W]`` of windows: ``[B, Q, K, W]``."""
        about = torch.broadcast_tensors(self.weigh(query), words[:, None].to(x.dtype))
        a, b, c = self.curve(self.norm(torch.stack(about, -1))).unbind(-1)
        y: Tensor = a[:, :, None] * x.clamp(min=_LEAST) ** (1 / b[:, :, None]) - c[:, :, None]
        return y


class _Logarithm(nn.Module):
    """TK's: ``ln max(r_k x, 1e-10)`` with a learned factor of each kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(len(_CENTRES)))

    def forward(self, x: Tensor, query: Tensor, words: Tensor) -> Tensor:
        return (x * self.factor[:, None]).clamp(min=_LEAST).log()


class PassageScore(nn.Module):
    """Score of vectors of words in their context."""

    centres: Tensor

    def __init__(self, dim: int, window: int, regions: int, saturation: str) -> None:
        super().__init__()
        self.window, self.regions = window, regions
        self.register_buffer("centres", torch.tensor(_CENTRES), persistent=False)
        self.saturation = Saturation(dim) if saturation == "embedding" else _Logarithm()
        self.dense = nn.Linear(len(_CENTRES), 1, bias=False)
        nn.init.uniform_(self.dense.weight, -_START, _START)
        if regions:
            self.places = nn.Parameter(torch.ones(len(_AROUND), regions))

    def forward(self, query: Tensor, query_real: Tensor, document: Tensor, document_real: Tensor) -> Tensor:
        """Scores ``[B]`` of ``query [B, Q, dim]`` and ``document [B, T, dim]``; 0 for a document without words."""
        scores, there = self.windows(query, query_real, document, document_real)
        if not self.regions:
            return (scores * there).sum(1)
        at, held = best_regions(scores, there, self.regions, self.window // _STRIDE)
        parts = scores.gather(1, at.flatten(1)).view_as(at).masked_fill(~held, 0.0)
        return (parts * self.places).sum((1, 2))

    def windows(
        self, query: Tensor, query_real: Tensor, document: Tensor, document_real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score of each window ``[B, W]``, and whether it holds a word; one window of all without regions.

        The last window is the first that reaches the text's last word, whatever padding follows.
        """
        matched = kernels(normalize(query, dim=-1) @ normalize(document, dim=-1).mT, self.centres)
        matched = matched * document_real[:, None, None]
        real = document_real.to(matched.dtype)
        if self.regions:
            short = max(0, self.window - real.shape[1]) + real.shape[1] % _STRIDE
            sums, words = (window_sums(pad(x, (0, short)), self.window) for x in (matched, real))
            places = torch.arange(real.shape[1], device=real.device)
            ends = (places * document_real).amax(1, keepdim=True) + 1
            starts = _STRIDE * torch.arange(sums.shape[-1], device=real.device)
            there = (words > 0.5) & (starts < (ends - self.window).clamp(min=0) + _STRIDE)
        else:
            sums, words = matched.sum(-1, keepdim=True), real.sum(1, keepdim=True)
            there = words > 0.5
        each = self.saturation(sums, query, words) * (query_real[:, :, None] & there[:, None])[:, :, None]
        return self.dense(each.sum(1).mT)[..., 0], there
