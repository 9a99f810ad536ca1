# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion as LLaDA decodes: block after block, every mask behind a block read (arXiv 2502.09992)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._blocks import BlockDecoding

__all__ = ["BlockDiffusion"]


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion(BlockDecoding):
    """Fill blocks, surest places first, with the whole suffix in sight."""

    def kept(self, behind: int, draws: torch.Generator) -> Tensor:
        return torch.arange(behind)
