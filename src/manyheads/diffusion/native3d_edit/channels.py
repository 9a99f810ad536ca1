# SPDX-License-Identifier: Apache-2.0
"""The source as further channels of the target: the embedding of a token reads both at its place.

The usual way of editing where source and target lie on one grid (InstructPix2Pix, arXiv 2211.09800), no paper's of
this page: a widened embedding of patches whose new weights are zero, so that the denoiser begins as it was. No token
more, and dim * channels * patch weights; only what is edited in place can be told so.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ...calls.condition import Condition
from ...conditioning import DenoiserConfig, SourceCondition

__all__ = ["SourceChannels"]


@dataclass(frozen=True, kw_only=True)
class SourceChannels(SourceCondition):
    """Adds an embedding of the source's patches to that of the target's."""

    def condition(self, config: DenoiserConfig) -> Condition:
        return _Widened(config)


class _Widened(Condition):
    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        kind = nn.Conv3d if len(config.patch) == 3 else nn.Conv2d
        self.embed = kind(config.channels, config.dim, config.patch, config.patch, bias=False)  # type: ignore[arg-type]
        nn.init.zeros_(self.embed.weight)

    def embedded(self, target: Tensor, tokens: Tensor, latents: Tensor) -> Tensor:
        more: Tensor = self.embed(latents)
        return target + more.flatten(2).transpose(1, 2)
