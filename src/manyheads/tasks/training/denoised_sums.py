# SPDX-License-Identifier: Apache-2.0
"""Sums that a masked diffusion language model works out block by block: how many come out, and what it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...data.word_problems import last_number
from ...experiment import Metric, Row, RunContext, WorkUnit
from ._diffusion_lm import DiffusionLMTask, timed

__all__ = ["DenoisedSums"]


@dataclass(frozen=True, kw_only=True)
class DenoisedSums(DiffusionLMTask):
    """Worked sums that no training held.

    Prompts of one length are written on together, ``at_once`` of them; a time is that of such a batch by its texts.

    Attributes:
        samples: sums, 256 at most.
        at_once: texts of a batch.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("solved", "sums whose last number is right", higher=True, kind="share"),
        Metric("exact", "replies that are the worked answer, token by token", higher=True, kind="share"),
        Metric("ms", "milliseconds a text", "ms", kind="time"),
        Metric("forwards", "forwards of the model for a text", "forwards"),
        Metric("read", "tokens that the model read for a text", "tokens"),
        Metric("written", "tokens of a reply", "tokens"),
        Metric("training_nll", "loss in the last tenth of training, nats/token", "nats/token"),
    )

    samples: int = 96
    at_once: int = 64

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...integrations.decoding import end_tokens
        from ...integrations.masked_diffusion import TokenDenoiser
        from ...recipes.masked_diffusion_lm import solved_row

        arm, seed = run.arm_of(unit), unit.params["seed"]
        decoding = self.decoding(arm)
        model, tokenizer, loss = self.trained(run, seed)
        yield self.row("training_nll", arm, loss, "training", seed=seed)
        problems = self.problems(run, self.judged, "test")[: self.samples]
        denoiser = TokenDenoiser(model)
        rows, ends = [solved_row(tokenizer, problem) for problem in problems], end_tokens(model, tokenizer)
        groups: dict[int, list[int]] = defaultdict(list)
        for i, (prompt, _) in enumerate(rows):
            groups[len(prompt)].append(i)
        chunks = [part[i : i + self.at_once] for part in groups.values() for i in range(0, len(part), self.at_once)]

        def write(chunk: list[int], most: int) -> list[Any]:
            ids = torch.tensor([rows[i][0] for i in chunk], device=run.device)
            return decoding.write_rows(denoiser, ids, most, ends=ends, seed=seed)

        write(chunks[0], decoding.block)  # what is done once is done before the clock starts
        for number, chunk in enumerate(chunks):
            found, seconds = timed(run, lambda chunk=chunk: write(chunk, self.room))  # type: ignore[misc]
            at = {"texts": len(chunk)}
            yield self.row("ms", arm, 1000 * seconds / len(chunk), f"{number}", seed=seed, about=at)
            for i, made in zip(chunk, found, strict=True):
                text = tokenizer.decode(made.tokens, skip_special_tokens=True)
                values = {
                    "solved": last_number(text) == problems[i].result, "exact": made.tokens == rows[i][1],
                    "forwards": made.forwards, "read": made.notes["tokens_read"], "written": len(made.tokens),
                }  # fmt: skip
                for name, value in values.items():
                    yield self.row(name, arm, value, f"{i}", seed=seed)
            run.advance(1.0 / len(chunks))
