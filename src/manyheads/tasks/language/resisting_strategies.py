# SPDX-License-Identifier: Apache-2.0
"""How do people resist persuasion? A label for each turn, by what was said so far; F1 of unseen dialogues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...attention.masks import padded
from ...data.persuasion import Dialogue, negotiations, persuasions, read_dialogue, read_folder
from ...errors import UserError, refusal
from ...experiment import RunContext
from ...recipe import Batch, Part, Sample
from .._folds import PARTS, by_hash, part_of, turned
from . import _turns
from ._turn_task import Labelled, TurnTask

__all__ = ["Labelled", "ResistingStrategies"]

LEARNED = "learned"
_FOLDS = 10
_PUBLIC = "public:"  # before the name of a corpus, so that it is no folder's


@dataclass(frozen=True, kw_only=True)
class ResistingStrategies(TurnTask):
    """Dialogues whose turns of who resists have labels; those of the persuader are read, and have none.

    ``corpus`` is ``persuasion`` (PersuasionForGood: ten labels of the persuadee's sentences) or ``negotiation``
    (CraigslistBargain: eight labels of all turns), annotated for RESPER. Dialogues are dealt to ten folds: a seed is a
    fold, which is tested, the next validates, the others are trained on, and with several seeds intervals count folds.
    F1 is of the turns of a fold together, by class and as the mean of the classes that the fold has; a dialogue's value
    is the figure and what the dialogue adds to its deviation. Reference models label a turn by its own words alone:
    ``flat_bigru`` and ``convolutions``.

    Attributes:
        corpus: public one, where there is no folder.
        words: vectors of words: the states of a published encoder, which learn nothing (a name or folder as
            :func:`manyheads.models.load_reader` takes it), or ``learned``: embeddings that are trained.
        most: words of a turn that are read; of an encoder tokens, with those that it adds.
    """

    files: ClassVar[tuple[str, ...]] = ("resper-persuasion", "resper-negotiation")
    published: ClassVar[tuple[str, ...]] = ("all-minilm-l6-v2",)
    references: ClassVar[tuple[str, ...]] = ("flat_bigru", "convolutions")
    takes: ClassVar[str] = (
        "a folder of dialogues NAME.csv, ten or more, a turn a row, with the columns text, resists (1 for turns of who "
        "may resist, 0) and label (empty: no strategy)"
    )

    corpus: Literal["persuasion", "negotiation"] = "persuasion"
    words: str = "all-minilm-l6-v2"
    most: int = 32
    dim: int = 64
    dropout: float = 0.5
    batch: int = 4
    steps: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < 3:
            raise UserError("most is a number of words, 3 or more")

    @property
    def source(self) -> str:
        return self.folder or _PUBLIC + self.corpus

    @property
    def label(self) -> str:
        return "" if self.folder else self.corpus

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all labels, sorted."""
        return _classes(tuple(s for part in PARTS for s in super(ResistingStrategies, self).samples(part)))

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        """Dialogues of a folder, or of the public corpus of that name."""
        name = str(folder or _PUBLIC + "persuasion")
        public = {"persuasion": persuasions, "negotiation": negotiations}
        found = public[name.removeprefix(_PUBLIC)]() if name.startswith(_PUBLIC) else read_folder(Path(name))
        if len(found) < _FOLDS:
            raise UserError(f"there are {len(found)} dialogues, and {_FOLDS} are needed, one for each fold at least")
        homes = {one.name: i % _FOLDS for i, one in enumerate(sorted(found, key=lambda one: by_hash(one.name)))}
        return [_sample(one, homes[one.name]) for one in found]

    @classmethod
    def open(cls, path: Path) -> Sample:
        return _sample(read_dialogue(path))

    def samples(self, part: Part) -> Sequence[Sample]:
        """Dialogues of a part of the fold, in an order that says nothing."""
        return turned(tuple(tuple(super(ResistingStrategies, self).samples(one)) for one in PARTS), self.fold)[part]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of dialogues.

        ``words [B, N, T]`` numbers or ``[B, N, T, D]`` states, ``word_mask [B, N, T]``; ``mask``, ``own`` and
        ``targets [B, N]``, -1 where a turn has no label.
        """
        if self.words == LEARNED:
            known = _turns.vocabulary(tuple(self.samples("train")))
            rows: list[Sequence[Tensor]] = [[_turns.word_ids(known, t, self.most) for t in s.inputs] for s in samples]
        else:
            rows = [_turns.word_states(self.words, tuple(s.inputs), self.most) for s in samples]
        words, word_mask = _turns.stacked(rows)
        own, mask = padded([torch.tensor(sample.about["own"]) for sample in samples])
        batch = {"words": words, "word_mask": word_mask, "mask": mask, "own": own}
        if any(sample.target is None for sample in samples):
            return batch
        numbers, targets = {name: i for i, name in enumerate(self.classes)}, torch.full(mask.shape, -1)
        for row, sample in zip(targets, samples, strict=True):
            for n, label in enumerate(sample.target[: len(sample.inputs)]):
                row[n] = numbers.get(label, -1)
        return {**batch, "targets": targets.masked_fill(~own, -1)}

    def words_of(self) -> nn.Module:
        """From the words of a batch to vectors of ``dim``."""
        if self.words == LEARNED:
            return nn.Embedding(len(_turns.vocabulary(tuple(self.samples("train")))) + 1, self.dim)
        return _turns.Published(self.words, self.dim)

    def meanings(self, samples: Sequence[Sample]) -> Tensor:
        """Mean state of the words of each own turn ``[turns, D]``, of the published encoder where words are learned."""
        encoder = self.published[0] if self.words == LEARNED else self.words
        return torch.stack(
            [
                state.float().mean(0)
                for sample in samples
                for state, own in zip(
                    _turns.word_states(encoder, tuple(sample.inputs), self.most), sample.about["own"], strict=True
                )
                if own
            ]
        )

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """Refused: other blocks would see what comes after a turn.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.name} labels turns as they come: no blocks that see later ones go into it")

    def reference(self, width: int, kind: str = "") -> nn.Module:
        build = _turns.convolutions if kind == "convolutions" else _turns.flat_bigru
        return build(self.words_of(), self.dim, width, len(self.classes), self.dropout)

    def unsupported_reason(self, run: RunContext) -> str | None:
        reader = None if self.words == LEARNED else refusal(lambda: _turns.state_width(self.words))
        return reader or super().unsupported_reason(run)


@lru_cache(maxsize=8)
def _classes(samples: tuple[Sample, ...]) -> tuple[str, ...]:
    return tuple(sorted({label for sample in samples for label in sample.about["labels"] if label}))


def _sample(dialogue: Dialogue, home: int | None = None) -> Sample:
    """A dialogue dealt to the fold ``home``; of none it is the user's, to be labelled."""
    texts, own = tuple(turn.text for turn in dialogue.turns), tuple(turn.own for turn in dialogue.turns)
    labels = tuple(turn.label for turn in dialogue.turns)
    if home is None:
        return Sample(dialogue.name, "", "test", texts, None, {"own": own})
    about = {"own": own, "labels": labels, "fold": home, "folds": _FOLDS}
    return Sample(dialogue.name, dialogue.name, part_of(home, 0, _FOLDS), texts, labels, about)
