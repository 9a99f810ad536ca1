# SPDX-License-Identifier: Apache-2.0
"""A small detector: deformable DETR in two stages (arXiv 2010.04159) on a convolutional stem that is trained with it.

The encoder refines tokens of maps of several scales; each token then proposes a box, the best proposals are refined by
the decoder, layer by layer, and there is a loss of each stage. What is left out of the detectors of today (DINO) is
denoising, and a pretrained backbone. All places are shares of the canvas on which an image lies at the upper left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ...attention.deformable import DeformableAttention, Shapes
from ...attention.positions import sinusoids

__all__ = ["BlockEncoder", "Detector", "Encoded", "Encoder", "Found", "Maps", "cells", "shapes_of"]

_POINTS = 4  # of a head, on each map
_ANCHOR = 4.0  # strides of the side of the box that a token starts from
_PRIOR = 0.01  # probability of a class at first
_WAVES = 100.0  # shortest wavelength of positions: 2 pi / 100 of the canvas


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """Tokens of all levels, one level after the other.

    Attributes:
        x: ``[B, N, D]``.
        positions: of them, ``[B, N, D]``.
        points: their centres, ``[B, N, 2]``.
        there: which are of the image and not beside it, ``[B, N]``.
        shapes: height and width of each level.
    """

    x: Tensor
    positions: Tensor
    points: Tensor
    there: Tensor
    shapes: Shapes

    def encoded(self, x: Tensor, kept: Tensor, scores: Tensor | None = None) -> Encoded:
        """What an encoder gives that made ``x`` of these."""
        return Encoded(x, kept, scores)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What an encoder gives: tokens ``[B, N, D]``, which of them it has refined, and by what scores, ``[B, N]``."""

    x: Tensor
    kept: Tensor
    scores: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a detector says.

    Attributes:
        stages: logits ``[B, Q, C]`` and boxes by their centres ``[B, Q, 4]``, of proposals and of each layer of the
            decoder, the last one last.
        encoded, maps: what the encoder gave, and of what.
    """

    stages: Sequence[tuple[Tensor, Tensor]]
    encoded: Encoded
    maps: Maps


Embed = Callable[[Tensor], tuple[Tensor, Tensor]]  # tokens to what proposals are made of, and logits of classes


def shapes_of(height: int, width: int, stride: int, levels: int) -> Shapes:
    """Of maps, the finest first; each has half the cells of the one before along either side, rounded up."""
    return [(math.ceil(height / (stride << i)), math.ceil(width / (stride << i))) for i in range(levels)]


def cells(shapes: Shapes, device: torch.device | str = "cpu") -> Tensor:
    """Centres of all cells as shares of the canvas, ``[N, 2]``."""
    found = []
    for height, width in shapes:
        y, x = torch.meshgrid(
            (torch.arange(height, device=device) + 0.5) / height, (torch.arange(width, device=device) + 0.5) / width,
            indexing="ij",
        )  # fmt: skip
        found.append(torch.stack((x, y), -1).flatten(0, 1))
    return torch.cat(found)


def _waves(places: Tensor, dim: int) -> Tensor:
    """Sines and cosines of shares ``[..., k]``: ``[..., k * dim]``."""
    made: Tensor = sinusoids(places.flatten() * _WAVES, dim, _WAVES).unflatten(0, places.shape).flatten(-2)
    return made


class _Convolved(nn.Sequential):
    """Convolution, group norm, ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(math.gcd(8, after), after), nn.ReLU()
        )


