# SPDX-License-Identifier: Apache-2.0
"""Self-Attention Guidance: blur what self-attention looks at most, and step away from what is predicted then.

No condition is needed. At every step

1. the prediction gives the clean sample x0 and the noise eps that the latents x_t are made of;
2. the attention that each image token received, averaged over heads, is compared with 1, which is the average of every
   map, and where it is more the mask is 1;
3. x0 is blurred inside the mask, noised again with the same eps, and predicted again;
4. the guided prediction is ``out + s (out - out')``.

Improving Sample Quality of Diffusion Models Using Self-Attention Guidance (arXiv 2210.00939).

Shapes: latents ``[B, C, H, W]``, or with frames between (``[B, C, F, H, W]``), each frame blurred by itself; the map's
column sums ``[B, N]`` of one layer, never the map.

Choices. With classifier-free guidance map, x0 and eps are those of the unconditional rows, as in diffusers' pipeline,
and ``s`` counts on top of the guided prediction. The paper's code clips x0 to [-1, 1], which is right for pixels and
wrong for latents: ``clip`` says. The layer is the middle block of a UNet, or the middle one of a transformer, unless
``layers`` names it; in joint attention the weights between image tokens are normalised again. Predictions of v and of
flows are turned into x0 and eps, which the paper does not treat. Latents that the pipeline packs into tokens (Flux,
LTX) are blurred over the grid of tokens, channel by channel. Rows and columns come from the token layout, never from a
square root. Blurring everything instead (``mask=all``) is the paper's blur guidance.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..call import AttentionCall, DenoiserCall, Layout, Site
from ..calls.statistics import ColumnSum
from ..calls.weights import measure
from ..errors import UserError
from ..strategy import AttentionWatch, DenoiserPrediction
from ._maps import blur
from ._prediction import Prediction, add_guidance, select_batch

__all__ = ["SAG"]

_KEY = "sag"


def _to_grid(x: Tensor, layout: Layout | None) -> Tensor:
    """Latents with rows and columns last; those packed into tokens ``[B, N, C]`` as ``[B, C, F, H, W]``."""
    if x.ndim != 3:
        return x
    if layout is None:
        raise UserError("sag: the latents are packed into tokens whose layout is not known")
    size = (layout.frames, layout.height, layout.width)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


@dataclass(frozen=True, kw_only=True)
class SAG(AttentionWatch, DenoiserPrediction):
    """Guidance away from a sample blurred where self-attention looks.

    Attributes:
        scale: s.
        sigma, kernel: of the Gaussian, in latent pixels.
        threshold: attention received, of an average of 1, above which a token is blurred.
        mask: where the blur goes: attended tokens, everything, attended tokens turned around, or as many at random.
        clip: clamp the predicted clean sample to [-1, 1] before blurring.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    scale: float = field(default=0.75, metadata={"help": "s: how far to push away from the blurred prediction"})
    sigma: float = field(default=1.0, metadata={"help": "of the Gaussian blur, in latent pixels"})
    kernel: int = field(default=9, metadata={"help": "width of the blur's kernel, odd"})
    threshold: float = field(
        default=1.0, metadata={"help": "blur tokens that receive more attention than this; mean 1"}
    )
    mask: Literal["attention", "all", "inverted", "random"] = field(
        default="attention", metadata={"help": "what is blurred; all but attention are the paper's controls"}
    )
    clip: bool = field(default=False, metadata={"help": "clamp the clean sample to [-1, 1], for pixels"})

    def __post_init__(self) -> None:
        if self.kernel % 2 != 1 or self.kernel < 1:
            raise UserError(f"sag: the kernel has an odd width, not {self.kernel}")

    def selects(self, site: Site) -> bool:
        if site.kind not in self.kinds:
            return False
        if self.layers is not None:
            return site.layer in self.layers
        if site.name.startswith(("down_blocks", "up_blocks", "mid_block")):
            return site.name.startswith("mid_block")
        return bool(site.peers) and site.layer == site.peers[len(site.peers) // 2]

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        step = call.diffusion
        if step is None or step.branches == ("blurred",) or self.mask == "all":
            return
        if step.layout is None:
            raise UserError(f"sag: the token layout of {call.site.name} is not known, so its map has no image")
        if call.site.kind == "joint":
            at = step.layout.image(call.q.shape[2])
            call = call.replace(q=call.q[:, :, at], k=call.k[:, :, at], v=call.v[:, :, at], mask=None, bias=None)
        weight = torch.ones(1, call.q.shape[2], 1, device=call.q.device)
        received = measure(call, [ColumnSum(weight)])[0][..., 0].mean(1)  # [B, N], mean 1
        step.run_state[_KEY] = received

    def denoise(self, call: DenoiserCall) -> Tensor:
        call.step.run_state.pop(_KEY, None)
        plain = call.predict()
        guided = call.guidance_scale is not None
        if not self.scale or (guided and call.step.branches == ("cond",)):
            return plain
        rows = call.step.rows("uncond", len(plain)) if "uncond" in call.step.branches else slice(0, len(plain))
        noisy = call.latents[rows]
        out = plain[rows, : noisy.shape[1]]  # a learned variance may follow the prediction
        rule = Prediction.of(call)
        x0, eps = rule.to_x0_eps(noisy, out)
        x0 = x0.clamp(-1, 1) if self.clip else x0
        grid = _to_grid(x0, call.step.layout)
        mask = self.blur_mask(call.step.run_state.get(_KEY), grid, rows, len(plain), call.step.layout)
        degraded = mask * blur(grid, self.sigma, self.kernel) + (1 - mask) * grid
        degraded = degraded if grid is x0 else degraded.flatten(2).transpose(1, 2)
        name = next(iter(call.given))
        changed = {**select_batch(call, rows), name: rule.add_noise(degraded, eps).to(noisy.dtype)}
        again = call.predict("blurred", **changed)[:, : out.shape[1]]
        return add_guidance(call, plain, self.scale * (out - again))

    def blur_mask(self, received: Tensor | None, x0: Tensor, rows: slice, batch: int, layout: Layout | None) -> Tensor:
        """The mask in the shape of the latents, with one channel."""
        if self.mask == "all":
            return torch.ones_like(x0[:, :1])
        if received is None or layout is None:
            raise UserError("sag: the layer was not run; name one of the model's with layers=")
        received = received.unflatten(0, (batch, -1)).flatten(1, 2)[rows]  # frames that attend apart are rows
        frames = layout.frames if received.shape[1] % layout.frames == 0 else 1
        size = layout.grid(received.shape[1] // frames)
        if size is None:
            raise UserError(f"sag: {received.shape[1]} tokens are no image of {layout.height} x {layout.width}")
        mask = (received > self.threshold).to(x0.dtype)
        if self.mask == "inverted":
            mask = 1 - mask
        if self.mask == "random":
            order = torch.rand(mask.shape, device=mask.device).argsort(1).argsort(1)
            mask = (order < mask.sum(1, keepdim=True)).to(x0.dtype)
        mask = mask.reshape(x0.shape[0], -1, *size)  # [B, F, h, w]
        large = interpolate(mask, size=x0.shape[-2:], mode="nearest")
        if x0.ndim == 4:
            return large[:, :1]
        return interpolate(large[:, None], size=x0.shape[-3:], mode="nearest")
