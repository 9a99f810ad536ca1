# SPDX-License-Identifier: Apache-2.0
"""What encoders of texts are trained and tested on: classes, scores, and lists to be ranked.

``snips``              the intent of a request, of seven
``sick_entailment``    whether a sentence follows from another, contradicts it, or neither
``sick_relatedness``   how related two sentences are; scores have mean 0 and variance 1 on the training part
``cranfield``          abstracts for a query: relevant ones among such that BM25 takes for relevant
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .sentences import pairs, requests

__all__ = ["TASKS", "EncoderTask", "encoder_task"]

TASKS = ("snips", "sick_entailment", "sick_relatedness", "cranfield")
_LIST = 8  # documents of a list
_FOLDS = 5  # of Cranfield's queries, of which one tests


@dataclass(frozen=True)
class EncoderTask:
    """Examples.

    Attributes:
        kind: ``classes``, ``scores`` or ``lists``.
        classes: names of what labels number; empty for the other kinds.
        texts: a text or a pair of each example; of a list one for every document.
        targets: label, score, or grades of a list.
        names: of examples.
        train, test: indices of examples, in an order that says nothing.
    """

    kind: Literal["classes", "scores", "lists"]
    classes: tuple[str, ...]
    texts: Sequence[Any]
    targets: Sequence[Any]
    names: Sequence[str]
    train: Sequence[int]
    test: Sequence[int]

    @property
    def outputs(self) -> int:
        """What a head says of a text."""
        return len(self.classes) or 1


def encoder_task(name: str, rng: np.random.Generator) -> EncoderTask:
    """The task called ``name``, one of :data:`TASKS`, its examples in an order of ``rng``.

    Raises:
        UserError: there is none of that name, or its data cannot be had.
    """
    if name not in TASKS:
        raise UserError(f"there is no task for encoders {name!r}; there are {', '.join(TASKS)}")
    if name == "cranfield":
        return _lists(rng)
    found: list[Any] = [*requests()] if name == "snips" else pairs("sick")
    texts = [one.text if name == "snips" else (one.first, one.second) for one in found]
    said = [one.intent if name == "snips" else one.relation for one in found]
    classes = () if name == "sick_relatedness" else tuple(sorted(set(said)))
    targets = [classes.index(label) if classes else one.score for label, one in zip(said, found, strict=True)]
    train, test = (
        rng.permutation([i for i, one in enumerate(found) if one.part == part]).tolist() for part in ("train", "test")
    )
    if not classes:
        known = np.array([targets[i] for i in train])
        targets = [float((score - known.mean()) / known.std()) for score in targets]
    kind: Literal["classes", "scores"] = "classes" if classes else "scores"
    return EncoderTask(kind, classes, texts, targets, [one.name for one in found], train, test)


def _lists(rng: np.random.Generator) -> EncoderTask:
    """One relevant document of a query and others that share its words; queries of one fold test."""
    from .ranking import collection, words

    found = collection("cranfield")
    documents = {name: set(words(text)) for name, text in found.documents.items()}
    texts, targets, names = list[Any](), list[Any](), found.judged
    for query in names:
        asked, good = set(words(found.queries[query])), found.qrels[query]
        near = sorted((d for d in documents if d not in good), key=lambda d: (-len(asked & documents[d]), d))
        first = max(good, key=lambda d: (good[d], d))
        chosen = [first, *near[: _LIST - 1]]
        order = rng.permutation(len(chosen))
        texts.append([(found.queries[query], found.documents[chosen[i]]) for i in order])
        targets.append([float(chosen[i] == first) for i in order])
    drawn = rng.permutation(len(names)).tolist()
    test = drawn[::_FOLDS]
    return EncoderTask("lists", (), texts, targets, names, [i for i in drawn if i not in set(test)], test)
