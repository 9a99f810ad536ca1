# SPDX-License-Identifier: Apache-2.0
"""HarmonPaint: fill a hole so that the object is whole and looks as what is around it, by self-attention alone.

Two parts act on self-attention, of a soft mask m of the hole (1 inside) over the tokens of each layer:

- *SAMS*, the self-attention masking strategy, tells the hole from what is around it, so that the object keeps its
  structure: the logit of query i and key j is lowered by how far their masks are apart,

      b_ij = log(1 - alpha |m_i - m_j|)

- *MAKVS*, the mask-adjusted key-value strategy, moves the style of the surroundings into the hole by the means of keys
  and values: for tokens of the hole, with means mu of known tokens and nu of those of the hole, per head,

      k' = k + lambda m (mu_k - nu_k),   v' = v + lambda m (mu_v - nu_v)

Known latents are blended in at every step, and known pixels are put back at the end (:mod:`._inpainting`).

HarmonPaint: Harmonized Training-Free Diffusion Inpainting (arXiv 2507.16732).

    with manyheads.use(pipe, "harmonpaint:mask=hole.png,source=photo.png"):
        pipe("an apple")

Shapes: q, k, v ``[B, H, T, d]``; masks ``[rows, N]`` of image tokens.

Choices. This is a reconstruction. No code is published, and the formulas of the paper were not at hand: known are the
abstract, that SAMS re-weights maps by a soft mask, and that MAKVS uses means of keys and values. All else is inferred:

- ``alpha`` and the form of the bias: 0 is the model's own attention, 1 parts the regions wholly; ``side`` says whose
  queries are held apart, those of both regions, of the hole, or of what is known.
- ``softness``: the hole, averaged over the pixels of a token, is blurred by a Gaussian of so many tokens.
- ``switch``: SAMS acts in the first 0.4 of the steps, in which structure forms, MAKVS in the rest.
- ``where``: the decoder, which is the upward half of a UNet, and the second half of a transformer's blocks.
- ``shift`` is lambda; ``match=moments`` brings the standard deviation to that of the surroundings too (AdaIN). A token
  is of the hole if at least half of it is.
- In joint attention only image tokens are told apart and moved; text is read by all. Means are of keys after norms and
  rotary positions, as attention gets them.
- ``mask_tokens=random`` is a control: the same soft mask with its tokens shuffled; what is filled stays the hole.

With no hole, or nothing but one, neither part acts. Rows and columns come from the token layout.
"""

from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..call import AttentionCall, DiffusionStep, Site
from ..errors import UserError
from ..strategy import AttentionEdit
from ._inpainting import Canvas, Inpainting
from ._maps import blur

__all__ = ["Canvas", "HarmonPaint"]


