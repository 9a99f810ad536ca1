# SPDX-License-Identifier: Apache-2.0
"""Region codebook attention: what a region looks like in general, and this person's own, added within the region.

Faces and hands are a few tokens of a video, and carry most of what is looked at. Behind blocks of the denoiser, for
each region r, with features F ``[B, T, H, W, D]``,

    C_s = GramSchmidt(E_s) [n, D],  C_t = GramSchmidt(E_t) [m, D]     motion codebooks, learned, of no person
    F_motion = CrossAttn(CrossAttn(F, C_s), C_t)                      over the tokens of a frame, then over frames
    F_id = CrossAttn(F, E_id)                                         E_id: tokens of crops of the region, this person's
    M_r = sigmoid(conv(F))                                            the region, learned from boxes of keypoints
    F <- F + sum over r of M_r (F_motion + F_id)

and for the hands conv(F) also gives heat maps of the keypoints, for a loss. In inference only crops of the reference
image are needed. :mod:`manyheads.calls.human_priors` has the rest of the paper: what is done
for training.

"CyberHost: Taming Audio-driven Avatar Diffusion Model with Region Codebook Attention" (arXiv 2409.01876). No code is
published, and the paper's text was at hand as notes of others. Chosen here: n = 64, m = 32 (at most D); queries are
normalised; regions read the same F and are added up; W_o of the last attention of each sum is zero at first, so that
the denoiser begins as it was; the convolutions' depth; heads as the block has them. Keys are the same for all queries,
so that by the formula an attention "over frames" knows nothing of frames: queries get a sinusoidal position of their
frame first, as the temporal layers of AnimateDiff (``clock``). Crops of every region are encoded by a small residual
network that is trained along, where the paper has ArcFace for faces and a ResNet-18 for hands.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from ..calls.stage_blocks import RegionSeen, StageBlocks, StageOutput
from ..conditioning import InsertedBlocks, StageConfig
from ..errors import UserError

__all__ = ["REGIONS", "CyberHost", "RegionBlocks", "gram_schmidt"]

REGIONS = ("face", "hand")
_DEAD = 1e-4  # of a code's own length: what Gram-Schmidt leaves of one that lies in the span of those before it


@dataclass(frozen=True, kw_only=True)
class CyberHost(InsertedBlocks):
    """Adds region codebook attention behind blocks of a denoiser.

    Attributes:
        spatial, temporal: codes n and m of a region's two codebooks.
        codebook, identity: whether F_motion and F_id are there.
        orthogonal: whether codes go through Gram-Schmidt; otherwise they are used as they are learned.
        mask: whether what is added is held to the region; otherwise M_r is 1.
        clock: whether queries of the temporal codebook are told their frame.
        keypoints: heat maps of the hands; 6 are a palm and two finger tips of each hand of ``data.avatars``, 42 the
            usual 21 of two hands.
    """

    spatial: int = field(default=64, metadata={"help": "codes of the spatial codebook of a region"})
    temporal: int = field(default=32, metadata={"help": "codes of the temporal codebook of a region"})
    codebook: bool = field(default=True, metadata={"help": "motion codebooks"})
    identity: bool = field(default=True, metadata={"help": "tokens of crops of the reference"})
    orthogonal: bool = field(default=True, metadata={"help": "Gram-Schmidt over the codes of a codebook"})
    mask: bool = field(default=True, metadata={"help": "a learned mask of the region; false adds everywhere"})
    clock: bool = field(default=True, metadata={"help": "tells the temporal codebook's queries their frame"})
    keypoints: int = field(default=6, metadata={"help": "heat maps of keypoints of the hands, for a loss; 0 for none"})

    def __post_init__(self) -> None:
        if min(self.spatial, self.temporal) < 1 or self.keypoints < 0:
            raise UserError(f"{self.slug}: a codebook has a code at least, and keypoints count from 0")
        if not (self.codebook or self.identity):
            raise UserError(f"{self.slug}: without codebook and identity nothing would be added")

    def blocks(self, stages: Sequence[StageConfig]) -> "RegionBlocks":
        codes = max(self.spatial, self.temporal) if self.codebook and self.orthogonal else 0
        if codes > (least := min((s.dim for s in stages), default=codes)):
            raise UserError(f"{self.slug}: of {least} channels at most {least} codes are orthogonal; give fewer")
        return RegionBlocks(self, stages)


def gram_schmidt(codes: Tensor, spare: Tensor | None = None) -> Tensor:
    """Orthonormal rows with the span of the rows of ``codes [n, d]``, ``n <= d``, in their order; differentiable.

    Row i is what is left of code i without its share of those before, made 1 long: a QR decomposition of the codes
    whose R has a positive diagonal. The order of the codes counts, and their lengths do not.

    Args:
        codes: float32 or float64.
        spare: ``[n, d]``, a row for each code that lies in the span of those before it; without, such codes give rows
            that are orthonormal and else arbitrary, and no finite gradient.
    """
    if spare is not None:
        with torch.no_grad():
            left = torch.linalg.qr(codes.T)[1].diagonal().abs()
            dead = left <= _DEAD * codes.norm(dim=1).clamp(min=torch.finfo(codes.dtype).tiny)
        codes = torch.where(dead[:, None], spare, codes)
    q, r = torch.linalg.qr(codes.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0)
    made: Tensor = (q * sign).T
    return made


class RegionBlocks(StageBlocks):
    """The blocks of all stages, and what describes a person, once for all of them."""

    def __init__(self, strategy: CyberHost, stages: Sequence[StageConfig]) -> None:
        super().__init__()
        width = max((s.dim for s in stages), default=8)
        self.describe = nn.ModuleDict({r: CropEncoder(width) for r in REGIONS} if strategy.identity else {})
        self.stages = nn.ModuleList(
            nn.ModuleDict({r: Region(strategy, stage, width, strategy.keypoints * (r == "hand")) for r in REGIONS})
            for stage in stages
        )

    def described(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Tokens ``[B, K L, width]`` of each region; of a region without a descriptor none."""
        if not self.describe:
            return []
        if len(crops) != len(REGIONS):
            raise UserError(f"crops of {' and '.join(REGIONS)} are needed, [B, K, 3, S, S] each, not {len(crops)}")
        return [self.describe[r](x) for r, x in zip(REGIONS, crops, strict=True)]

    def stage(self, index: int, features: Tensor, described: Sequence[Tensor]) -> StageOutput:
        added, seen = torch.zeros_like(features), dict[str, RegionSeen]()
        for i, (name, region) in enumerate(self.stages[index].items()):  # type: ignore[operator]
            out, seen[name] = region(features, described[i] if described else None)
            added = added + out
        return StageOutput(features + added, seen)


