# SPDX-License-Identifier: Apache-2.0
"""A picture or film that no model made is told another object: is that what comes out, and does the rest stay?

The source is a photograph of the test split with an object on it, put together here: its caption and where the object
is are known exactly. It is inverted with its caption; the target's caption names another object. What has to stay is
everything outside the rectangle of the object in each frame, grown by one pixel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...editing import PromptEditor
from ...experiment import Metric, Row, RunContext, WorkUnit
from ._image_task import ImageTask, is_scenes, judge_of, pipe_of

if TYPE_CHECKING:
    from ...experiment import Arm

__all__ = ["PromptEdit", "outside"]


@dataclass(frozen=True, kw_only=True)
class PromptEdit(ImageTask):
    """Every arm edits the same sources by the same captions.

    An arm's options can say in place of strategies:

    - ``renoise=0.6``: noise is added to the source, as much as at that share of the steps, and taken off under the
      target's caption (SDEdit, arXiv 2108.01073); ``draws=7`` does so from as many noises, and the one counts whose
      whole is nearest to the source;
    - ``copy=True``: the source itself, which keeps everything and edits nothing.

    Attributes:
        iterations: of the inversion, see :func:`manyheads.diffusion._inversion.path`.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("object", "object that the caption says", higher=True, kind="share"),
        Metric("kept", "PSNR to the source outside the object, dB", "dB", higher=True),
        Metric("source", "PSNR of the source that is made beside, dB", "dB", higher=True),
        Metric("evaluations", "rows that the denoiser is given", what="for one edit, its inversion included"),
    )

    iterations: int = 5

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not is_scenes(pipe_of(run)):
            return "the contents of the images have to be known: give the pipelines scenes or moving"
        return super().unsupported_reason(run)

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...data import scenes

        pipe, (seed, first, last) = pipe_of(run), (unit.params[name] for name in ("seed", "first", "last"))
        kind, drawn = pipe.config.kind, run.torch_rng(sources=seed)
        sample = scenes.draw(kind, self.samples, drawn, "test")
        turn = torch.randint(1, len(scenes.OBJECTS), (self.samples,), generator=drawn)
        part = slice(first, last)
        images, labels, keep = sample.images[part] / 2 + 0.5, sample.labels[part], outside(sample.alpha[part])
        targets = labels.clone()
        targets[:, 0] = (labels[:, 0] + turn[part]) % len(scenes.OBJECTS)
        captions = torch.cat([scenes.tokens(x, kind) for x in (labels, targets)])
        latents = pipe.latents(images)
        path = pipe.path(latents, self.steps, self.iterations, captions[: len(labels)])
        for arm in run.arms:
            found: dict[str, Tensor] = {}
            with _counted(pipe.denoiser) as given:
                if "renoise" in arm.options:
                    made = self._renoised(run, arm, latents, captions[len(labels) :], images, (seed, first))
                elif arm.options.get("copy"):
                    made = images
                else:
                    source, made = self._edited(run, arm.strategies, path, captions).chunk(2)
                    found["source"] = _psnr(source, images, torch.ones_like(keep))
                    given["rows"] += self.steps * self.iterations * len(labels)
            found["evaluations"] = torch.full((len(labels),), given["rows"] / len(labels))
            found |= {
                "object": judge_of(run).see(made).right(targets, "object"), "kept": _psnr(made, images, keep),
            }  # fmt: skip
            yield from self.judged(arm, seed, found, first)
            run.advance(unit.cost / len(run.arms))

    def _edited(self, run: RunContext, strategies: Sequence[Any], path: Tensor, captions: Tensor) -> Tensor:
        """Sources, then targets."""
        import manyheads

        pipe = pipe_of(run)
        acting = [s.on_path(path) if isinstance(s, PromptEditor) else s for s in strategies]
        with manyheads.use(pipe, *acting) if acting else nullcontext():
            return self._images(
                pipe(
                    captions, latents=torch.cat([path[0]] * 2), num_inference_steps=self.steps,
                    guidance_scale=self.guidance, output_type="pt",
                )
            )  # fmt: skip

    def _renoised(
        self, run: RunContext, arm: Arm, latents: Tensor, captions: Tensor, images: Tensor, at: tuple[int, int]
    ) -> Tensor:  # fmt: skip
        """The nearest to the source of some draws."""
        pipe, (seed, first) = pipe_of(run), at
        best, least = images, torch.full((len(images),), torch.inf)
        for draw in range(arm.options.get("draws", 1)):
            noise = torch.cat([
                pipe.noise(1, run.torch_rng(renoised=draw, seed=seed, image=first + i)) for i in range(len(images))
            ])  # fmt: skip
            made = self._images(
                pipe.renoise(latents, noise, captions, arm.options["renoise"], self.steps, self.guidance)
            )
            off = (made - images).square().flatten(1).mean(1)
            nearer = (off < least).view(-1, *[1] * (made.ndim - 1))
            best, least = torch.where(nearer, made, best), torch.minimum(off, least)
        return best

    @staticmethod
    def _images(out: Any) -> Tensor:
        made: Tensor = out.frames if out.images is None else out.images
        return made.float().cpu()


@contextmanager
def _counted(denoiser: nn.Module) -> Iterator[Counter[str]]:
    """Count the rows that a denoiser is given inside."""
    counts: Counter[str] = Counter()

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts["rows"] += next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 3)

    handle = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def outside(alpha: Tensor) -> Tensor:
    """1 outside the rectangle of the object in each frame, grown by a pixel; ``alpha [N, 1, (F,) H, W]``."""
    there, inside = alpha > 0, torch.ones(())
    for axis in (-1, -2):
        line = there.any(-3 - axis, keepdim=True)  # columns, then rows, that the object is in
        index = torch.arange(line.shape[axis]).view((1, -1) if axis == -1 else (-1, 1))
        low = torch.where(line, index, 10**6).amin(axis, keepdim=True) - 1
        high = torch.where(line, index, -1).amax(axis, keepdim=True) + 1
        inside = inside * ((index >= low) & (index <= high))
    return 1 - inside


def _psnr(images: Tensor, others: Tensor, where: Tensor) -> Tensor:
    """In dB over the pixels ``where [N, 1, ...]`` is 1: ``[N]``; 100 at most."""
    error = ((images - others).square() * where).flatten(1).sum(1)
    return -10 * (error / (images.shape[1] * where.flatten(1).sum(1))).clamp(min=1e-10).log10()