class _Residual(nn.Module):
    """As in ResNet-18, with group norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _Convolved(width, width, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(math.gcd(8, width), width)

    def forward(self, x: Tensor) -> Tensor:
        return relu(x + self.norm(self.second(self.first(x))))


class _Stem(nn.Module):
    """Maps of an image, each of half the size: the first one of ``stride``, all of ``dim`` channels."""

    def __init__(self, dim: int, stride: int, levels: int) -> None:
        super().__init__()
        halved, parts, width = max(1, stride.bit_length() - 1), [], 3
        for i in range(halved):
            after = dim if i == halved - 1 else max(8, dim // 2)
            parts += [_Convolved(width, after, 2), *([_Residual(after)] if i else [])]
            width = after
        self.first = nn.Sequential(*parts)
        self.more = nn.ModuleList(_Convolved(dim, dim, 2) for _ in range(levels - 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        found = [self.first(images)]
        for part in self.more:
            found.append(part(found[-1]))
        return found


class EncoderLayer(nn.Module):
    """Deformable attention of some tokens to all of them, and a feed-forward network."""

    def __init__(self, dim: int, heads: int, width: int, levels: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.dropout = DeformableAttention(dim, heads, levels, _POINTS), nn.Dropout(dropout)
        self.feed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, points: Tensor, values: Tensor, maps: Maps) -> Tensor:
        """Tokens ``x [B, T, D]`` with their positions and points, which read the ``values [B, N, D]`` of all."""
        seen = self.attention(x + positions, points, values, maps.there, maps.shapes)
        x = self.norms[0](x + self.dropout(seen))
        made: Tensor = self.norms[1](x + self.dropout(self.feed(x)))
        return made


class Encoder(nn.Module):
    """Every layer refines every token."""

    def __init__(self, layers: Sequence[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, maps: Maps, embed: Embed) -> Encoded:
        x = maps.x
        for layer in self.layers:
            x = layer(x, maps.positions, maps.points, x, maps)
        return maps.encoded(x, maps.there)


class BlockEncoder(nn.Module):
    """Blocks over tokens, ``block(x [B, N, D], mask) -> [B, N, D]``."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Maps, embed: Embed) -> Encoded:
        x = maps.x + maps.positions
        for block in self.blocks:
            x = block(x, maps.there)
        return maps.encoded(x, maps.there)


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the maps around their boxes, a feed-forward network."""

    def __init__(self, dim: int, heads: int, width: int, levels: int, dropout: float) -> None:
        super().__init__()
        self.own, self.dropout = nn.MultiheadAttention(dim, heads, dropout, batch_first=True), nn.Dropout(dropout)
        self.attention = DeformableAttention(dim, heads, levels, _POINTS)
        self.feed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor, boxes: Tensor, maps: Maps) -> Tensor:
        q = x + positions
        x = self.norms[0](x + self.dropout(self.own(q, q, x, need_weights=False)[0]))
        seen = self.attention(x + positions, boxes, maps.x, maps.there, maps.shapes)
        x = self.norms[1](x + self.dropout(seen))
        made: Tensor = self.norms[2](x + self.dropout(self.feed(x)))
        return made


def _perceptron(before: int, dim: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, after))


class Detector(nn.Module):
    """Images ``[B, 3, H, W]`` to classes and boxes.

    Attributes:
        encoder: ``encoder(maps, embed) -> Encoded``; another may take its place.
        layers: of the decoder.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, width: int, *, classes: int, queries: int, stride: int, levels: int,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride, self.queries = stride, queries
        sizes = (dim, heads, width, levels, dropout)
        self.stem, self.level = _Stem(dim, stride, levels), nn.Parameter(0.1 * torch.randn(levels, dim))
        self.encoder: nn.Module = Encoder([EncoderLayer(*sizes) for _ in range(layers)])
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.content, self.place = nn.Parameter(torch.randn(queries, dim)), _perceptron(2 * dim, dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(layers))
        self.classify = nn.ModuleList(nn.Linear(dim, classes) for _ in range(layers + 1))
        self.locate = nn.ModuleList(_perceptron(dim, dim, 4) for _ in range(layers + 1))
        for classify, locate in zip(self.classify, self.locate, strict=True):
            nn.init.constant_(classify.bias, math.log(_PRIOR / (1 - _PRIOR)))  # type: ignore[arg-type]
            nn.init.zeros_(locate[-1].weight)  # type: ignore[index]
            nn.init.zeros_(locate[-1].bias)  # type: ignore[index]

    def maps(self, images: Tensor, extent: Tensor) -> Maps:
        """Tokens of images, of which the share ``extent [B, 2]`` of the canvas's width and height is the image."""
        height, width = images.shape[2:]
        inside = (cells([(height, width)], images.device) < extent[:, None]).all(-1).unflatten(1, (height, width))
        found = self.stem(images * inside[:, None])
        shapes = [(x.shape[2], x.shape[3]) for x in found]
        points = cells(shapes, images.device)
        waves = _waves(points, self.level.shape[1] // 2)
        own = torch.cat([self.level[i].expand(h * w, -1) for i, (h, w) in enumerate(shapes)])
        x = torch.cat([x.flatten(2).mT for x in found], 1)
        places = points.expand(len(images), -1, -1)
        return Maps(x, (waves + own).expand_as(x), places, (places < extent[:, None]).all(-1), shapes)

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What proposals of tokens ``x [B, T, D]`` are made of, and their logits of classes ``[B, T, C]``."""
        made = self.project(x)
        return made, self.classify[0](made)

    def forward(self, images: Tensor, extent: Tensor) -> Found:
        maps = self.maps(images, extent)
        encoded = self.encoder(maps, self.embed)
        given, maps = maps, replace(maps, x=encoded.x)
        made, logits = self.embed(encoded.x)
        logits = logits.float().masked_fill(~maps.there[..., None], -math.inf)
        boxes = self._moved(self.locate[0](made), self._anchors(maps))
        best = logits.max(-1).values.topk(min(self.queries, logits.shape[1]), 1).indices
        stages = [(logits, boxes)]
        now = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        x = self.content[: best.shape[1]].expand(len(images), -1, -1)
        for i, layer in enumerate(self.layers, 1):
            x = layer(x, self.place(_waves(now, self.level.shape[1] // 2)), now, maps)
            boxes = self._moved(self.locate[i](x), now)
            stages.append((self.classify[i](x).float(), boxes))
            now = boxes.detach()
        return Found(stages, encoded, given)

    @staticmethod
    def _moved(by: Tensor, boxes: Tensor) -> Tensor:
        """Boxes, moved where they are the arguments of a sigmoid."""
        return (by.float() + boxes.logit(1e-4)).sigmoid()

    def _anchors(self, maps: Maps) -> Tensor:
        """The box that each token starts from, ``[B, N, 4]``."""
        height, width = maps.shapes[0]
        side = maps.points.new_tensor((_ANCHOR / width, _ANCHOR / height))
        sides = torch.cat([(side * 2**i).expand(h * w, 2) for i, (h, w) in enumerate(maps.shapes)])
        return torch.cat((maps.points, sides.clamp(max=0.9).expand_as(maps.points)), -1)
