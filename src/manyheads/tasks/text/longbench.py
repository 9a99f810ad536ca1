# SPDX-License-Identifier: Apache-2.0
"""LongBench (arXiv 2308.14508): its datasets in English and code, from the user's files, each by its own score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

from ...errors import UserError
from ...experiment.rows import Metric, WorkUnit
from ...experiment.subjects import CausalLM
from ...experiment.task import RunContext
from ._answered import AnsweredTask, Asked, Judge, Query, size, users_folder, written
from ._haystack import fitted
from ._longbench import DATASETS, Dataset, rouge_l

__all__ = ["LongBench"]

_HOME = "text/longbench"
_PROMPTS = "dataset2prompt.json"  # as the benchmark's repository has it
_MOST = 200  # rows of a dataset that are looked at


@dataclass(frozen=True, kw_only=True)
class LongBench(AnsweredTask):
    """Rows of ``DATASET.jsonl`` with the fields ``input``, ``context``, ``answers`` and ``all_classes``.

    A context that is too long loses its middle, in tokens, as in the benchmark. The prompts are ours, or those of
    ``dataset2prompt.json`` if it lies beside the files. The Chinese datasets need a splitter of words and are left out.
    A reply of nothing gets 0, and guessing little more; F1 and ROUGE-L of large models are 0.2 to 0.5, so that a
    baseline above 0.1 counts as discriminative.

    Attributes:
        folder: of the files; by default ``text/longbench`` of the folder that ``MANYHEADS_DATA`` names.
        datasets: which; all that are there when empty.
        samples: rows of each dataset.
        reply: most tokens of a reply; a dataset's own number counts where that is less.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("score", "LongBench score", higher=True, kind="share", floor=0.1),)
    reply: int = 512
    folder: str = ""
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.datasets if name not in DATASETS]:
            raise UserError(f"longbench has no dataset {unknown[0]!r} here; there are {', '.join(DATASETS)}")

    def unsupported_reason(self, run: RunContext) -> str | None:
        if reason := super().unsupported_reason(run):
            return reason
        summed = [name for name in self._rows(run) if DATASETS[name].score is rouge_l]
        if summed and find_spec("rouge") is None:
            return (
                f"longbench scores {', '.join(summed)} by ROUGE-L, which needs the library rouge: "
                '`pip install "manyheads[longbench]"`, or name others, as longbench:datasets=qasper+trec'
            )
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            self.unit(run, length, sample, cost=DATASETS[name].reply)
            for length in self.lengths
            for sample, (name, _) in enumerate(self._chosen(run))
        ]

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        name, row = self._chosen(run)[sample]
        known, tokenizer = DATASETS[name], cast(CausalLM, run.subject).tokenizer
        before, after = self._prompt(run, name, known)
        question = after.replace("{input}", str(row.get("input", "")))
        ids = tokenizer.encode(str(row["context"]), add_special_tokens=False, verbose=False)
        answers, classes = [str(one) for one in row["answers"]], [str(one) for one in row.get("all_classes") or ()]

        def value(reply: str) -> float:
            if known.plain and known.group != "code":
                reply = reply.lstrip("\n").partition("\n")[0]
            return max(known.score(reply, answer, classes) for answer in answers)

        def write(n: int) -> Asked:
            kept = [ids] if n >= len(ids) else [ids[: n // 2], ids[len(ids) - (n - n // 2) :]]
            context = "".join(tokenizer.decode(part) for part in kept)
            if known.plain:
                head, tail = f"{before}{context}\n\n", question
            else:
                content = f"{before}{context}\n\n{question}"
                head, tail = written(run, [{"role": "user", "content": content}], question)
            judge = Judge("score", value, {"dataset": name, "group": known.group})
            return Asked((head,), (Query(tail, (judge,), most=known.reply),), name)

        return [fitted(write, partial(size, run), length, len(ids))]

    def _chosen(self, run: RunContext) -> list[tuple[str, Mapping[str, Any]]]:
        """The first rows of every dataset, as many as there are samples."""
        return [(name, row) for name, rows in self._rows(run).items() for row in rows[: self.samples]]

    def _rows(self, run: RunContext) -> dict[str, list[Mapping[str, Any]]]:
        def make() -> dict[str, list[Mapping[str, Any]]]:
            place = self._place()
            paths = {path.stem.removesuffix("_e"): path for path in sorted(place.glob("*.jsonl"))}
            if lacks := [name for name in self.datasets if name not in paths]:
                raise UserError(f"{place} holds no {lacks[0]}.jsonl")
            wanted = self.datasets or tuple(name for name in DATASETS if name in paths)
            if not wanted:
                raise UserError(f"{place} holds no file of LongBench, as qasper.jsonl")
            return {name: _read(paths[name]) for name in wanted}

        return cast("dict[str, list[Mapping[str, Any]]]", run.kept(("longbench", self.folder, self.datasets), make))

    def _prompt(self, run: RunContext, name: str, known: Dataset) -> tuple[str, str]:
        """What stands before and behind the context."""

        def make() -> dict[str, str]:
            path = self._place() / _PROMPTS
            try:
                return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
            except ValueError as error:
                raise UserError(f"{path} is no JSON ({error})") from None

        theirs = run.kept(("longbench prompts", self.folder), make).get(name)
        if theirs is None:
            return known.before, known.after
        before, mark, after = theirs.partition("{context}")
        if not mark:
            raise UserError(f"{_PROMPTS} says no {{context}} in the prompt of {name}")
        return before, after.lstrip("\n") or known.after

    def _place(self) -> Path:
        return users_folder(self.name, self.folder, _HOME, "the files of LongBench (DATASET.jsonl)")


def _read(path: Path) -> list[Mapping[str, Any]]:
    """The first rows of a file.

    Raises:
        UserError: a row is no JSON, or lacks what a task needs.
    """
    rows = list[Mapping[str, Any]]()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(rows) == _MOST:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not (row["answers"] and isinstance(row["context"], str)):
                    raise ValueError("no answers, or no context")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: no row of LongBench ({error})") from None
            rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows
