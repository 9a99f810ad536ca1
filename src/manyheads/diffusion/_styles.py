# SPDX-License-Identifier: Apache-2.0
"""Measures of how images look, by name: what heads can be chosen for without another network.

Each takes images float ``[N, 3, H, W]`` or videos ``[N, 3, F, H, W]``, values in 0..1, and gives a value for each,
float ``[N]``. Luminance is that of Rec. 709, of the values as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["STYLES", "style"]


def _luminance(images: Tensor) -> Tensor:
    weight = torch.tensor([0.2126, 0.7152, 0.0722], dtype=images.dtype, device=images.device)
    return torch.einsum("nc...,c->n...", images, weight)


def brightness(images: Tensor) -> Tensor:
    """Mean luminance."""
    return _luminance(images).flatten(1).mean(1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luminance over pixels."""
    return _luminance(images).flatten(1).std(1)


def saturation(images: Tensor) -> Tensor:
    """Mean of a pixel's largest less its smallest channel."""
    return (images.amax(1) - images.amin(1)).flatten(1).mean(1)


def warmth(images: Tensor) -> Tensor:
    """Mean of red less blue."""
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)


def edges(images: Tensor) -> Tensor:
    """Mean absolute difference of luminance between neighbours in a row and in a column."""
    light = _luminance(images)
    return sum((light.diff(dim=axis).abs().flatten(1).mean(1) for axis in (-1, -2)), torch.zeros(())) / 2


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    each.__name__: each for each in (brightness, contrast, saturation, warmth, edges)
}


def style(name: str) -> Callable[[Tensor], Tensor]:
    """The measure of that name; ``-name`` is its negative, by which the darkest images are the best.

    Raises:
        UserError: there is none of that name.
    """
    found = STYLES.get(name.removeprefix("-"))
    if found is None:
        raise UserError(f"no measure of images is called {name!r}; there are {', '.join(STYLES)}, each also with a -")
    return found if not name.startswith("-") else lambda images: -found(images)
