# SPDX-License-Identifier: Apache-2.0
"""How well a masked diffusion language model knows the next block of prose, given what is read of the masks behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy

from ...data.texts import corpus
from ...experiment import Metric, Row, RunContext, WorkUnit
from ._diffusion_lm import DiffusionLMTask

__all__ = ["DenoisedProse"]

_PARTS = 40  # texts of the corpus that windows are cut from


@dataclass(frozen=True, kw_only=True)
class DenoisedProse(DiffusionLMTask):
    """Windows of prose of which a block is hidden, whole as when its decoding begins, or half of it.

    Arms that differ in steps alone read the same.

    Attributes:
        windows: that are judged.
        before: tokens in sight before the block.
        judged_text: prose by name.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("block_nll", "loss on the hidden tokens of a block, nats/token", "nats/token"),
    )

    windows: int = 96
    before: int = 24
    judged_text: str = "wikitext"

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...integrations.masked_diffusion import TokenDenoiser
        from ...recipes._adapters import encoded

        arm, seed = run.arm_of(unit), unit.params["seed"]
        decoding = self.decoding(arm)
        model, tokenizer, _ = self.trained(run, seed)
        denoiser = TokenDenoiser(model)
        text = run.kept(("prose", seed), lambda: encoded(corpus(self.judged_text)[:_PARTS], tokenizer))
        rng, size = run.torch_rng(windows="prose"), self.before + decoding.block
        starts = torch.randint(len(text) - size, (self.windows, 1), generator=rng)
        ids = text[starts + torch.arange(size)].to(run.device)
        half = torch.rand(self.windows, decoding.block, generator=rng).argsort(1) < decoding.block // 2
        behind = decoding.kept(self.room - decoding.block, torch.Generator().manual_seed(seed))
        places = torch.cat([torch.arange(size), size + behind]).to(run.device)
        for hidden, mask in (("all", torch.ones_like(half)), ("half", half)):
            mask = mask.to(run.device)
            noisy = torch.cat([ids, ids.new_full((len(ids), len(behind)), denoiser.mask)], 1)
            noisy[:, self.before : size].masked_fill_(mask, denoiser.mask)
            with torch.inference_mode():
                logits = denoiser(noisy, places, self.before, size)
            each = cross_entropy(logits.transpose(1, 2), ids[:, self.before :], reduction="none")
            losses = (each * mask).sum(1) / mask.sum(1)
            yield from self.each("block_nll", arm, losses.tolist(), seed=seed, at={"hidden": hidden})
