# SPDX-License-Identifier: Apache-2.0
"""Dialogues whose replies are to be told from those of others: data of tasks that rank replies, and their metrics."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor, tensor

from ...data.support_dialogues import dialogues
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Part, Sample
from .._field import MODEL_METRICS, FieldTask, parted

__all__ = ["DialogueTask", "Ranked"]

_UNLIKELY = 1e-4  # probability of a reply that was not among those that were scored
_POOL = 5  # replies that others are drawn from, at least, by those that are drawn


@dataclass(frozen=True)
class Ranked:
    """Replies and how well each fits.

    Attributes:
        replies: texts.
        scores: float32 ``[C]``.
    """

    replies: tuple[str, ...]
    scores: Tensor = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.replies[int(self.scores.argmax())] if self.replies else ""

    def place(self, reply: str) -> int:
        """From 1; of replies that score the same it is the last, and behind all where it is not among them."""
        if reply not in self.replies:
            return len(self.replies) + 1
        return int((self.scores >= self.scores[self.replies.index(reply)]).sum())

    def nll(self, reply: str) -> float:
        """Of a softmax over the scores, in nats."""
        if reply not in self.replies:
            return -float(np.log(_UNLIKELY))
        return -float(self.scores.log_softmax(0)[self.replies.index(reply)])


@dataclass(frozen=True, kw_only=True)
class DialogueTask(FieldTask):
    """Base of tasks whose samples are the messages so far and the reply that followed.

    Attributes:
        candidates: replies that a context is judged with.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("nll", "held-out loss among the candidates, nats", "nats/reply"),
        Metric("recall", "R@1/C: contexts whose own reply is first of C", higher=True, kind="share", floor=0.05,
               what="of replies that score the same, the right one counts as the last"),
        Metric("mrr", "reciprocal rank of the right reply", higher=True, kind="share"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("esconv-test",)
    takes: ClassVar[str] = "a folder of dialogues NAME.txt, a message a line; three dialogues or more"

    candidates: int = 20

    @property
    def stated(self) -> tuple[Metric, ...]:
        return (*self.floored(recall=1 / self.candidates), *MODEL_METRICS)

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        found = []
        for part, name, messages, answers in _own(folder) if folder else _public():
            for i in answers:
                about = {"context": name}
                found.append(Sample(f"{name} {i}", name, part, tuple(messages[:i]), messages[i], about))
        return sorted(found, key=lambda one: hashlib.sha256(one.name.encode()).digest())

    @classmethod
    def open(cls, path: Path) -> Sample:
        lines = _lines(path)
        cut = lines.index("") if "" in lines else len(lines)
        messages, offered = (tuple(filter(None, some)) for some in (lines[:cut], lines[cut:]))
        if not messages or not offered:
            raise UserError(f"{path}: give the messages so far, one a line, an empty line, and replies to choose from")
        return Sample(path.name, "", "test", messages, None, {"others": tuple(dict.fromkeys(offered))})

    def judged(self, part: Part) -> Sequence[Sample]:
        """Samples with their ``others``, the same ones for every arm and training."""
        every, chosen = self.samples(part), super().judged(part)
        pool = every[: max(len(chosen), _POOL * self.candidates)]
        return [
            dataclasses.replace(one, about={**one.about, "others": _others(one, pool, self.candidates - 1)})
            for one in chosen
        ]

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples whose replies differ.

        Raises:
            UserError: there are not so many.
        """
        found: dict[str, Sample] = {}
        for i in rng.permutation(len(samples)):
            found.setdefault(_same(samples[int(i)].target), samples[int(i)])
            if len(found) == self.batch:
                return list(found.values())
        raise UserError(f"there are {len(found)} different replies to train on: give the task batch={len(found)}")

    def score(self, sample: Sample, said: Ranked) -> Mapping[str, float]:
        place = said.place(sample.target)
        return {"nll": said.nll(sample.target), "recall": float(place == 1), "mrr": 1 / place}

    def truth(self, sample: Sample) -> Ranked:
        others = tuple(text for text in sample.about.get("others", ()) if text != sample.target)
        return Ranked((sample.target, *others), tensor([20.0, *[0.0] * len(others)]))


def _others(sample: Sample, pool: Sequence[Sample], count: int) -> tuple[str, ...]:
    """Replies of other dialogues and of other words, drawn by the sample's name."""
    seed = int.from_bytes(hashlib.sha256(sample.name.encode()).digest()[:8], "big")
    found: dict[str, str] = {}
    for i in np.random.default_rng(seed).permutation(len(pool)):
        other = pool[int(i)]
        if other.group != sample.group and (same := _same(other.target)) != _same(sample.target):
            found.setdefault(same, other.target)
        if len(found) == count:
            break
    return tuple(found.values())


def _same(text: str) -> str:
    """What two replies of the same words share."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _public() -> list[tuple[Part, str, list[str], range]]:
    """Dialogues by part: one in five of ESConv's dev part validates, its test part tests, all else trains."""
    found: list[tuple[Part, str, list[str], range]] = []
    for source in ("esconv", "esconv-dev", "esconv-test"):
        for n, turns in enumerate(dialogues(2, source)):
            few: Part = "validation" if source == "esconv-dev" and n % 5 == 0 else "train"
            part: Part = "test" if source == "esconv-test" else few
            found.append((part, f"{source} {n}", [one["content"] for one in turns], range(1, len(turns), 2)))
    return found


def _own(folder: Path) -> list[tuple[Part, str, list[str], range]]:
    """Dialogues of a user's folder; every message but the first is a reply."""
    texts = {path.stem: [line for line in _lines(path) if line] for path in sorted(folder.glob("*.txt"))}
    texts = {name: messages for name, messages in texts.items() if len(messages) > 1}
    if not texts:
        raise UserError(f"{folder} holds no dialogue of two messages or more; give {DialogueTask.takes}")
    parts = parted(list(texts))
    return [(parts[name], name, messages, range(1, len(messages))) for name, messages in texts.items()]


def _lines(path: Path) -> list[str]:
    try:
        return [" ".join(line.split()) for line in path.read_text("utf-8").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text; give a message a line") from error
