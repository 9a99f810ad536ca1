# SPDX-License-Identifier: Apache-2.0
"""Texts, windows, planted constants, and what the tasks make of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from manyheads import UserError
from manyheads.comparison import compare
from manyheads.data import texts as data
from manyheads.data.texts import Text
from manyheads.tasks.text._contexts import Contexts
from manyheads.tasks.text._corpus import Corpus
from manyheads.tasks.text._needles import PROSE, NeedleInserter, UnfitVocabulary
from manyheads.tasks.text._text_task import TARGET
from tiny import compare as tiny

texts, tokenizer, model, results = tiny.texts, tiny.tokenizer, tiny.model, tiny.results


def test_standard_library_is_read(texts):
    assert len(data.standard_library()) > 100 and all("test" not in t.name.split("/") for t in data.standard_library())


def test_files_and_folders_are_read_in_order(tmp_path):
    for name, content in {
        "b.py": "b = 1\r\n",
        "a/x.txt": "x",
        ".git/c.py": "c",
        "venv/d.py": "d",
        "image.png": "\0",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, newline="")
    assert data.read([tmp_path]) == [Text("a/x.txt", "x"), Text("b.py", "b = 1\n")]
    assert data.read([tmp_path / "b.py"])[0].name == "b.py"


@pytest.mark.parametrize(
    ("content", "word"), [(None, "no such"), (b"\0\1", "not UTF-8"), (b"\xff\xfe", "not UTF-8"), (b" \n", "empty")]
)
def test_unfit_files_are_refused(tmp_path, content, word):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=word):
        data.read([tmp_path / "x"])


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\0\1")
    with pytest.raises(UserError, match="holds no text"):
        data.read([tmp_path])


def test_windows_share_no_token_while_there_is_text(tokenizer):
    text = "".join(f"value_{i} = {i}\n" for i in range(3000))
    corpus = Corpus([Text("a", text), Text("b", text[: len(text) // 3]), Text("short", "x = 1\n")], tokenizer)
    whole = len(corpus._tokens(0)) + len(corpus._tokens(1))
    size = 500
    windows = corpus.windows(size, whole // size - 1, np.random.default_rng(0))
    assert not any(w.overlaps for w in windows) and {w.text for w in windows[:2]} == {"a", "b"}
    assert all(len(w.ids) == size for w in windows)
    places = [(w.text, int(w.ids[0])) for w in windows]
    long = corpus._tokens(0)
    starts = sorted(
        next(i for i in range(len(long)) if (long[i : i + size] == w.ids).all()) for w in windows if w.text == "a"
    )
    assert all(b - a >= size for a, b in pairwise(starts)) and places
    assert any(w.overlaps for w in corpus.windows(size, whole // size + 5, np.random.default_rng(0)))


def test_short_texts_are_joined_and_too_little_is_refused(tokenizer):
    corpus = Corpus([Text(str(i), f"name_{i} = {i}\n" * 20) for i in range(30)], tokenizer)
    assert len(corpus.windows(900, 1, np.random.default_rng(0))[0].ids) == 900
    with pytest.raises(UserError, match="too short"):
        corpus.windows(100_000, 1, np.random.default_rng(0))


def test_planted_lines_read_as_text(tokenizer, texts):
    inserter = NeedleInserter(tokenizer)
    rng = np.random.default_rng(0)
    constants = inserter.draw(4, rng)
    body = Corpus(texts, tokenizer).windows(700, 1, rng)[0].ids
    planted = inserter.insert(body, [inserter.line(c.name, c.value) for c in constants], [0.9, 0.1, 0.5, 0.3])
    lines = tokenizer.decode(planted).split("\n")
    where = [lines.index(f"{c.name} = {c.value}") for c in constants]
    assert [sorted(where).index(w) for w in where] == [3, 0, 2, 1]
    for c in constants:
        question, answer = inserter.ask(c.name, c.value)
        assert (len(question), len(answer)) == (inserter.question_size, inserter.answer_size)
        assert tokenizer.decode([*question, *answer]) == f"\nassert {c.name} == {c.value}"
        assert c.value[-1] in tokenizer.decode(answer) and c.name in tokenizer.decode(question)


def test_a_vocabulary_that_does_not_fit_says_so():
    class Blind:
        def encode(self, text, add_special_tokens=False):
            return [3 if c.isdigit() else 5 for c in text]

        def decode(self, ids, **kwargs):
            return "?" * len(ids)

    with pytest.raises(UnfitVocabulary, match="reads `assert"):
        NeedleInserter(Blind())


def test_misfits_are_skipped_with_their_reason(model, tokenizer, texts, tmp_path):
    results = compare(
        model,
        tokenizer,
        texts,
        ["random"],
        [0.5],
        ["perplexity", "niah_multikey"],
        lengths=[64],
        samples=2,
        out=tmp_path,
    )
    assert {row.task for row in results.rows} == {"perplexity"} and "too short" in results.run["skipped"][
        "niah_multikey"
    ]
    with pytest.raises(UserError, match="nothing to measure"):
        compare(
            model, tokenizer, texts, ["random"], [0.5], ["niah_multikey"], lengths=[64], samples=2, out=tmp_path / "b"
        )


def test_every_arm_sees_the_same_samples(results):
    samples = {}
    for row in results.rows:
        if row.task != "speed":
            key = (row.task, row.metric, row.sample, row.context, *row.at.items())
            samples.setdefault(row.arm, set()).add(key)
    assert len(samples) == 9 and len({frozenset(s) for s in samples.values()}) == 1
    assert {(t, m) for t, m, *_ in next(iter(samples.values()))} == {
        ("perplexity", "token_nll"), ("niah_single", "query_agnostic"), ("niah_single", "query_aware"),
        ("niah_multikey", "multikey"), ("variable_tracking", "tracked"), ("memory", "cache"),
    }  # fmt: skip


def test_loss_of_full_is_that_of_the_plain_model(results, model, tokenizer, texts):
    drawn = Contexts(Corpus(texts, tokenizer), tokenizer, 4, 0).plain("loss", 800, 4, TARGET + 1)
    contexts = torch.from_numpy(np.stack([ids for ids, _, _ in drawn]))
    rows = {(r.sample, r.at["length"]): r.value for r in results.rows if (r.arm, r.task) == ("full", "perplexity")}
    for length in (640, 800):
        with torch.inference_mode():
            logits = model(contexts[:, : length + TARGET]).logits[:, -TARGET:].float()
        targets = contexts[:, length + 1 : length + TARGET + 1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
        assert [rows[f"{i}", length] for i in range(4)] == pytest.approx(nats.tolist(), abs=1e-4)


def test_budget_one_costs_nothing(model, tokenizer, texts, tmp_path):
    settings = {"lengths": [640], "samples": 3, "out": tmp_path}
    results = compare(
        model, tokenizer, texts, ["keydiff:budget=1.0", "random"], [0.3], ["perplexity", "niah_single"], **settings
    )
    values = {}
    for row in results.rows:
        values.setdefault(row.arm, []).append(row.about.get("nats", row.value))
    assert values["keydiff:budget=1.0"] == values["full"] != values["random:budget=0.3"]


def test_contexts_and_their_questions(tokenizer, texts):
    drawn = Contexts(Corpus(texts, tokenizer), tokenizer, 4, 0)
    contexts = drawn.single(640)
    assert [c.questions[0].depth for c in contexts] == [0.1, 0.5, 0.9, 0.1] and all(len(c.ids) == 640 for c in contexts)
    for crowd in drawn.multikey(640):
        text = tokenizer.decode(crowd.ids)
        chained = [q for q in crowd.questions if q.task == "variable_tracking"]
        assert len(chained) == 3 and len(crowd.questions) == 7 and len(crowd.ids) == 640
        for question in chained:
            alias = tokenizer.decode(question.question).split()[1]
            target = text.split(f"\n{alias} = ")[1].split()[0]
            value = text.split(f"\n{target} = ")[1].split()[0]
            assert value == tokenizer.decode([*question.question, *question.answer]).split()[-1]
            assert text.index(f"\n{target} = ") < text.index(f"\n{alias} = ")


def test_prose_hides_sentences_and_asks_in_words(tokenizer):
    """A line of code in prose would be found by its looks."""
    prose = [Text(f"{i}.txt", "The tide came in slowly. Nobody said a word about it! " * 80) for i in range(4)]
    drawn = Contexts(Corpus(prose, tokenizer), tokenizer, 2, 0, wording=PROSE)
    context = drawn.single(600)[0]
    text, asked = tokenizer.decode(context.ids), context.questions[0]
    told = next(part for part in text.split(". ") if "secret number" in part)
    name = told.partition("number of ")[2].partition(" is ")[0]
    assert tokenizer.decode(asked.question).count(name) == 2 and "=" not in text
    assert tokenizer.decode(asked.answer).strip() == told.rpartition(" ")[2].strip(" .")
    before = text[: text.index("The secret number")].rstrip()
    assert before.endswith((".", "!")) and len(context.ids) == 600
    many = drawn.multikey(600)[0]
    alias = next(q for q in many.questions if q.task == "variable_tracking")
    other, value = tokenizer.decode(alias.answer).strip().split(", which is ")
    assert f"secret number of {other} is {value}" in tokenizer.decode(many.ids)
    assert len({(len(q.question), len(q.answer)) for q in many.questions if q.task == "niah_multikey"}) == 1


def test_words_are_those_of_the_text():
    code, prose = Text("a.py", "x = 1\n" * 50), Text("b.txt", "It rained. " * 20)
    assert data.is_code([code, prose]) and not data.is_code([prose]) and not data.is_code([Text("b", "x" * 999), code])


def test_texts_by_name(tmp_path, monkeypatch):
    (tmp_path / "text" / "essays").mkdir(parents=True)
    (tmp_path / "text" / "essays" / "one.txt").write_text("An essay.")
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path))
    assert data.read(["essays"]) == [Text("one.txt", "An essay.")]
    assert len(data.read(["code"])) > 100
    (tmp_path / "text" / "essays" / "one.txt").unlink()
    (tmp_path / "text" / "essays").rmdir()
    with pytest.raises(UserError, match="may not be passed on: put"):
        data.read(["essays"])
    with pytest.raises(UserError, match="or one of code, prose"):
        data.read(["novels"])


@pytest.mark.parametrize(
    ("text", "begins"),
    [("first line here\n" * 400, "first"), ("One is said. Two is not. " * 300, ("One", "Two", " One", " Two"))],
)
def test_windows_begin_where_something_begins(tokenizer, text, begins):
    windows = Corpus([Text("a", text)], tokenizer).windows(100, 6, np.random.default_rng(1))
    assert all(tokenizer.decode(w.ids).startswith(begins) for w in windows)
