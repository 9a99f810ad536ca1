# SPDX-License-Identifier: Apache-2.0
r"""LWGANet: a lightweight backbone of grouped attention (arXiv 2501.10040; blocks as in the authors' released code).

Objects of remote sensing differ much in size. A block splits its channels into four groups, d = C/4 each, and each
group reads another range; an MLP mixes them. With sigma the sigmoid and BN batch normalisation:

    y1  = x1 + x1 sigma(W2 act(BN(W1 x1)))                     GPA, points: 1x1 convolutions d -> 4d -> d
    y2  = act(BN(conv3x3(x2)))                                 RLA, regular local
    y3  = x3 up(sigma(BN(s(m))))                               SMA, sparse medium range, m = blur_3(max3x3(x3)):
          s = 11x3 + 3x11 of m, and of m sheared by 45 degrees; depthwise strips, stride 3
    y4  = BN(x4 + unpool(f(pool(x4))))                         SGA, sparse global: the largest of each 2x2 cell is read
          stages 1, 2: f = large kernels weighed place by place; stage 3: f = BN(self-attention), y4 without BN;
          stage 4: self-attention of all places, nothing pooled
    out = x + BN(drop_path(W_b act(BN(W_a [y1 y2 y3 y4]))))    MLP of ratio 2, 1x1

The stem is a 4x4 convolution with stride 4. Between stages channels double and sides halve: a 3x3 convolution of each
channel into two, then one with stride 2 beside a max pooling, joined by a 1x1 convolution. ``network("l0", 45)`` is the
published classifier, and ``network("l2", maps=(0, 1, 2, 3))`` a backbone of four maps, each with its own BN, with
``channels`` and ``strides`` for what reads them. Weights are drawn at random; published ones are not loaded.

Other than in the released code, any image is taken: it fails on images that are not square, since its shear cuts W
numbers where H are to be cut, on sides below 96 or so, where the blur reflects more than there is, and on maps of odd
sides, where pooling loses an edge. Here H are cut, the blur repeats the edge of a side below 3, and cells at an edge
may be smaller. On other images the result is the same (compared once, with one set of weights, at 128 and 224 pixels,
to rounding of float64). Sides that are no multiple of the stem's lose the rest there.

In training, ``size`` gives depths, activation and drop path, the task the channels (``dim``; L0 has 32) and the stem
(``patch``), and the MLP's width makes parameters equal. Left out: RandAugment (pictures of the task are mirrored and
moved), and the wrappers of transformers' backbones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, max_pool2d, pad, scaled_dot_product_attention

from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["DRFD", "GPA", "RLA", "SGA", "SIZES", "SMA", "LWGANet", "Lwganet", "network", "shear", "unshear"]

Range = Literal["point", "local", "medium", "global"]
RANGES: tuple[Range, ...] = ("point", "local", "medium", "global")
SIZES: dict[str, dict[str, Any]] = {
    "l0": {"dim": 32, "depths": (1, 2, 4, 2), "act": nn.GELU, "drop_path": 0.0},
    "l1": {"dim": 64, "depths": (1, 2, 4, 2), "act": nn.GELU, "drop_path": 0.1},
    "l2": {"dim": 96, "depths": (1, 4, 4, 2), "act": nn.ReLU, "drop_path": 0.1},
}
_HEAD = 4  # channels of a head
_STRIP = 11


def shear(x: Tensor) -> Tensor:
    """``[..., H, W] -> [..., H, W + H - 1]``: row i moved right by i, zeros elsewhere."""
    h, w = x.shape[-2:]
    moved: Tensor = pad(x, (0, h)).flatten(-2)[..., :-h].unflatten(-1, (h, w + h - 1))
    return moved


def unshear(x: Tensor) -> Tensor:
    """The inverse of :func:`shear`, ``[..., H, W + H - 1] -> [..., H, W]``; what was outside is dropped."""
    h, wide = x.shape[-2:]
    back: Tensor = pad(x.flatten(-2), (0, h)).unflatten(-1, (h, wide + 1))[..., : wide + 1 - h]
    return back


def _pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each 2x2 cell and where it is, ``[B, C, ceil(H / 2), ceil(W / 2)]``."""
    found: tuple[Tensor, Tensor] = max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    return found


