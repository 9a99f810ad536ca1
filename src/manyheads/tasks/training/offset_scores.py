# SPDX-License-Identifier: Apache-2.0
"""Attention scores by the distance of query and key: does a token right behind score less than one further off?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...mixers._mixer import SoftmaxMixer, positions_of
from ...models.decoder import TokenModel
from .byte_lm import ByteLM

__all__ = ["OffsetScores"]


@dataclass(frozen=True, kw_only=True)
class OffsetScores(ByteLM):
    """Mean score at an offset less that of all causal pairs, in the models of ``byte_lm``; over layers and heads.

    Attributes:
        offsets: distances of query and key.
    """

    reports: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("score", "mean score at an offset, less that of all", "logits", higher=True),
    )

    offsets: tuple[int, ...] = (0, 1, 2, 4, 8)

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        ids, about = self._windows(run, 1)
        found: list[Tensor] = []
        mixers = [module for module in model.modules() if isinstance(module, SoftmaxMixer)]
        if not mixers:
            raise UserError(f"{arm.key} has no layer of softmax attention, and no scores")
        hooks = [
            mixer.register_forward_pre_hook(lambda mixer, args: found.append(self._scores(mixer, args[0])))
            for mixer in mixers
        ]
        try:
            model(ids[:, :-1].to(run.device))
        finally:
            for hook in hooks:
                hook.remove()
        means = torch.stack(found).mean(0).cpu()
        for offset, values in zip(self.offsets, means.T.tolist(), strict=True):
            yield from self.each("score", arm, values, about, seed=seed, at={"offset": offset})

    def _scores(self, mixer: SoftmaxMixer, x: Tensor) -> Tensor:
        """Of inputs ``x [B, T, dim]``: ``[B, offsets]``."""
        at = positions_of(x.shape[0], x.shape[1], x.device, None, None, None)
        q, k = mixer.queries_and_keys(x, at, at.amax(1) + 1)
        scores = (q.float() @ k.float().mT) * mixer.scale
        apart = at[0][:, None] - at[0]
        mean = scores[..., apart >= 0].mean((1, 2))
        return torch.stack([scores[..., apart == offset].mean((1, 2)) - mean for offset in self.offsets], 1)