@dataclass(frozen=True, kw_only=True)
class HarmonPaint(Inpainting, AttentionEdit):
    """SAMS in early steps, MAKVS in late ones, over a blend of known latents.

    Attributes:
        alpha: of SAMS.
        shift: lambda of MAKVS.
        switch: share of the steps after which MAKVS takes over.
        softness: of the mask, in tokens.
        side: queries that SAMS holds apart.
        match: what MAKVS brings into line.
        where: blocks, unless ``layers`` names them.
        mask_tokens: whether attention is told the hole, or a mask shuffled at random.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    alpha: float = field(default=0.5, metadata={"help": "of SAMS: 0 for none, 1 parts hole and surroundings wholly"})
    shift: float = field(default=0.5, metadata={"help": "lambda of MAKVS: 0 for none, 1 moves means all the way"})
    switch: float = field(default=0.4, metadata={"help": "share of the steps with SAMS; the rest has MAKVS"})
    softness: float = field(default=1.0, metadata={"help": "sigma of the mask's blur, in tokens"})
    side: Literal["both", "hole", "known"] = field(default="both", metadata={"help": "queries that SAMS holds apart"})
    match: Literal["mean", "moments"] = field(default="mean", metadata={"help": "what MAKVS brings into line"})
    where: Literal["decoder", "all"] = field(default="decoder", metadata={"help": "blocks, unless layers= names them"})
    mask_tokens: Literal["hole", "random"] = field(
        default="hole", metadata={"help": "of attention's mask: those of the hole, or shuffled as a control"}
    )

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        super().__post_init__()
        for name in ("alpha", "switch"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"harmonpaint: {name} is a share from 0 to 1, not {value:g}")

    def selects(self, site: Site) -> bool:
        if not super().selects(site):
            return False
        if self.layers is not None or self.where == "all":
            return True
        if site.name.startswith(("down_blocks", "up_blocks", "mid_block")):
            return site.name.startswith("up_blocks")
        return site.layer is not None and site.layer in site.peers[len(site.peers) // 2 :]

    def edit(self, call: AttentionCall) -> AttentionCall:
        step = call.diffusion
        if step is None or step.index is None or not step.total:
            raise UserError("harmonpaint has to know the step: open the pipeline, not its denoiser")
        if step.axis in ("time", "text"):
            return call
        early = step.index < self.switch * step.total
        if not (self.alpha if early else self.shift):
            return call
        image, frames, size = _tokens(call, step)
        soft, hole = self.masks(step, size, call.q.device)
        if hole is None:
            return call
        soft, hole = (_rows(x, call, step, frames) for x in (soft, hole))
        return self.separated(call, soft, image) if early else self.harmonised(call, soft, hole, image)

    def masks(
        self, step: DiffusionStep, size: tuple[int, int], device: torch.device | None = None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The soft mask and which tokens are of the hole, ``[B or 1, h * w]``; None for the latter where all are one.

        Args:
            step: whose run keeps them.
            size: rows and columns of tokens.
            device: where they are to lie; where the hole is if not given.
        """
        key = f"harmonpaint {id(self)} {size}"
        if key not in step.run_state:
            area = adaptive_avg_pool2d(self.opened(step.run_state).area.to(device), size)
            softened = blur(area, self.softness, 2 * ceil(3 * self.softness) + 1)
            soft, hole = softened.flatten(1), (area >= 0.5).flatten(1)
            if self.mask_tokens == "random":
                order = torch.randperm(hole.shape[1], generator=torch.Generator().manual_seed(0)).to(hole.device)
                soft, hole = soft[:, order], hole[:, order]
            one = bool((area == area.amax()).all()) and float(area.amax()) in (0.0, 1.0)
            step.run_state[key] = self, soft, None if one else hole  # the number names this one as long as it is kept
        made: tuple[Tensor, Tensor | None] = step.run_state[key][1:]
        return made

    def separated(self, call: AttentionCall, soft: Tensor, image: slice) -> AttentionCall:
        """SAMS: the call with a bias ``[rows, 1, T, S]`` between image tokens."""
        apart = soft[:, :, None] - soft[:, None]  # [rows, query, key], in the mask's own precision
        apart = {"both": apart.abs(), "hole": apart.clamp(min=0), "known": (-apart).clamp(min=0)}[self.side]
        bias = call.q.new_zeros(len(soft), 1, call.q.shape[2], call.k.shape[2])
        bias[:, 0, image, image] = torch.log1p(-self.alpha * apart.clamp(max=1)).to(bias.dtype)
        return call.replace(bias=bias if call.bias is None else bias + call.bias)

    def harmonised(self, call: AttentionCall, soft: Tensor, hole: Tensor, image: slice) -> AttentionCall:
        """MAKVS: the call with keys and values of the hole moved to those around it."""
        k, v = (self.moved(x, soft, hole, image) for x in (call.k, call.v))
        return call.replace(k=k, v=v)

    def moved(self, x: Tensor, soft: Tensor, hole: Tensor, image: slice) -> Tensor:
        """Keys or values ``[B, H, T, d]`` with those of the hole moved towards the mean of the others."""
        part = x[:, :, image]
        wide = part if part.dtype == torch.float64 else part.float()
        inside = hole[:, None, :, None].to(wide.dtype)
        (mu, spread), (nu, own) = (_moments(wide, weight) for weight in (1 - inside, inside))
        there = hole.any(1) & ~hole.all(1)  # of a row without a hole, or with nothing else, there is nothing to move
        by = self.shift * inside * (soft * there[:, None])[:, None, :, None].to(wide.dtype)
        target = mu + (wide - nu) * (spread / own.clamp(min=1e-6) if self.match == "moments" else 1)
        made = x.clone()
        made[:, :, image] = (wide + by * (target - wide)).to(x.dtype)
        return made


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over tokens ``[B, H, T, d]`` whose weight ``[B, 1, T, 1]`` is 1."""
    count = weight.sum(2, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(2, keepdim=True) / count
    return mean, (((x - mean).square() * weight).sum(2, keepdim=True) / count).sqrt()


def _tokens(call: AttentionCall, step: DiffusionStep) -> tuple[slice, int, tuple[int, int]]:
    """Where image tokens stand in a call, of how many frames, and rows and columns of each."""
    layout, length = step.layout, call.q.shape[2]
    if layout is None:
        raise UserError(f"harmonpaint: the token layout of {call.site.name} is not known")
    image = layout.image(length) if call.site.kind == "joint" else slice(0, length)
    count = image.stop - image.start
    whole = count == layout.tokens
    size = (layout.height, layout.width) if whole else layout.grid(count)
    if size is None:
        raise UserError(f"harmonpaint: {count} tokens are no image of {layout.height} x {layout.width}")
    return image, layout.frames if whole else 1, size


def _rows(mask: Tensor, call: AttentionCall, step: DiffusionStep, frames: int) -> Tensor:
    """A mask for the frames in a row, and for each row of a batch where masks differ."""
    mask = mask.repeat(1, frames)
    if len(mask) == 1:
        return mask
    if step.axis == "space" and step.layout is not None:
        mask = mask.repeat_interleave(step.layout.frames, 0)
    if len(call.q) % len(mask):
        raise UserError(f"harmonpaint: {len(mask)} holes for {len(call.q)} rows; give one, or one for each image")
    return mask.repeat(len(call.q) // len(mask), 1)
