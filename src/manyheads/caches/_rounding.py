# SPDX-License-Identifier: Apache-2.0
"""Keys and values as a cache of four bits reads them, in a cache that holds them whole: quality without the bytes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call import AttentionCall
from ..errors import UserError
from ..strategy import AttentionEdit

__all__ = ["Rounding", "rounded"]


def rounded(x: Tensor, dim: int) -> Tensor:
    """``x [..., N, d]`` as symmetric INT4 reads it, one bfloat16 scale for what lies along ``dim``."""
    scale = (x.float().abs().amax(dim, keepdim=True) / 7).bfloat16().float()
    return ((x / scale.masked_fill(scale == 0, 1.0)).round().clamp(-7, 7) * scale).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Rounding(AttentionEdit):
    """Base: tokens that were in the cache before this forward are rounded, but for the last ``window_tokens``."""

    window_tokens: int = field(default=64, metadata={"help": "last tokens in the model's dtype"})

    def __post_init__(self) -> None:
        if self.window_tokens < 0:
            raise UserError(f"{self.slug}: window_tokens counts and cannot be negative")

    @abstractmethod
    def keys(self, k: Tensor) -> Tensor:
        """Keys ``[B, Hkv, N, d]``, rounded."""

    def edit(self, call: AttentionCall) -> AttentionCall:
        old = call.k.shape[2] - call.q.shape[2] - self.window_tokens
        if old <= 0:
            return call
        k, v = self.keys(call.k[:, :, :old]), rounded(call.v[:, :, :old], -1)
        return call.replace(k=torch.cat([k, call.k[:, :, old:]], 2), v=torch.cat([v, call.v[:, :, old:]], 2))
