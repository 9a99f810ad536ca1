# SPDX-License-Identifier: Apache-2.0
"""The source's tokens behind those of the target, in one sequence: no new weights but the two vectors of ``stream``.

"Native 3D Editing with Full Attention". Nothing here is of 3D alone: any denoiser that attends over all its tokens.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...calls.condition import Condition
from ...conditioning import DenoiserConfig, SourceCondition

__all__ = ["ContextTokens"]


@dataclass(frozen=True, kw_only=True)
class ContextTokens(SourceCondition):
    """Joins the tokens of a source to those of the target."""

    time: Literal["clean", "same"] = field(
        default="clean", metadata={"help": "what source tokens are told of noise: none, or as much as the target has"}
    )
    stream: bool = field(default=True, metadata={"help": "a vector for each of the two streams, zero at first"})

    def condition(self, config: DenoiserConfig) -> Condition:
        return _Joined(config.dim, self.time == "clean", self.stream)


class _Joined(Condition):
    joined: ClassVar[bool] = True

    def __init__(self, dim: int, clean: bool, stream: bool) -> None:
        super().__init__()
        self.clean = clean
        self.stream = nn.Parameter(torch.zeros(2, dim)) if stream else None

    def embedded(self, target: Tensor, tokens: Tensor, latents: Tensor) -> Tensor:
        if self.stream is not None:
            target, tokens = target + self.stream[0], tokens + self.stream[1]
        return self.join(target, tokens)

    def join(self, target: Tensor, source: Tensor) -> Tensor:
        return torch.cat([target, source], 1)
