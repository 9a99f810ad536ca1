# SPDX-License-Identifier: Apache-2.0
"""The saliency map that a decoder makes of an encoder's patches, compared with that of the encoder as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from ...data import street_photographs
from ...experiment import Arm, Metric, Row, RunContext, Task, Vision, WorkUnit
from ...integrations import use
from ...models.saliency import FILE, SIDE, SaliencyDecoder, load_decoder, normalised

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Saliency"]


@dataclass(frozen=True, kw_only=True)
class Saliency(Task):
    """A dense task on photographs: the map of every arm beside that of the plain model, photograph by photograph.

    An arm with the option ``downsampled`` is the plain model on photographs whose sides are that fraction, its map
    scaled up again.

    Attributes:
        samples: photographs.
        side: of a photograph in pixels, a multiple of a patch's; the decoder was trained on 224.
        batch: photographs at once.
    """

    subject: ClassVar[str] = "vision"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("overlap", "overlap with the plain map", higher=True, kind="share",
               what="sum of the lesser over sum of the larger of the two maps, pixel by pixel"),
        Metric("correlation", "correlation with the plain map", higher=True),
        Metric("patches", "cosine with the plain patches", higher=True, what="mean over the last hidden states"),
    )  # fmt: skip

    samples: int = 39
    side: int = SIDE
    batch: int = 4

    def unsupported_reason(self, run: RunContext) -> str | None:
        from pathlib import Path

        if not street_photographs.available():
            return "the photographs are not on this machine (docs/compare.md, data)"
        if not (Path(_folder(run)) / FILE).is_file():
            return f"the model has no {FILE}, by which patches become a map"
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{first}", (last - first) * len(run.arms), f"saliency, photographs from {first + 1} on",
                     {"first": first, "last": last})
            for first in range(0, self.samples, self.batch)
            for last in (min(first + self.batch, self.samples),)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        photos = run.kept(("photographs", self.side, self.samples), lambda: _photographs(self.side, self.samples))
        images = photos[unit.params["first"] : unit.params["last"]].to(run.device)
        decoder = run.kept("saliency decoder", lambda: load_decoder(_folder(run), run.device))
        plain, patches = self._mapped(run, run.baseline, decoder, images)
        for arm in run.arms:
            found, made = (plain, patches) if arm is run.baseline else self._mapped(run, arm, decoder, images)
            same = made.shape == patches.shape
            near = cosine_similarity(made, patches, dim=2).mean(1) if same else torch.full((len(made),), torch.nan)
            for i in range(len(images)):
                sample = f"{unit.params['first'] + i}"
                yield self.row("overlap", arm, _overlap(found[i], plain[i]), sample)
                yield self.row("correlation", arm, _correlation(found[i], plain[i]), sample)
                if same:
                    yield self.row("patches", arm, float(near[i]), sample)
            run.advance(len(images))

    @torch.no_grad()
    def _mapped(self, run: RunContext, arm: Arm, decoder: SaliencyDecoder, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``[B, side, side]`` and patches ``[B, h * w, C]`` in float32."""
        vision = cast(Vision, run.subject)
        model: Any = vision.model
        part = float(arm.options.get("downsampled", 1.0))
        patch = int(model.config.patch_size)
        side = max(1, round(self.side * part / patch)) * patch
        given = images if side == self.side else interpolate(images, size=(side, side), mode="area")
        with use(model, *arm.strategies) if arm.strategies else nullcontext():
            hidden = vision.encode(normalised(given).to(model.dtype)).last_hidden_state
        grid = side // patch
        patches = hidden[:, hidden.shape[1] - grid**2 :].float()
        return decoder(patches, (grid, grid), (self.side, self.side)), patches


def _folder(run: RunContext) -> str | Path:
    return cast(Vision, run.subject).folder


def _photographs(side: int, samples: int) -> Tensor:
    return street_photographs.photographs(side, samples)


def _overlap(one: Tensor, other: Tensor) -> float:
    return float(torch.minimum(one, other).sum() / torch.maximum(one, other).sum())


def _correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
