# SPDX-License-Identifier: Apache-2.0
"""Query-shared cross-attention: one softmax of one query over poses and rendering; an ordinary one with one stream."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...attention.rope import Rotary, rotate_pairs
from ...calls.condition import Condition, Stream, ViewCondition
from ...conditioning import DenoiserConfig, SourceCondition
from ...errors import UserError

__all__ = ["PostCam", "frame_positions"]

_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class PostCam(SourceCondition):
    """Has every block of a video denoiser attend to poses and a rendering at once."""

    recipe: ClassVar[str] = "postcam"

    pose: bool = field(default=True, metadata={"help": "attend to the poses of the cameras"})
    render: bool = field(default=True, metadata={"help": "attend to the rendering; without it the first stage's model"})
    softmax: Literal["joint", "separate"] = field(
        default="joint", metadata={"help": "one softmax over both streams, or one for each whose outputs are summed"}
    )
    hidden: int = field(default=256, metadata={"help": "width of the encoder of poses"})

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise UserError(f"{self.slug}: hidden={self.hidden}: an encoder of poses has a neuron at least")

    def condition(self, config: DenoiserConfig) -> Condition:
        return _Viewed(config, self)


class _Viewed(ViewCondition):
    def __init__(self, config: DenoiserConfig, how: PostCam) -> None:
        super().__init__()
        self.rendered, self.posed = how.render, how.pose
        self.layers = nn.ModuleList(
            _SharedQuery(config.dim, config.heads, how) for _ in range(config.layers if how.pose or how.render else 0)
        )
        if how.pose:
            self.encoder = pose_encoder(config.dim, how.hidden)

    def poses(self, cameras: Tensor) -> Tensor:
        """Tokens ``[B, F, dim]``: the twelve numbers of a camera, row by row, through four layers."""
        out: Tensor = self.encoder(cameras.flatten(2)) if self.posed else cameras
        return out

    def placed(self, rotary: Rotary, grid: tuple[int, ...], small: tuple[int, ...]) -> Rotary:
        """Of the target's positions a regular part, as far apart as fits, in the middle of what is left over."""
        cos, sin = (_spread(table, grid, small) for table in rotary)
        return cos, sin

    def viewed(self, layer: int, hidden: Stream, poses: Tensor, render: Stream | None) -> Tensor | None:
        if render is None and not self.posed:
            return None
        head = hidden.rotary[0].shape[-1]
        own = Stream(poses, frame_positions(poses.shape[1], head, hidden.rotary[0])) if self.posed else None
        out: Tensor = self.layers[layer](hidden, own, render)
        return out


class _SharedQuery(nn.Module):
    """One query, keys and values of two streams.

    Attributes:
        query, out: of both streams.
        key, value: of poses; ``key_render``, ``value_render`` of the rendering.
        projector: zero at first.
    """

    def __init__(self, dim: int, heads: int, how: PostCam) -> None:
        super().__init__()
        self.heads, self.joint = heads, how.softmax == "joint"
        self.query, self.out, self.projector = (nn.Linear(dim, dim) for _ in range(3))
        if how.pose:
            self.key, self.value = (nn.Linear(dim, dim) for _ in range(2))
        if how.render:
            self.key_render, self.value_render = (nn.Linear(dim, dim) for _ in range(2))
        self.query_norm, self.key_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        nn.init.zeros_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)

    def forward(self, hidden: Stream, poses: Stream | None, render: Stream | None) -> Tensor:
        """Of the target's ``[B, N, dim]``, given one stream or both."""
        q = self._turned(self.query_norm(self.query(hidden.tokens)), hidden.rotary)
        pairs = []
        if poses is not None:
            key, value = self.key(poses.tokens), self.value(poses.tokens)
            pairs.append((self._turned(self.key_norm(key), poses.rotary), self._heads(value)))
        if render is not None:
            key, value = self.key_render(render.tokens), self.value_render(render.tokens)
            pairs.append((self._turned(self.key_norm(key), render.rotary), self._heads(value)))
        if self.joint:
            pairs = [(torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2))]
        found = sum((scaled_dot_product_attention(q, k, v) for k, v in pairs), torch.zeros_like(q))
        mixed: Tensor = self.projector(self.out(found.transpose(1, 2).flatten(2)))
        return mixed

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return split

    def _turned(self, x: Tensor, rotary: Rotary) -> Tensor:
        return rotate_pairs(x.unflatten(2, (self.heads, -1)), rotary).transpose(1, 2)


def pose_encoder(dim: int, hidden: int) -> nn.Sequential:
    """Four layers with GELU between and a layer norm behind, ``[..., 12] -> [..., dim]``."""
    widths, layers = (12, hidden, hidden, hidden), list[nn.Module]()
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, dim), nn.LayerNorm(dim, eps=1e-6))


def frame_positions(frames: int, head: int, like: Tensor) -> Rotary:
    """Tables ``[1, F, 1, head]`` of the number of a frame over all channels of a head, every entry twice."""
    at, pair = (torch.arange(*span, dtype=torch.float64, device=like.device) for span in ((frames,), (0, head, 2)))
    angles = at[:, None] * _BASE ** -(pair / head)
    angles = angles.repeat_interleave(2, 1)[None, :, None]
    return angles.cos().to(like), angles.sin().to(like)


def _spread(table: Tensor, grid: tuple[int, ...], small: tuple[int, ...]) -> Tensor:
    step = min(size // few for size, few in zip(grid[1:], small[1:], strict=True))
    table = table.unflatten(1, grid)
    for axis, (size, few) in enumerate(zip(grid[1:], small[1:], strict=True), 2):
        at = (size - step * few) // 2 + step * torch.arange(few, device=table.device)
        table = table.index_select(axis, at)
    return table.flatten(1, 3)
