# SPDX-License-Identifier: Apache-2.0
"""LongBench from a tiny made folder: what is read and cut, what a reply is worth, and what is said of bad files."""

import json

import pytest

from manyheads.errors import UserError
from manyheads.tasks.text import _longbench, longbench
from manyheads.tasks.text._answered import size
from tiny import chat as tiny
from tolerance import nearly

LENGTH = 300
CONTEXT = " ".join(f"Line {i} says that the {tiny.village(i)} is open." for i in range(200))


def row(name, **fields):
    return {"input": "Which one is open?", "context": CONTEXT, "answers": ["the mill", "a mill"], "length": 1200,
            "dataset": name, "all_classes": None, **fields}  # fmt: skip


@pytest.fixture(scope="module")
def reader():
    return tiny.tokenizer()


@pytest.fixture
def folder(tmp_path):
    rows = {
        "qasper": [row("qasper"), row("qasper", input="And the second?", answers=["unanswerable"])],
        "trec": [row("trec", input="Question: x\nType:", answers=["Date"], all_classes=["Date", "Number of pages"])],
        "lcc": [row("lcc", input="", answers=["    return x"])],
        "gov_report": [row("gov_report", input="")],
        "dureader": [row("dureader")],
    }
    for name, those in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(one) for one in those) + "\n")
    return tmp_path


def task(folder, *datasets, **fields):
    return longbench.LongBench(
        folder=str(folder), datasets=datasets, lengths=(LENGTH,), samples=2, **{"reply": 40, **fields}
    )


def test_every_dataset_of_the_folder_is_scored_by_its_own_rule(folder, reader):
    said = "The mill.\nreturn x"
    run = tiny.context(tiny.scripted(reader.encode(said)), reader)
    made = task(folder, "qasper", "trec", "lcc")
    rows = [one for unit in made.units(run) for one in made.measure(run, unit)]
    assert [(one.at["dataset"], one.at["group"]) for one in rows] == [
        ("qasper", "one document"), ("qasper", "one document"), ("trec", "worked examples"), ("lcc", "code"),
    ]  # fmt: skip
    f1 = [2 * 1 / (3 + 1), 0.0]  # mill of (mill, return, x) and (mill); the better of two answers
    assert [one.value for one in rows[:3]] == nearly([*f1, 0.0])
    assert rows[3].value == nearly(_longbench.code_similarity(said, "    return x"))
    assert len({one.sample for one in rows}) == 4


def test_the_best_answer_counts_and_worked_examples_end_with_the_line(folder, reader):
    made = task(folder, "qasper", "trec")
    run = tiny.context(tiny.scripted(), reader)
    (asked,), (shots,) = (made.asked(run, LENGTH, i) for i in (0, 2))
    judge = asked.queries[0].judges[0]
    assert judge.value("mill") == 1 and judge.value("mill\nand more") < 1
    assert shots.queries[0].judges[0].value("\nDate\nNumber of pages") == 1  # the second line would halve it
    assert "<user>" in asked.heads[0] and "<" not in shots.heads[0] + shots.queries[0].tail  # examples have no template
    assert asked.queries[0].most == 128 and shots.queries[0].most == 64


def test_a_context_loses_its_middle(folder, reader):
    run = tiny.context(tiny.scripted(), reader)
    (asked,) = task(folder, "qasper").asked(run, LENGTH, 0)
    assert 0.95 * LENGTH < size(run, asked) <= LENGTH
    text = asked.heads[0].partition("behind it.\n\n")[2].rstrip()
    assert text.startswith("Line 0 says") and text.endswith(CONTEXT[-40:]) and "Line 100 says" not in text
    half = len(text) // 2
    assert CONTEXT.startswith(text[: half - 30]) and CONTEXT.endswith(text[half + 30 :])  # both halves, alike in length
    (whole,) = task(folder, "qasper").asked(run, 20_000, 0)
    assert CONTEXT in whole.heads[0]


def test_prompts_of_the_files_are_taken(folder, reader):
    (folder / "dataset2prompt.json").write_text(json.dumps({"qasper": "Look: {context}\n\nNow {input} Say:"}))
    run = tiny.context(tiny.scripted(), reader)
    (asked,) = task(folder, "qasper").asked(run, LENGTH, 0)
    assert asked.heads[0].startswith("<user>\nLook: Line 0") and asked.queries[0].tail.startswith(
        "Now Which one is open? Say:"
    )
    (folder / "dataset2prompt.json").write_text(json.dumps({"qasper": "Look"}))
    assert "{context}" in task(folder, "qasper").unsupported_reason(tiny.context(tiny.scripted(), reader))


def test_what_is_missing_is_said_in_one_line(folder, reader, monkeypatch):
    run = tiny.context(tiny.scripted(), reader)
    monkeypatch.setattr(longbench, "find_spec", lambda name: None)
    assert "manyheads[longbench]" in task(folder).unsupported_reason(run)  # of gov_report
    assert task(folder, "qasper", "trec").unsupported_reason(run) is None
    assert "holds no samsum.jsonl" in task(folder, "samsum").unsupported_reason(run)
    with pytest.raises(UserError, match="no dataset 'dureader' here"):
        task(folder, "dureader")
    monkeypatch.setenv("MANYHEADS_DATA", str(folder))
    assert "text/longbench" in task("").unsupported_reason(run)
    (folder / "qasper.jsonl").write_text('{"context": "x"}\n')
    fresh = tiny.context(tiny.scripted(), reader)
    assert "qasper.jsonl, line 1" in task(folder, "qasper").unsupported_reason(fresh)


def test_the_datasets_are_those_of_the_benchmark():
    assert len(_longbench.DATASETS) == 16 and len({one.group for one in _longbench.DATASETS.values()}) == 6
    without = {name for name, one in _longbench.DATASETS.items() if "{input}" not in one.after}
    assert without == {"gov_report", "multi_news", "passage_count"}  # nothing is asked there but the same of every row
