# SPDX-License-Identifier: Apache-2.0
"""Tasks on text in which an arm has attention gates that are trained on the subject first.

An arm whose options name a ``target`` gets gates trained for it, once in a run; what is measured is then
``attention_gate`` with these. ``untrained`` leaves them as they were drawn, with the threshold set as for the others.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ...experiment import Arm, CausalLM, Row, RunContext, WorkUnit
from ._text_task import TextTask
from .memory import Memory
from .niah_single import NiahSingle
from .perplexity import Perplexity
from .speed import Speed

__all__ = ["GatedMemory", "GatedNiah", "GatedPerplexity", "GatedSpeed"]


@dataclass(frozen=True, kw_only=True)
class _Gated(TextTask):
    """Base: puts ``attention_gate`` with its gates in the place of the arms that ask for gates.

    Attributes:
        steps: of training.
        batch, length: sequences of a step, and their tokens.
        train_text: corpus that is trained on; no text of the measurement is in it.
        lr: highest learning rate.
    """

    steps: int = 40
    batch: int = 1
    length: int = 256
    train_text: str = "brown"
    lr: float = 1e-2

    def measure(self, run: RunContext, unit: WorkUnit) -> list[Row]:
        arms = tuple(self._trained(run, arm) if "target" in arm.options else arm for arm in run.arms)
        made = dataclasses.replace(run, arms=arms)
        made._kept = run._kept  # contexts are drawn once
        return super().measure(made, unit)

    def _trained(self, run: RunContext, arm: Arm) -> Arm:
        """``arm`` as ``attention_gate``, its gates in the folder of the run."""
        key = ("gates", arm.key, self.steps, self.batch, self.length, self.train_text, self.lr)
        folder = run.kept(key, lambda: self._folder(run, arm))
        return dataclasses.replace(arm, spec=f"attention_gate:gates={folder}")

    def _folder(self, run: RunContext, arm: Arm) -> Path:
        """Gates for ``arm``, trained unless a unit of this run did so before."""
        from ...data.texts import corpus
        from ...recipes._adapters import text_batches
        from ...recipes.attention_gate import train_gates

        base = Path(tempfile.mkdtemp(prefix="gates-")) if run.folder is None else Path(run.folder)
        place = base / f"{arm.name} {self.steps} {self.batch} {self.length}".replace(" ", "-")
        if (place / "gates.json").exists():
            return place
        subject, untrained = cast(CausalLM, run.subject), bool(arm.options.get("untrained"))
        get_batch = text_batches(
            corpus(self.train_text), subject.tokenizer, self.length, self.batch, run.seed, run.device
        )  # fmt: skip
        gates = train_gates(
            subject.model, get_batch, target=float(arm.options["target"]), budget=1 if untrained else self.steps,
            lr=0.0 if untrained else self.lr, seed=run.seed,
        )  # fmt: skip
        return gates.save(place)


@dataclass(frozen=True, kw_only=True)
class GatedPerplexity(_Gated, Perplexity):
    """:class:`Perplexity`, with gates trained first."""


@dataclass(frozen=True, kw_only=True)
class GatedNiah(_Gated, NiahSingle):
    """:class:`NiahSingle`, with gates trained first."""


@dataclass(frozen=True, kw_only=True)
class GatedMemory(_Gated, Memory):
    """:class:`Memory`, with gates trained first."""


@dataclass(frozen=True, kw_only=True)
class GatedSpeed(_Gated, Speed):
    """:class:`Speed`, with gates trained first."""