class Region(nn.Module):
    """What is added to a region in one stage."""

    def __init__(self, strategy: CyberHost, stage: StageConfig, width: int, keypoints: int) -> None:
        super().__init__()
        dim, self.strategy = stage.dim, strategy
        if strategy.codebook:
            self.space, self.time = Codebook(strategy.spatial, dim), Codebook(strategy.temporal, dim)
            self.over_space, self.over_time = CrossAttention(stage, dim), CrossAttention(stage, dim, zero=True)
        if strategy.identity:
            self.own = CrossAttention(stage, width, zero=True)
        self.mask = _maps(dim, 1) if strategy.mask else None
        self.heat = _maps(dim, keypoints) if keypoints else None

    def forward(self, features: Tensor, described: Tensor | None) -> tuple[Tensor, RegionSeen]:
        """What is added, ``[B, T, H, W, D]``, and what was predicted on the way."""
        batch, frames, *grid, _ = features.shape
        tokens = features.flatten(2, 3)  # [B, T, N, D]
        added = torch.zeros_like(tokens)
        if self.strategy.codebook:
            added = added + self.motion(tokens)
        if described is not None:
            added = added + self.own(tokens.flatten(1, 2), described).unflatten(1, (frames, -1))
        images = features.flatten(0, 1).permute(0, 3, 1, 2)
        logits = None if self.mask is None else self.mask(images)[:, 0].unflatten(0, (batch, frames))
        heat = None if self.heat is None else self.heat(images).unflatten(0, (batch, frames))
        added = added.unflatten(2, grid)
        if logits is not None:
            added = added * logits.sigmoid().to(added.dtype)[..., None]
        return added, RegionSeen(logits, heat)

    def motion(self, tokens: Tensor) -> Tensor:
        """F_motion of ``[B, T, N, D]``; keys are the same for all queries, which therefore stand in one row."""
        orthogonal = self.strategy.orthogonal
        space, time = (book.codes(orthogonal).to(tokens.dtype)[None] for book in (self.space, self.time))
        found: Tensor = self.over_space(tokens.flatten(0, 2)[None], space)
        if self.strategy.clock:
            clock = _clock(tokens.shape[1], tokens.shape[3], tokens)[:, None]
            found = (found.view_as(tokens) + clock).flatten(0, 2)[None]
        return self.over_time(found, time).view_as(tokens)  # type: ignore[no-any-return]


