# SPDX-License-Identifier: Apache-2.0
"""Tasks on text in which some arms have a strategy that is trained on the subject first, once in a run."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from ...experiment import Arm, CausalLM, Row, RunContext, WorkUnit
from ._text_task import TextTask

__all__ = ["TrainedArms"]


@dataclass(frozen=True, kw_only=True)
class TrainedArms(TextTask):
    """Base: an arm whose options name ``asks`` is measured with what was trained for it, under each seed.

    Attributes:
        asks: option of an arm that is trained.
        takes: field of a strategy that takes the folder, as ``gist:gists``.
        steps: of training.
        batch, length: sequences of a step, and their tokens.
        train_text: corpus that is trained on; no text of the measurement is in it.
        lr: highest learning rate.
    """

    asks: ClassVar[str]
    takes: ClassVar[str]

    steps: int = 40
    batch: int = 1
    length: int = 256
    train_text: str = "brown"
    lr: float = 1e-3

    @abstractmethod
    def train(self, run: RunContext, arm: Arm, seed: int, batches: Callable[[int], Tensor], folder: Path) -> None:
        """Train for ``arm`` and save it in ``folder``."""

    def effort(self, arm: Arm) -> dict[str, Any]:
        """Budget and rate of the training of ``arm``; ``untrained`` ones are made, and stay as they were."""
        return {"budget": 1, "lr": 0.0} if arm.options.get("untrained") else {"budget": self.steps, "lr": self.lr}

    def settings(self) -> Mapping[str, Any]:
        """What decides the training, beside the arm and the seed."""
        return {name: getattr(self, name) for name in ("steps", "batch", "length", "train_text", "lr")}

    def measure(self, run: RunContext, unit: WorkUnit) -> list[Row]:
        """Rows of each seed; an arm that is not trained is measured once, and has the same rows under each."""
        start, stop = unit.params.get("arms", (0, len(run.arms)))
        whole, rows = run.arms[start:stop], []
        trained = {arm.key for arm in whole if self.asks in arm.options}
        for seed in run.seeds:
            chosen = whole if seed == run.seeds[0] else [arm for arm in whole if arm.key in trained]
            arms = tuple(self._trained(run, arm, seed) if arm.key in trained else arm for arm in chosen)
            made = run.among(arms, advance=lambda done: run.advance(done / len(run.seeds)))
            part = dataclasses.replace(unit, params={**unit.params, "arms": [0, len(arms)]})
            for row in super().measure(made, part) if arms else ():
                seeds = (seed,) if row.arm in trained else run.seeds
                rows += [dataclasses.replace(row, seed=each) for each in seeds]
        return rows

    def _trained(self, run: RunContext, arm: Arm, seed: int) -> Arm:
        key = (self.asks, arm.key, seed, *self.settings().values())
        folder = run.kept(key, lambda: self._folder(run, arm, seed))
        return dataclasses.replace(arm, spec=f"{self.takes}={folder}")

    def _folder(self, run: RunContext, arm: Arm, seed: int) -> Path:
        """What was trained for ``arm``, there whole or not at all, whichever process did it."""
        from ...recipes._adapters import encoded, id_batches, texts

        base = Path(tempfile.mkdtemp(prefix="trained-")) if run.folder is None else Path(run.folder)
        said = " ".join(map(str, (arm.name, seed, *self.settings().values())))
        place = base / re.sub(r"[^\w.-]+", "-", said)
        if place.exists():
            return place
        tokenizer = cast(CausalLM, run.subject).tokenizer
        ids = run.kept(("ids", self.train_text), lambda: encoded(texts(self.train_text), tokenizer))
        made = id_batches(ids, self.length, self.batch, seed, run.device)
        draft = Path(tempfile.mkdtemp(prefix=".", dir=base))
        self.train(run, arm, seed, made, draft)
        try:
            draft.rename(place)
        except OSError:  # another process was quicker, with the same
            shutil.rmtree(draft)
        return place