def _unpooled(values: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """``values`` where they came from, zeros elsewhere."""
    flat = values.new_zeros(like.shape).flatten(2)
    return flat.scatter(2, at.flatten(2), values.flatten(2)).view(like.shape)


class GPA(nn.Module):
    """Gate point attention."""

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(dim, 4 * dim, 1, bias=False), nn.BatchNorm2d(4 * dim), act(),
            nn.Conv2d(4 * dim, dim, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[B, d, H, W]``, as of all groups."""
        out: Tensor = x + x * self.gate(x).sigmoid()
        return out


class RLA(nn.Sequential):
    """Regular local attention: a convolution."""

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), act())


class SMA(nn.Module):
    """Sparse medium-range attention: a gate of long strips, of which two lie along the diagonal."""

    blur: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        long, side = _STRIP, _STRIP // 2
        self.tall, self.wide, self.tall_sheared, self.wide_sheared = (
            nn.Conv2d(dim, dim, kernel, padding=around, groups=dim, bias=False)
            for kernel, around in (((long, 3), (side, 1)), ((3, long), (1, side))) * 2
        )
        self.norm = nn.BatchNorm2d(dim)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(taps, taps)[None, None], persistent=False)

    def coarse(self, x: Tensor) -> Tensor:
        """``m [B, d, H', W']``, every third place of the blurred maxima."""
        x = max_pool2d(x, 3, 1, 1)
        for sides, around in ((x.shape[3], (1, 2, 0, 0)), (x.shape[2], (0, 0, 1, 2))):
            x = pad(x, around, "reflect" if sides > 2 else "replicate")
        return conv2d(x, self.blur.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=3, groups=x.shape[1])

    def gate(self, x: Tensor) -> Tensor:
        """What is multiplied by, ``[B, d, H', W']``, between 0 and 1."""
        m = self.coarse(x)
        strips = self.tall(m) + self.wide(m) + unshear(self.tall_sheared(shear(m)))
        strips = strips + unshear(self.wide_sheared(shear(m.mT).mT).mT).mT
        found: Tensor = self.norm(strips).sigmoid()
        return found

    def forward(self, x: Tensor) -> Tensor:
        return x * interpolate(self.gate(x), x.shape[-2:], mode="nearest")


class LargeKernels(nn.Module):
    """Two kernels, of 5x5 and of 7x7 spread to 19x19 behind it, weighed place by place; a gate on what they read."""

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        half = max(1, dim // 2)
        self.enter, self.leave = nn.Sequential(nn.Conv2d(dim, dim, 1), act()), nn.Conv2d(dim, dim, 1)
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)
        self.squeeze = nn.ModuleList(nn.Conv2d(dim, half, 1) for _ in range(2))
        self.select, self.widen = nn.Conv2d(2, 2, 7, padding=3), nn.Conv2d(half, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        near = self.near(x)
        seen = torch.stack([part(a) for part, a in zip(self.squeeze, (near, self.far(near)), strict=True)], 1)
        both = seen.flatten(1, 2)
        weights = self.select(torch.cat((both.mean(1, keepdim=True), both.amax(1, keepdim=True)), 1)).sigmoid()
        out: Tensor = self.leave(x * self.widen((seen * weights[:, :, None]).sum(1)))
        return out


class SelfAttention(nn.Module):
    """Softmax attention among all places, heads of four channels, no biases."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = max(1, dim // _HEAD)
        self.qkv = nn.Linear(dim, 3 * self.heads * _HEAD, bias=False)
        self.out = nn.Linear(self.heads * _HEAD, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, self.heads, _HEAD)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(seen).mT.reshape(x.shape)
        return out


class SGA(nn.Module):
    """Sparse global attention of stage 0, 1, 2 or 3; the last one pools nothing."""

    def __init__(self, dim: int, act: type[nn.Module], stage: int) -> None:
        super().__init__()
        self.stage, self.norm = stage, nn.BatchNorm2d(dim)
        self.inner = LargeKernels(dim, act) if stage < 2 else SelfAttention(dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.stage > 2:
            seen = self.inner(x)
        else:
            values, at = _pooled(x)
            seen = self.inner(values)
            if self.stage == 2:
                return x + _unpooled(self.norm(seen), at, x)
            seen = _unpooled(seen, at, x)
        out: Tensor = self.norm(x + seen)
        return out


class Block(nn.Module):
    """Four groups, an MLP, a residual; ``[B, C, H, W]``. A range that is left out passes its group on as it is."""

    def __init__(
        self, dim: int, hidden: int, stage: int, ranges: Sequence[Range | None], act: type[nn.Module], drop: float
    ) -> None:
        super().__init__()
        made: dict[Range | None, Callable[[], nn.Module]] = {
            "point": partial(GPA, dim // 4, act), "local": partial(RLA, dim // 4, act),
            "medium": partial(SMA, dim // 4), "global": partial(SGA, dim // 4, act, stage), None: nn.Identity,
        }  # fmt: skip
        self.groups, self.drop = nn.ModuleList(made[one]() for one in ranges), drop
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act(), nn.Conv2d(hidden, dim, 1, bias=False)
        )
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(torch.cat([part(a) for part, a in zip(self.groups, x.chunk(4, 1), strict=True)], 1))
        if self.drop and self.training:  # of whole samples
            y = y * (torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop).to(y.dtype) / (1 - self.drop)
        out: Tensor = x + self.norm(y)
        return out


class DRFD(nn.Module):
    """Downsampling, ``[B, C, H, W] -> [B, 2C, ceil(H / 2), ceil(W / 2)]``."""

    def __init__(self, dim: int, act: type[nn.Module]) -> None:
        super().__init__()
        two = 2 * dim
        self.widen = nn.Conv2d(dim, two, 3, padding=1, groups=dim)
        self.conv = nn.Sequential(nn.Conv2d(two, two, 3, 2, 1, groups=two), act(), nn.BatchNorm2d(two))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(two))
        self.join = nn.Conv2d(2 * two, two, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x)
        out: Tensor = self.join(torch.cat((self.conv(x), self.pool(x)), 1))
        return out


class LWGANet(nn.Module):
    """Images ``[B, 3, H, W]`` of any size -> logits ``[B, classes]``, or feature maps where ``maps`` names stages.

    Args:
        dim: channels of the first stage, a multiple of 4 and 8 or more; each stage has twice those of the one before.
        depths: blocks of each of the four stages.
        act: kind of activation.
        drop_path: of the last block; it grows from 0.
        classes: of the head.
        hidden: of the MLPs of the first stage; 0 for ``2 * dim``.
        features: of the head.
        patch: side and stride of the stem.
        ranges: of the four groups; None for one that is passed on.
        maps: stages, 0 to 3, whose maps ``[B, dim 2^i, H / patch / 2^i, W / patch / 2^i]`` are given, without a head.

    Attributes:
        channels, strides: of the maps.

    Raises:
        UserError: ``dim`` cannot be split.
    """

    def __init__(
        self, dim: int, depths: Sequence[int], act: type[nn.Module], drop_path: float = 0.0, *, classes: int = 0,
        hidden: int = 0, features: int = 1280, patch: int = 4, ranges: Sequence[Range | None] = RANGES,
        maps: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if dim < 8 or dim % 4:
            raise UserError(f"lwganet: dim is split into four groups: give a multiple of 4 from 8 on, not {dim}")
        self.patch, self.maps, last = patch, tuple(maps), max(1, sum(depths) - 1)
        drops = iter([drop_path * i / last for i in range(sum(depths))])
        self.channels, self.strides = ([x * 2**i for i in self.maps] for x in (dim, patch))
        self.stem = nn.Sequential(nn.Conv2d(3, dim, patch, patch, bias=False), nn.BatchNorm2d(dim))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([DRFD(dim * 2 ** (i - 1), act)] if i else []),
                *(Block(dim * 2**i, (hidden or 2 * dim) * 2**i, i, ranges, act, next(drops)) for _ in range(depth)),
            )
            for i, depth in enumerate(depths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in self.channels)
        self.head = None if self.maps else nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8 * dim, features, 1, bias=False), act(), nn.Flatten(),
            nn.Linear(features, classes),
        )  # fmt: skip
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def stage_maps(self, images: Tensor) -> list[Tensor]:
        """Maps of the four stages, not normalised."""
        height, width = (max(0, self.patch - side) for side in images.shape[-2:])
        x, found = self.stem(pad(images, (0, width, 0, height))), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Any:
        """Logits, or a list of maps."""
        found = self.stage_maps(images)
        if self.head is None:
            return [norm(found[i]) for norm, i in zip(self.norms, self.maps, strict=True)]
        return self.head(found[-1])


def network(size: Literal["l0", "l1", "l2"], classes: int = 1000, *, maps: Sequence[int] = ()) -> LWGANet:
    """A network of the paper, of first weights: a classifier, or a backbone of feature maps."""
    return LWGANet(**SIZES[size], classes=classes, maps=maps)


@dataclass(frozen=True, kw_only=True)
class Lwganet(Recipe):
    """A network of four groups of channels, each of which reads another range."""

    task: ClassVar[str] = "picture_labels"

    size: Literal["l0", "l1", "l2"] = field(
        default="l0", metadata={"help": "depths, activation and drop path; channels are the task's dim, of l0 32"}
    )
    without: Literal["none", "point", "local", "medium", "global"] = field(
        default="none", metadata={"help": "a range whose group is passed on as it is"}
    )
    only: Literal["all", "point", "local", "medium", "global"] = field(
        default="all", metadata={"help": "one range for all four groups"}
    )
    features: int = field(default=1280, metadata={"help": "of the head; fewer where dim is below 16"})

    def __post_init__(self) -> None:
        if self.without != "none" and self.only != "all":
            raise UserError("lwganet: give one of only and without")

    @property
    def ranges(self) -> tuple[Range | None, ...]:
        """Of the four groups."""
        if self.only != "all":
            return (self.only,) * 4
        return tuple(None if one == self.without else one for one in RANGES)

    def build(self, task: FieldTask, width: int) -> nn.Module:
        made: Any = task
        own = {**SIZES[self.size], "dim": task.dim}
        return LWGANet(
            **own, classes=len(made.classes), hidden=width, features=self.features, patch=made.patch,
            ranges=self.ranges,
        )  # fmt: skip

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """The strips' gate of the first block, mean over channels, on the first image."""
        assert isinstance(model, LWGANet)
        block: Any = model.stages[0][0]  # type: ignore[index]
        group = next((i for i, one in enumerate(self.ranges) if one == "medium"), None)
        if group is None:
            return ()
        gate = block.groups[group].gate(model.stem(batch["inputs"][:1]).chunk(4, 1)[group])[0].float().mean(0)
        rows, columns = ([str(i * 3 * model.patch) for i in range(n)] for n in gate.shape)
        return (Picture("gate of strips, first image", rows, columns, gate.tolist(), ("pixels", "pixels")),)
