# SPDX-License-Identifier: Apache-2.0
"""Poses added to tokens, as most adapters tell a denoiser its cameras; no attention and no rendering.

After ReCamMaster (arXiv 2503.11647), in every block: self-attention reads n + P(c), with the source as further frames,
where c are the twelve numbers of the camera of a token's frame and P is a linear layer that is zero at first; frames of
the source are given those of the frames they go with. Its projector behind self-attention, which begins as the
identity, is left out: self-attention trains here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...calls.condition import Condition, ViewCondition
from ...conditioning import DenoiserConfig, SourceCondition

__all__ = ["PoseAdded"]


@dataclass(frozen=True, kw_only=True)
class PoseAdded(SourceCondition):
    """Adds the pose of a frame to all its tokens."""

    recipe: ClassVar[str] = "postcam"

    def condition(self, config: DenoiserConfig) -> Condition:
        return _Added(config)


class _Added(ViewCondition):
    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, config.dim) for _ in range(config.layers))
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)

    def poses(self, cameras: Tensor) -> Tensor:
        return cameras.flatten(2)

    def read(self, layer: int, hidden: Tensor, poses: Tensor) -> Tensor:
        of_frame = self.layers[layer](poses).repeat(1, 2, 1)  # the target's frames, then the source's
        each = torch.repeat_interleave(of_frame, hidden.shape[1] // of_frame.shape[1], 1)
        return hidden + each
