# SPDX-License-Identifier: Apache-2.0
"""RULER's questions about documents, of files that the user gives: SQuAD's JSON format, and HotpotQA's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from ....errors import UserError
from ....experiment.task import RunContext
from .._answered import Asked, users_folder
from .._scores import any_found
from ._ruler import RulerTask

__all__ = ["QaTask", "Question", "read"]

_INTRO = "Answer the question behind these documents; all that it takes stands in them.\n\n"
_PREFIX = "Answer:"


@dataclass(frozen=True)
class Question:
    """A question, the documents that answer it, and the wordings of the answer that count.

    Attributes:
        near: documents that are shown before any others: of the same article, or found for the same question.
    """

    question: str
    documents: tuple[str, ...]
    answers: tuple[str, ...]
    near: tuple[str, ...] = ()


def read(folder: Path) -> tuple[list[Question], list[str]]:
    """Questions that have an answer, and all documents, of the ``*.json`` in ``folder``, in their order.

    Raises:
        UserError: there is none, or one of another format.
    """
    questions, documents = list[Question](), dict[str, None]()
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for found, every in _squad(content) if isinstance(content, dict) else _hotpot(content):
                questions += found
                documents |= dict.fromkeys(every)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} is not in SQuAD's JSON format: {type(error).__name__}: {error}") from None
    if not questions:
        raise UserError(f"{folder} holds no *.json with questions in SQuAD's format")
    return questions, list(documents)


def _squad(content: Any) -> Iterator[tuple[list[Question], list[str]]]:
    for article in content["data"]:
        every = dict.fromkeys(str(paragraph["context"]) for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            context = str(paragraph["context"])
            near = tuple(one for one in every if one != context)
            yield (
                [
                    Question(
                        str(qa["question"]),
                        (context,),
                        tuple(dict.fromkeys(str(a["text"]) for a in qa["answers"])),
                        near,
                    )
                    for qa in paragraph["qas"]
                    if qa["answers"] and not qa.get("is_impossible")
                ],
                [context],
            )


def _hotpot(content: Any) -> Iterator[tuple[list[Question], list[str]]]:
    for row in content:
        every = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
        golden = dict.fromkeys(title for title, _ in row["supporting_facts"])
        documents = tuple(every[title] for title in golden)
        near = tuple(one for one in every.values() if one not in documents)
        yield [Question(str(row["question"]), documents, (str(row["answer"]),), near)], list(every.values())


@dataclass(frozen=True, kw_only=True)
class QaTask(RulerTask):
    """Base: the documents that answer a question, hidden among others; one of the answer's wordings is expected.

    As in the paper, documents of the same article, or those found for the same question, are the first others. Of
    HotpotQA the paper always shows all ten; here those that answer come first, so that a short context can be made.

    Attributes:
        folder: of the files; by default that below the folder that ``MANYHEADS_DATA`` names.
    """

    home: ClassVar[str]  # in the folder of the data
    source: ClassVar[str]  # what belongs there

    reply: int = 32
    folder: str = ""

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        questions, documents = cast(
            "tuple[list[Question], list[str]]", run.kept(("questions", self.home, self.folder), self._given)
        )
        # The same for every length, and none twice while there are others.
        order = run.rng(task=self.name, questions="order").permutation(len(questions))
        one = questions[order[sample % len(questions)]]
        rng = self.draws(run, length, sample)
        others = [one.near[i] for i in rng.permutation(len(one.near))]
        shown = {*one.documents, *others}
        others += [documents[i] for i in rng.permutation(len(documents)) if documents[i] not in shown]
        seed = int(rng.integers(2**32))

        def write(n: int) -> str:
            shown = [*one.documents, *others[:n]]
            mixed = [shown[i] for i in run.rng(documents=seed).permutation(len(shown))]
            return _INTRO + "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(mixed, 1))

        question = f"Answer with the words of the answer alone. Question: {one.question}"
        return self.fill(
            run, length, write, len(others), question, _PREFIX, one.answers, text=self.home, judge=any_found
        )

    def _given(self) -> tuple[list[Question], list[str]]:
        return read(users_folder(self.name, self.folder, self.home, self.source))
