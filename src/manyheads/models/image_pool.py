# SPDX-License-Identifier: Apache-2.0
"""Texts with images that a frozen tower has read once, for a training that reads them again and again.

A tower that is not trained gives an image the same features in every step and under every strategy that places its
tokens. They are kept, with the texts, on the device, all texts as long as the longest: a step takes rows of them, which
:func:`manyheads.training.answers.answer_logits` reads without the tower, and no step waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from ..attention.image_layout import ImageLayout, block_mask
from ..errors import UserError
from ..strategy import ImagePositions
from .joined_vlm import JoinedVLM

__all__ = ["ImagePool", "fit_projector", "image_features", "orders"]

_AT_ONCE = 256  # images that the tower reads at once
_MULTIPLE = 8  # of the length of all texts: kernels of attention want no other
_LEFT_OUT = -100  # answers behind the last of a text


@torch.no_grad()
def image_features(vlm: JoinedVLM, pixels: Tensor) -> Tensor:
    """What a tower makes of pixels ``[N, 3, H, W]``: float32 ``[N, patches, D]`` before the projector.

    On a GPU products are of bfloat16, and the stream between layers, whose channels lie far from 0, is not.

    Raises:
        UserError: the tower is trained, so that its features change.
    """
    tower = vlm.model.model.vision_tower
    if any(p.requires_grad for p in tower.parameters()):
        raise UserError("features of a tower that is trained change in every step: leave pool and align away")
    layer = vlm.model.config.vision_feature_layer
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        read = (tower(part, output_hidden_states=True).hidden_states[layer] for part in pixels.split(_AT_ONCE))
        return torch.cat([hidden[:, 1:].float() for hidden in read])


@dataclass(frozen=True)
class ImagePool:
    """Texts and features of their images.

    Attributes:
        features: ``[images, patches, D]``.
        shown: images of each text by their number, int64 ``[N, I]``.
        ids: int64 ``[N, T]``, padded behind.
        layout: of the columns of all texts.
        places: columns of the tokens of images, int64 ``[N, I * patches]``.
        at, answers: as :mod:`manyheads.training.answers` has them, ``[N, Q]``.
    """

    features: Tensor
    shown: Tensor
    ids: Tensor
    layout: ImageLayout
    places: Tensor
    at: Tensor
    answers: Tensor

    @classmethod
    def of(
        cls, vlm: JoinedVLM, batches: Iterable[Mapping[str, Tensor]], shown: Tensor | None = None
    ) -> ImagePool:  # fmt: skip
        """From batches as :meth:`JoinedVLM.read` makes them.

        Args:
            vlm: whose tower reads the images.
            batches: at least one.
            shown: images of each text, ``[N, I]``, where texts share them; each its own, in their order, if None.

        Raises:
            UserError: the tower is trained, or texts have differently many images.
        """
        names: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "attention_mask", "at", "answers")}
        features = []
        for batch in batches:
            if len(batch["pixel_values"]):
                features.append(image_features(vlm, batch["pixel_values"]))
            for name, found in names.items():
                found.append(batch[name])
        fill = {"input_ids": vlm.language.pad, "answers": _LEFT_OUT}
        ids, mask, at, answers = (_stacked(found, fill.get(name, 0)) for name, found in names.items())
        rest = -ids.shape[1] % _MULTIPLE
        ids, real = pad(ids, (0, rest), value=vlm.language.pad), pad(mask, (0, rest)).bool()
        seen = torch.cat(features)
        side = round(seen.shape[1] ** 0.5)
        if shown is None:
            shown = torch.arange(len(seen), device=ids.device).view(len(ids), -1)
        column = ((ids == vlm.language.image) & real).nonzero()[:, 1]
        if len(column) != shown.numel() * seen.shape[1]:
            raise UserError("texts of a pool have equally many images, with a token for each patch")
        places = column.view(len(ids), -1)
        first = places[:, :: seen.shape[1]].tolist()
        blocks = [(row, start, side, side) for row, starts in enumerate(first) for start in starts]
        return cls(seen, shown.to(ids.device), ids, ImageLayout.of(real, blocks), places, at, answers)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Tensor, strategies: Sequence[Any] = ()) -> dict[str, Tensor]:
        """Texts of some rows, read as a strategy places their images; as the model is without one.

        Args:
            rows: int64 ``[B]``, on the device.
            strategies: none, or one of ``ImagePositions``.

        Raises:
            UserError: strategies that do not place images, or several.
        """
        layout = ImageLayout(self.layout.real[rows], self.layout.image[rows], self.layout.cell[rows])
        ids, width = self.ids[rows], self.ids.shape[1]
        if strategies:
            strategy = strategies[0]
            if len(strategies) > 1 or not isinstance(strategy, ImagePositions):
                raise UserError(f"a pool is read as one strategy places images, which {strategies[-1].spec} does not")
            positions, allowed = strategy.position_ids(layout), strategy.allowed(layout, width)
        else:
            positions = (layout.real.long().cumsum(1) - 1).clamp(min=0)
            allowed = block_mask(layout, width, torch.arange(width, device=ids.device).expand_as(ids))
        offset = torch.arange(len(ids), device=ids.device)[:, None] * width
        return {
            "input_ids": ids, "features": self.features[self.shown[rows].flatten()],
            "places": (self.places[rows] + offset).flatten(), "position_ids": positions,
            "attention_mask": allowed[:, None], "at": self.at[rows], "answers": self.answers[rows],
        }  # fmt: skip


def orders(count: int, steps: int, batch: int, generator: Generator, device: torch.device) -> Tensor:
    """Rows of each step, int64 ``[steps, batch]`` on the device: all ``count`` in a new order each time around."""
    rounds = -(-steps * batch // count)
    rows = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return rows[: steps * batch].view(steps, batch).to(device)


@torch.no_grad()
def fit_projector(vlm: JoinedVLM, features: Tensor) -> None:
    """Fit a new projector to what it reads and writes: inputs of mean 0 and size 1, outputs as large as embeddings.

    DINOv2's last layer has channels whose sizes differ by orders of magnitude. The scales are folded into the weights,
    so that the model stays of its class.

    Args:
        vlm: whose projector was just drawn.
        features: of some images, ``[N, patches, D]``.
    """
    connects = vlm.model.model.multi_modal_projector
    x = features.flatten(0, 1).float()
    mean, size = x.mean(0), x.std(0).clamp(min=1e-6)
    first, last = connects.linear_1, connects.linear_2
    first.weight.div_(size)
    first.bias.sub_(first.weight @ mean)
    made, words = connects(x), vlm.model.get_input_embeddings().weight
    last.weight.mul_(words.std() / (made - last.bias).std().clamp(min=1e-6))
    last.bias.zero_()


def _stacked(parts: Sequence[Tensor], value: int) -> Tensor:
    """``[n, w]`` of several widths as one, padded behind."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1]), value=value) for part in parts])
