# SPDX-License-Identifier: Apache-2.0
"""The saliency map that a decoder makes of an encoder's patches, compared with that of the encoder as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from ...conversion import Conversion
from ...converter import calibrated
from ...data import scenes, street_photographs
from ...experiment import Arm, Metric, Row, RunContext, Task, Vision, WorkUnit
from ...integrations import use
from ...models.saliency import FILE, SIDE, SaliencyDecoder, load_decoder, normalised

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Saliency"]


@dataclass(frozen=True, kw_only=True)
class Saliency(Task):
    """A dense task on photographs: the map of every arm beside that of the plain model, photograph by photograph.

    An arm whose strategy is a conversion is the model that it makes, calibrated on other photographs. An arm with the
    option ``downsampled`` is the plain model on photographs whose sides are that fraction, its map
    scaled up again.

    Attributes:
        samples: photographs.
        side: of a photograph in pixels, a multiple of a patch's; the decoder was trained on 224.
        batch: photographs at once.
        photographs: ``streets`` (CamVid), or ``objects``: those of CIFAR-10, of 32 pixels, scaled up.
        calibrating: photographs of objects that conversions are calibrated on.
    """

    subject: ClassVar[str] = "vision"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("overlap", "overlap with the plain map", higher=True, kind="share",
               what="sum of the lesser over sum of the larger of the two maps, pixel by pixel"),
        Metric("correlation", "correlation with the plain map", higher=True),
        Metric("patches", "cosine with the plain patches", higher=True, what="mean over the last hidden states"),
        Metric("parameters", "share of the parameters that is left"),
    )  # fmt: skip

    samples: int = 39
    side: int = SIDE
    batch: int = 4
    photographs: Literal["streets", "objects"] = "streets"
    calibrating: int = 16

    def unsupported_reason(self, run: RunContext) -> str | None:
        from pathlib import Path

        source = street_photographs if self.photographs == "streets" else scenes
        if not source.available():
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
        photos = run.kept(("photographs", self.photographs, self.side, self.samples), self._photographs)
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
            if _conversion(arm) is not None and not unit.params["first"]:
                models = (self._subject(run, arm).model, cast(Vision, run.subject).model)
                left, whole = (sum(p.numel() for p in model.parameters()) for model in models)
                yield self.row("parameters", arm, left / whole, "model")
            run.advance(len(images))

    @torch.no_grad()
    def _mapped(self, run: RunContext, arm: Arm, decoder: SaliencyDecoder, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``[B, side, side]`` and patches ``[B, h * w, C]`` in float32."""
        vision = self._subject(run, arm)
        model: Any = vision.model
        part = float(arm.options.get("downsampled", 1.0))
        patch = int(model.config.patch_size)
        side = max(1, round(self.side * part / patch)) * patch
        given = images if side == self.side else interpolate(images, size=(side, side), mode="area")
        acting = arm.strategies if _conversion(arm) is None else ()
        with use(model, *acting) if acting else nullcontext():
            hidden = vision.encode(normalised(given).to(model.dtype)).last_hidden_state
        grid = side // patch
        patches = hidden[:, hidden.shape[1] - grid**2 :].float()
        return decoder(patches, (grid, grid), (self.side, self.side)), patches

    def _subject(self, run: RunContext, arm: Arm) -> Vision:
        """What an arm is measured on: the subject, or what its conversion makes of it."""
        vision, strategy = cast(Vision, run.subject), _conversion(arm)
        if strategy is None:
            return vision

        def make() -> Vision:
            images = normalised(_objects(self.side, self.calibrating, "train")).to(run.device, vision.model.dtype)
            return Vision(vision.name, calibrated(vision.model, strategy, images.split(self.batch))[0])

        return cast(Vision, run.kept(("converted", arm.key), make))

    def _photographs(self) -> Tensor:
        if self.photographs == "streets":
            return street_photographs.photographs(self.side, self.samples)
        return _objects(self.side, self.samples, "test")


def _conversion(arm: Arm) -> Conversion | None:
    """The conversion of an arm; None where it has none."""
    return arm.strategies[0] if len(arm.strategies) == 1 and isinstance(arm.strategies[0], Conversion) else None


def _objects(side: int, count: int, split: Literal["train", "test"]) -> Tensor:
    """Photographs of CIFAR-10 ``[N, 3, side, side]`` in 0..1, of the kinds in turn."""
    kinds = scenes.photographs(split)
    found = torch.stack([kinds[i % len(kinds)][i // len(kinds)] for i in range(count)]).float() / 255
    return interpolate(found, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)


def _folder(run: RunContext) -> str | Path:
    return cast(Vision, run.subject).folder


def _overlap(one: Tensor, other: Tensor) -> float:
    return float(torch.minimum(one, other).sum() / torch.maximum(one, other).sum())


def _correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
