# SPDX-License-Identifier: Apache-2.0
"""Time per token of encoders, forward and backward, by the length of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...models.decoder import TokenModel
from ...models.encoder import Encoder
from .mixer_speed import MixerSpeed

__all__ = ["EncoderSpeed"]


@dataclass(frozen=True, kw_only=True)
class EncoderSpeed(MixerSpeed):
    """As ``mixer_speed``, of models that see both sides."""

    kind: ClassVar[type[TokenModel]] = Encoder
