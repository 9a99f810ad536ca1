# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as a model applies them, undone, measured and averaged.

Everything works on the model's own ``(cos, sin)``, each ``[B, T, r]`` in the half-split layout: channels i and i + r/2
of the first r channels of a head are one pair, turned by the angle whose cosine stands in ``cos[..., i]`` and again in
``cos[..., i + r/2]``. Channels past r pass through (partial rotary). Where a model scales its rotations (YaRN,
LongRoPE), the factor a is part of ``cos`` and ``sin``: :func:`rotate` multiplies by it once, as the model does, and
:func:`unrotate` divides by it once. Frequencies are read off the angles, so that every kind of rotary scaling is right
without being known.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Rotary",
    "angle_step",
    "copies",
    "mean_rotation",
    "pair_norms",
    "partners",
    "rotate",
    "rotate_pairs",
    "unrotate",
]

Rotary = tuple[Tensor, Tensor]


def _quarter_turn(x: Tensor) -> Tensor:
    """Every pair of ``[..., r]`` turned by 90 degrees: ``(a, b) -> (-b, a)``."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, T, d]`` with its first r channels turned by ``cos, sin [B, T, r]``."""
    cos, sin = cos[:, None], sin[:, None]
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turning * cos + _quarter_turn(turning) * sin
    return torch.cat([turned, rest.to(turned.dtype)], -1) if rest.shape[-1] else turned


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """``x [B, H, T, d]`` at the positions of ``rotary``, in the arithmetic of the model."""
    return _turn(x, *rotary)


def rotate_pairs(x: Tensor, rotary: Rotary) -> Tensor:
    """``x [B, T, H, d]`` turned in pairs of neighbouring channels by tables ``[1, T, 1, d]``, every entry twice."""
    cos, sin = rotary
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def unrotate(x: Tensor, rotary: Rotary) -> Tensor:
    """The inverse of :func:`rotate`, exact for the rounded cosines and sines too."""
    cos, sin = rotary
    square = cos * cos + sin * sin
    return _turn(x, cos / square, -sin / square)


def copies(apply: Callable[..., Any], width: int, head_dim: int) -> int:
    """How many times a model's cosines must stand side by side to be in the half-split layout: 1, 2, or 0 for never.

    Tables alone do not tell (some models interleave the channels and fill the tables in halves): the model's own
    rotation is asked, with random angles.

    Args:
        apply: the model's rotation, ``apply(q, k, cos, sin) -> (q, k)`` or ``apply(x, cos, sin) -> x``.
        width: of the last dimension of its tables.
        head_dim: d.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for times in (1, 2):
        if times * width % 2 or times * width > head_dim:
            continue
        angles = torch.randn(1, 3, times * width // 2, generator=generator, device="cpu")
        angles = torch.cat([angles, angles], -1)
        for dim in (head_dim, times * width):  # some models part the channels that pass through before they ask
            x = torch.randn(1, 1, 3, dim, generator=generator, device="cpu")
            out = _applied(apply, x, angles[..., :width].cos(), angles[..., :width].sin())
            want = rotate(x, (angles.cos(), angles.sin()))
            if isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out, want, atol=1e-5):
                return times
    return 0


def _applied(apply: Callable[..., Any], x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """``x`` turned by a function of either form; None where it takes neither."""
    for given in ((x, x, cos, sin), (x, cos, sin)):
        try:
            out = apply(*given)
        except Exception:  # foreign code, asked whether it takes this
            continue
        return out[0] if isinstance(out, tuple) else out
    return None


def partners(head_dim: int, rotary_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """The other channel of each channel's pair, int64 ``[d]``; a channel that passes through is its own."""
    channels = torch.arange(head_dim, device=device)
    half = rotary_dim // 2
    return torch.where(channels < half, channels + half, torch.where(channels < rotary_dim, channels - half, channels))


