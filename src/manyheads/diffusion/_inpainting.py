# SPDX-License-Identifier: Apache-2.0
"""Inpainting with a denoiser that was not trained for it: known latents are blended in at every step.

At a step with ``x_t = alpha x0 + sigma eps`` the prediction around the hole is replaced by the one that says ``x0`` is
the given image z. A sampler of one step (DDIM, Euler) then goes through ``alpha_t z + sigma_t eps`` there, with the
noise ``eps`` that the run began with: so the next latents are the blend ``m x + (1 - m) q(z, t)``, and the last ones
are z. Nothing of a pipeline's loop is changed, and predictions of noise, clean samples, v and flows all do. Solvers of
several steps (DPM-Solver, UniPC) come to z as well, since what is predicted there never changes.

With ``resamples`` above 1 a step is taken, noised back, and taken again, so that the hole can agree with what is around
it. The pipeline is told the one prediction that leads from its own latents to where the last of these steps came.

Blended Latent Diffusion (arXiv 2206.02779); RePaint: Inpainting using Denoising Diffusion Probabilistic Models (arXiv
2201.09865), whose jumps are here of one step.

Shapes: images ``[B, 3, H, W]`` in 0..1, holes ``[B, 1, H, W]`` with 1 in the hole, latents ``[R, C, h, w]`` in branches
of B rows; one image or hole does for all rows. A latent that any part of the hole falls on is made new; pixels that are
less than half in it are put back as they were (:meth:`Inpainting.kept`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ..call import DenoiserCall
from ..errors import UserError
from ..inpainting import Inpainter
from ._inversion import levels
from ._prediction import Prediction

__all__ = ["Canvas", "Inpainting"]


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """What is there and where it is missing.

    Attributes:
        hole: how much of a pixel is in the hole, 0 to 1 or bool, ``[B or 1, 1, H, W]``.
        image: float32 ``[B or 1, 3, H, W]`` in 0..1; None where the pipeline knows the image itself.
    """

    hole: Tensor
    image: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse other shapes."""
        wrong = self.hole.ndim != 4 or self.hole.shape[1] != 1
        if wrong or (self.image is not None and (self.image.ndim != 4 or self.image.shape[1] != 3)):
            raise UserError("a canvas has a hole [B, 1, H, W] and an image [B, 3, H, W]")

    @property
    def area(self) -> Tensor:
        """The hole as numbers, where it was given as true and false."""
        return self.hole if self.hole.is_floating_point() else self.hole.float()

    def sized(self, height: int, width: int) -> "Canvas":
        """Both at a size, averaged over the pixels that become one."""
        hole = self.area
        if hole.shape[-2:] != (height, width):
            hole = interpolate(hole, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
        image = self.image
        if image is not None and image.shape[-2:] != (height, width):
            image = interpolate(image, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
        return Canvas(hole, image)


@dataclass(frozen=True, kw_only=True)
class Inpainting(Inpainter):
    """Keeps an image around a hole.

    Attributes:
        mask: file of an image, white in the hole.
        source: file of the image; without one attention alone is steered, as in a pipeline made for inpainting.
        canvas: both as tensors, in place of files.
        resamples: how often each step is taken.
    """

    mask: str = field(default="", metadata={"help": "image file that is white in the hole"})
    source: str = field(default="", metadata={"help": "image file to fill in; none where the pipeline is given it"})
    canvas: Any = field(
        default=None, compare=False, repr=False, metadata={"help": "in Python: a Canvas, in place of files"}
    )
    resamples: int = field(default=1, metadata={"help": "how often each step is taken, noised back between"})

    def __post_init__(self) -> None:
        """Refuse what is no file and no canvas."""
        for name in ("mask", "source"):
            if (path := getattr(self, name)) and not Path(path).is_file():
                raise UserError(f"{self.slug}: {name}={path} is no file; name an image, as {name}={name}.png")
        if self.canvas is not None and not isinstance(self.canvas, Canvas):
            raise UserError(f"{self.slug}: a canvas is given in Python, as canvas=Canvas(hole, image); name files here")
        if self.resamples < 1:
            raise UserError(f"{self.slug}: each step is taken at least once, not {self.resamples} times")

    def opened(self, run_state: dict[str, Any] | None = None) -> Canvas:
        """Hole and image; read once in a run whose scratch is given.

        Raises:
            UserError: there is no mask, or a file is no image.
        """
        if self.canvas is not None:
            found: Canvas = self.canvas
            return found
        if not self.mask:
            raise UserError(
                f"{self.slug}: say where the hole is, as {self.slug}:mask=hole.png (white in the hole), or canvas="
            )
        kept: dict[str, Any] = {} if run_state is None else run_state
        key = f"canvas of {self.mask} and {self.source}"
        if key not in kept:
            kept[key] = Canvas(_pixels(self.mask, "L"), _pixels(self.source, "RGB") if self.source else None)
        made: Canvas = kept[key]
        return made

    def denoise(self, call: DenoiserCall) -> Tensor:
        state = call.step.run_state
        canvas = self.opened(state)
        if canvas.image is None:
            return call.predict()
        if call.rescales:
            raise UserError(f"{self.slug}: give guidance_rescale=0, which would change what is kept")
        if call.encode is None or call.latents.ndim != 4:
            raise UserError(f"{self.slug}: fills images by pipelines whose latents are [B, C, H, W]; open the pipeline")
        rule, (height, width) = Prediction.of(call), call.latents.shape[-2:]
        key = f"known latents {id(self)}"
        if key not in state:
            z = call.encode(canvas.image.to(call.latents.device), height, width).to(call.latents.dtype)
            state[key] = self, z, adaptive_avg_pool2d(canvas.area.to(z.device), (height, width)) > 0
        known, hole = (_rows(x, len(call.latents), self.slug) for x in state[key][1:])
        if self.resamples > 1:
            return self._resampled(call, rule, known, hole)
        return _toward(rule, call.predict(), call.latents, known, hole)

    def kept(self, images: Tensor) -> Tensor:
        canvas = self.opened().sized(*images.shape[-2:])
        if canvas.image is None:
            return images
        image, hole = (_rows(x.to(images.device), len(images), self.slug) for x in (canvas.image, canvas.hole))
        return torch.where(hole < 0.5, image.to(images.dtype), images)

    def _resampled(self, call: DenoiserCall, rule: Prediction, known: Tensor, hole: Tensor) -> Tensor:
        """The prediction that leads to where the last of several steps from here comes to."""
        branches, g, channels = call.step.branches, call.guidance_scale, known.shape[1]
        if g is not None and sorted(branches) != ["cond", "uncond"]:
            raise UserError(f"{self.slug}: resamples need both branches of guidance in one batch")
        try:
            steps = levels(call.scheduler)
        except UserError as error:
            raise UserError(f"{self.slug}: give resamples=1, which any scheduler does; {error}") from None
        at = (call.scheduler.timesteps.double().cpu() - call.step.timestep).abs().argmin()
        after, name = steps[int(at)][1], next(iter(call.given))
        rows = len(call.latents) // len(branches)
        x, out = call.latents[:rows, :channels], call.predict()
        source = call.step.run_state.setdefault("resampling", torch.Generator(x.device).manual_seed(0))
        for left in reversed(range(self.resamples)):
            guided = out[:, :channels]
            if g is not None:
                cond, uncond = (guided[call.step.rows(branch, len(out))] for branch in ("cond", "uncond"))
                guided = uncond + g * (cond - uncond)
            y = after.add_noise(*rule.to_x0_eps(x, _toward(rule, guided, x, known[:rows], hole[:rows])))
            if left:
                share = rule.alpha / after.alpha
                spread = max(rule.sigma**2 - (share * after.sigma) ** 2, 0) ** 0.5
                x = share * y + spread * torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype)
                noisy = torch.cat([torch.cat([x] * len(branches)), call.latents[:, channels:]], 1)
                out = call.predict("", **{name: noisy})
        # The clean sample and the noise of which both the latents at hand and those to come are made.
        x = call.latents[:rows, :channels]
        scale = rule.alpha * after.sigma - rule.sigma * after.alpha
        x0, eps = (x * after.sigma - y * rule.sigma) / scale, (y * rule.alpha - x * after.alpha) / scale
        made = torch.cat([rule.output(x0, eps)] * len(branches))
        return torch.cat([made, out[:, channels:]], 1)


def _toward(rule: Prediction, out: Tensor, latents: Tensor, known: Tensor, hole: Tensor) -> Tensor:
    """A prediction ``[R, C', h, w]`` that says ``known`` outside the hole; what follows C channels stays."""
    channels = known.shape[1]
    x = latents[:, :channels]
    right = rule.output(known, (x - rule.alpha * known) / rule.sigma)
    return torch.cat([torch.where(hole, out[:, :channels], right), out[:, channels:]], 1)


def _rows(x: Tensor, rows: int, slug: str) -> Tensor:
    """One for each row of a batch of branches."""
    if rows % len(x):
        raise UserError(f"{slug}: {len(x)} images or holes for {rows} rows; give one, or one for each image")
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1))


def _pixels(path: str, mode: str) -> Tensor:
    """An image file, float32 ``[1, C, H, W]`` in 0..1."""
    try:
        with Image.open(path) as image:
            array = np.array(image.convert(mode), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError):
        raise UserError(f"{path} is no image; give a png, jpg or webp") from None
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).movedim(-1, 0)[None]
