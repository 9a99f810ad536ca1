# SPDX-License-Identifier: Apache-2.0
"""How far a simultaneous translation lags behind its source: AL, LAAL, DAL and AP, by the delays of its words.

``delays [.., T]`` are g_1 .. g_T: how much of a source of length X had been read when each of Y = T words was written.
With gamma = Y / X, the words that are due for each that is read:

- AL   = 1/tau sum_{i <= tau} (g_i - (i-1)/gamma), tau the first i with g_i = X (Ma et al. 2019, STACL)
- LAAL = AL with gamma = max(Y, Y*) / X of a reference of Y* words, so that long outputs do not seem early (Papi et al.
  2022)
- DAL  = 1/Y sum_i (g'_i - (i-1)/gamma), g'_i = max(g_i, g'_{i-1} + 1/gamma) (Cherry and Foster 2019)
- AP   = sum_i g_i / (X Y) (Cho and Esipova 2016)

Wait-k has AL = k where lengths are equal. As SimulEval's, but that the length of AL, DAL and AP is the output's own,
which SimulEval takes for AL and DAL only where it is told so. All are differentiable, and so a loss of expected delays.
"""

import torch
from torch import Tensor

__all__ = ["average_lagging", "average_proportion", "differentiable_average_lagging"]


def average_lagging(delays: Tensor, source: Tensor, target: Tensor, reference: Tensor | None = None) -> Tensor:
    """AL ``[..]``; LAAL with the length of a ``reference``.

    Args:
        delays: ``[.., T]``, of which the first ``target`` count.
        source, target: lengths ``[..]``, at least 1.
        reference: length ``[..]``.
    """
    place = torch.arange(delays.shape[-1], device=delays.device)
    length = target if reference is None else torch.maximum(target, reference)
    lag = delays - place * (source / length)[..., None]
    whole = (delays >= source[..., None]).long()
    counted = (whole.cumsum(-1) - whole == 0) & (place < target[..., None])  # up to the first that has all
    return (lag * counted).sum(-1) / counted.sum(-1)


def differentiable_average_lagging(delays: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """DAL ``[..]``; arguments as :func:`average_lagging`."""
    place = torch.arange(delays.shape[-1], device=delays.device)
    due = place * (source / target)[..., None]
    lag = (delays - due).cummax(-1).values  # g'_i - (i-1)/gamma is the largest lag so far
    return (lag * (place < target[..., None])).sum(-1) / target


def average_proportion(delays: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """AP ``[..]``; arguments as :func:`average_lagging`."""
    place = torch.arange(delays.shape[-1], device=delays.device)
    return (delays * (place < target[..., None])).sum(-1) / (source * target)