def pair_norms(x: Tensor, rotary_dim: int) -> Tensor:
    """``sqrt(x_i^2 + x_{i + r/2}^2)`` at both channels of each pair of ``x [..., d]``, which no rotation changes.

    A channel that passes through stands alone: ``|x_i|``.
    """
    first, second = x[..., :rotary_dim].chunk(2, -1)
    norms = torch.hypot(first, second)
    return torch.cat([norms, norms, x[..., rotary_dim:].abs()], -1)


def _phasors(rotary: Rotary) -> Tensor:
    """``exp(i angle)`` of each pair, complex ``[B, T, r/2]``, without the model's factor."""
    cos, sin = (x[..., : x.shape[-1] // 2].to(torch.promote_types(x.dtype, torch.float32)) for x in rotary)
    turns = torch.complex(cos, sin)
    return turns / turns.abs()


def _at(turns: Tensor, columns: Tensor) -> Tensor:
    """``turns [B, T, P]`` at one column per row, ``columns [B]`` -> ``[B, P]``."""
    return turns.gather(1, columns[:, None, None].expand(-1, 1, turns.shape[2]))[:, 0]


def _places(rotary: Rotary, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Position of every column ``[B, T]``, and the column of each row's last position ``[B]``."""
    batch, length = rotary[0].shape[:2]
    if positions is None:
        positions = torch.arange(length, device=rotary[0].device)
    positions = positions.expand(batch, length)
    return positions, positions.argmax(1)


def angle_step(rotary: Rotary, positions: Tensor | None = None) -> Tensor:
    """Angle in radians that each pair turns per position, ``[B, r/2]``.

    Two neighbouring positions tell it, but not well where cosines are rounded to bfloat16. Positions 2, 4, 8, ... apart
    tell the same step 2, 4, 8, ... times more finely up to whole turns, and the coarser answer says how many turns.

    Args:
        rotary: cosines and sines of T positions.
        positions: ``[B, T]`` the position that each column was rotated to, negative for padding; one after the other
            when not given. A row without two neighbouring positions gets 0.

    Raises:
        ValueError: T is 1.
    """
    turns = _phasors(rotary)
    places, last = _places(rotary, positions)
    if turns.shape[1] < 2:
        raise ValueError("the angle per position is read off two neighbouring positions: keep it from the prompt")
    end, top = _at(turns, last), places.gather(1, last[:, None])[:, 0]
    step = torch.zeros_like(end.real)
    span = 1
    while span < turns.shape[1]:
        column = (last - span).clamp(min=0)
        place = places.gather(1, column[:, None])[:, 0]
        apart = (place == top - span) & (place >= 0) & (last >= span)
        angle = (end * _at(turns, column).conj()).angle()
        whole = ((step * span - angle) / math.tau).round() * math.tau
        step = torch.where(apart[:, None], (angle + whole) / span, step)
        span *= 2
    return step


def mean_rotation(rotary: Rotary, step: Tensor, count: int | Tensor, positions: Tensor | None = None) -> Rotary:
    """The average of the rotations to the ``count`` positions after the last one, as a rotary of one position.

    ``rotate(x, mean_rotation(...))`` is the mean of ``rotate(x, r)`` over the rotary r of those positions; the mean of
    rotations shortens what it turns.

    Args:
        rotary: cosines and sines of T positions.
        step: ``[B, r/2]`` of :func:`angle_step`.
        count: how many positions to average, at least 1; or how far ahead they are, ``[n]``.
        positions: ``[B, T]`` as for :func:`angle_step`.
    """
    turns = _phasors(rotary)
    _, last = _places(rotary, positions)
    ahead = torch.arange(1, count + 1, device=step.device) if isinstance(count, int) else count
    ahead = ahead * step[..., None]
    mean = _at(turns, last) * torch.complex(ahead.cos().mean(-1), ahead.sin().mean(-1))
    cos, sin = (x.to(mean.real.dtype) for x in rotary)
    mean = mean * torch.hypot(_at(cos, last), _at(sin, last))[:, : mean.shape[1]]
    both = torch.cat([mean, mean], -1)[:, None]
    return both.real, both.imag
