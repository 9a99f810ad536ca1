# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train one masked diffusion language model a seed, with which every arm then writes or reads.

Arms differ in how they decode alone: :mod:`manyheads.recipes.masked_diffusion_lm` trains before any is asked, by sums
of which those that are judged are none, and by prose of another corpus than that which is judged.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ...errors import UserError
from ...experiment import Arm, RunContext, Task, WorkUnit, seeding

if TYPE_CHECKING:
    from ...decoding._blocks import BlockDecoding
    from ...recipes.reasoning_rhythm import Problem
    from ...training.optimizers import OptimizerName

__all__ = ["DiffusionLMTask"]


@dataclass(frozen=True, kw_only=True)
class DiffusionLMTask(Task):
    """Base of tasks on masked diffusion language models.

    Attributes:
        model: what it goes on from, a decoder's folder or name; empty for a small one from scratch.
        dim, layers, heads, vocab: of a small one, whose tokens are numbers as they come.
        text: prose to train on.
        steps: of the training.
        tokens: of a step.
        lengths: of the rows of steps.
        share: of the rows that are prose.
        lr: highest learning rate.
        optimizer: of the training, ``adamw`` or ``muon``.
        terms, largest: of sums.
        room: masks that a reply begins as.
    """

    subject: ClassVar[str] = "trainable"

    model: str = ""
    dim: int = 128
    layers: int = 3
    heads: int = 4
    vocab: int = 512
    text: str = "brown"
    steps: int = 600
    tokens: int = 1536
    lengths: tuple[int, ...] = (28, 28, 28, 112)
    share: float = 0.1
    lr: float = 6e-3
    optimizer: OptimizerName = "adamw"
    terms: int = 3
    largest: int = 9
    room: int = 96

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{arm.key}/{seed}", 1.0, f"{arm.key}: model {seed + 1}", {"arm": arm.key, "seed": seed})
            for seed in run.seeds
            for arm in run.arms
        ]

    def guard(self, run: RunContext) -> None:
        """Refuse arms that do not fill blocks."""
        for arm in run.arms:
            self.decoding(arm)

    def decoding(self, arm: Arm) -> BlockDecoding:
        """How an arm writes."""
        from ...decoding._blocks import BlockDecoding

        found = arm.strategies[0] if len(arm.strategies) == 1 else None
        if not isinstance(found, BlockDecoding):
            raise UserError(f"{self.name} measures what fills blocks of masks, and {arm.key} does not: give it dpad")
        return found

    def trained(self, run: RunContext, seed: int) -> tuple[Any, Any, float]:
        """The model of a seed, its tokenizer, and its loss in the last tenth of training; trained once in a run."""
        shape = ("model", "dim", "layers", "heads", "vocab", "text", "terms", "largest")
        effort = ("steps", "tokens", "lengths", "share", "lr", "optimizer")
        key = (seed, *(getattr(self, name) for name in (*shape, *effort)))
        found: tuple[Any, Any, float] = run.kept_last("denoiser", key, lambda: self._found(run, seed, repr(key)))
        return found

    def problems(self, run: RunContext, count: int, use: str, **axes: int) -> list[Problem]:
        """Sums to judge."""
        from ...recipes.reasoning_rhythm import drawn_sums

        return drawn_sums(count, run.rng(sums=use, **axes), self.terms, self.largest)

    def _found(self, run: RunContext, seed: int, key: str) -> tuple[Any, Any, float]:
        from ...models import load

        place = None if run.folder is None else Path(run.folder) / f"denoiser-{seed}-{seeding.number(0, key=key):x}"
        if place is not None and place.is_dir():
            model, tokenizer = load(place, run.device)
            return model, tokenizer, float(model.config.final_loss)
        model, tokenizer, loss = self._train(run, seed)
        if place is not None:
            model.config.final_loss = loss
            draft = Path(tempfile.mkdtemp(prefix=".", dir=run.folder))
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            try:
                draft.rename(place)
            except OSError:  # another process was quicker
                shutil.rmtree(draft)
        return model, tokenizer, loss

    def _train(self, run: RunContext, seed: int) -> tuple[Any, Any, float]:
        from ...experiment import CausalLM
        from ...recipes._adapters import encoded, texts
        from ...recipes.masked_diffusion_lm import from_decoder, lessons, small, train_denoiser

        given = texts(self.text)
        if self.model:
            decoder = CausalLM(self.model)
            decoder.load(run.device)
            model, tokenizer = decoder.model, decoder.tokenizer
            from_decoder(model.float(), tokenizer)
        else:
            first = seeding.number(run.seed, weights=seed)
            model, tokenizer = small(
                given, dim=self.dim, layers=self.layers, heads=self.heads, vocab=self.vocab, digits=False, seed=first
            )  # fmt: skip
            model = model.to(run.device)
        judged = {problem.question for problem in self.problems(run, self.judged, "test")}
        get_batch = lessons(
            model, tokenizer, encoded(given, tokenizer) if self.share else None, lengths=self.lengths,
            tokens=self.tokens, share=self.share, terms=self.terms, largest=self.largest, without=judged,
            seed=seeding.number(run.seed, batches=seed) % 2**31,
        )  # fmt: skip
        state = train_denoiser(model, get_batch, self.steps, lr=self.lr, optimizer=self.optimizer)
        model.to(torch.bfloat16 if run.device.type == "cuda" else torch.float32)
        tail = state.losses[-math.ceil(len(state.losses) / 10) :]
        return model, tokenizer, sum(tail) / len(tail)

    @property
    def judged(self) -> int:
        """Sums that no training may hold: as many as any task of the experiment judges."""
        return 256


def timed(run: RunContext, do: Callable[[], Any]) -> tuple[Any, float]:
    """What ``do`` gives, and its seconds."""
    import time

    run.synchronise()
    start = time.perf_counter()
    found = do()
    run.synchronise()
    return found, time.perf_counter() - start