class Codebook(nn.Module):
    """Learned codes, orthonormal whenever they are read."""

    spare: Tensor

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(count, dim) / math.sqrt(dim))
        self.register_buffer("spare", torch.randn(count, dim) / math.sqrt(dim), persistent=True)

    def codes(self, orthogonal: bool = True) -> Tensor:
        """``[n, D]``; in float32 at least."""
        with torch.autocast(self.learned.device.type, enabled=False):
            wide = torch.promote_types(self.learned.dtype, torch.float32)
            learned = self.learned.to(wide)
            return gram_schmidt(learned, self.spare.to(wide)) if orthogonal else learned


class CrossAttention(nn.Module):
    """``W_o softmax(q k^T / sqrt(d)) v`` with q = W_q LN(x), k = W_k c and v = W_v c; ``zero``: W_o is at first."""

    def __init__(self, stage: StageConfig, context: int, zero: bool = False) -> None:
        super().__init__()
        self.heads = stage.heads
        self.query, self.out = nn.Linear(stage.dim, stage.dim), nn.Linear(stage.dim, stage.dim)
        self.key, self.value = nn.Linear(context, stage.dim), nn.Linear(context, stage.dim)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x [B, N, D]``, ``context [B, S, d]``."""
        q, k, v = self.query(layer_norm(x, x.shape[-1:])), self.key(context), self.value(context)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        out: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class CropEncoder(nn.Module):
    """Crops ``[B, K, 3, S, S]`` to ``(S / 4)^2`` tokens each, ``[B, K L, width]``; S a multiple of four."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width // 2, 4, 2, 1)
        self.second = nn.Conv2d(width // 2, width, 4, 2, 1)
        self.within = nn.Conv2d(width, width, 1)

    def forward(self, crops: Tensor) -> Tensor:
        x = silu(self.second(silu(self.first(crops.flatten(0, 1)))))
        x = x + self.within(x)
        tokens: Tensor = x.flatten(2).transpose(1, 2).unflatten(0, crops.shape[:2]).flatten(1, 2)
        return tokens


def _maps(dim: int, count: int) -> nn.Sequential:
    """Auxiliary convolutions from features to maps."""
    inner = max(8, dim // 4)
    return nn.Sequential(nn.Conv2d(dim, inner, 3, padding=1), nn.SiLU(), nn.Conv2d(inner, count, 1))


def _clock(frames: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoidal positions of frames ``[T, D]``; an odd channel more stays zero."""
    rate = torch.exp(torch.arange(dim // 2, device=like.device).double() * (-math.log(10_000.0) / max(1, dim // 2)))
    phase = torch.arange(frames, device=like.device)[:, None] * rate
    made = torch.cat([phase.sin(), phase.cos()], 1)
    return torch.nn.functional.pad(made, (0, dim - made.shape[1])).to(like.dtype)
