# SPDX-License-Identifier: Apache-2.0
"""Captions in two languages: a folder of one's own, tokens, masks, models of one or several sources, and scores."""

import math

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.spec import parse
from manyheads.tasks.language._translation import vocabulary
from manyheads.tasks.language._translator import BEGIN, END, ROOM
from manyheads.tasks.language.caption_translation import CaptionTranslation, Said
from tolerance import SAME, assert_close, is_close, is_far, nearly

WORDS = {"dog": ("chien", "pes"), "cat": ("chat", "kočka"), "bird": ("oiseau", "pták"), "runs": ("court", "běží")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty sentences of four words, line by line; one has no French."""
    place, rng = tmp_path_factory.mktemp("captions"), np.random.default_rng(0)
    rows = [[list(WORDS)[i] for i in rng.integers(0, 4, int(rng.integers(1, 6)))] + [f"n{k}"] for k in range(30)]
    sides = [[" ".join(WORDS[w][side] if w in WORDS else w for w in row) for row in rows] for side in (0, 1)]
    sides[0][4] = ""
    for name, lines in (("first", [" ".join(row) for row in rows]), ("second", sides[0]), ("target", sides[1])):
        (place / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place


def task_of(folder, **fields):
    given = {"dim": 16, "layers": 1, "heads": 2, "batch": 4, "vocabulary": 320, "dropout": 0.0, **fields}
    return CaptionTranslation(folder=str(folder), **given)


def test_a_folder_of_ones_own(folder, tmp_path):
    task = task_of(folder)
    parts = {part: sorted(s.name for s in task.samples(part)) for part in ("train", "validation", "test")}
    assert [len(names) for names in parts.values()] == [18, 6, 6]
    assert parts["test"][-1] == "test 000029" and parts["validation"][0] == "validation 000018"
    (four,) = [s for s in task.samples("train") if s.name.endswith("04")]
    assert four.inputs[1] == "" and four.target and task.collate([four])["there"].tolist() == [[True, False]]
    (tmp_path / "first.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"no first\.txt"):
        CaptionTranslation.read(tmp_path)
    for name in ("second", "target"):
        (tmp_path / f"{name}.txt").write_text("a\n")
    with pytest.raises(UserError, match="differ in their number of lines"):
        CaptionTranslation.read(tmp_path)


def test_what_is_judged_is_not_trained_on(tmp_path):
    lines = [f"line {i}" for i in range(10)]
    for name, rows in (("first", lines), ("second", lines), ("target", [*lines[:9], "line 1"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    texts = {part: [s.target for s in task_of(tmp_path).samples(part)] for part in ("train", "test")}
    assert "line 1" in texts["test"] and "line 1" not in texts["train"] and len(texts["train"]) == 5


def test_tokens_are_learned_from_the_training_part_and_stand_for_any_text(folder, tmp_path):
    task = task_of(folder)
    tokens = vocabulary(CaptionTranslation, str(folder), 320)
    text = "Žluťoučký kůň, not seen before! 鳥"
    assert tokens.decode(tokens.encode(text).ids).strip() == text
    for name in ("first", "second", "target"):  # other lines where it is tested
        lines = (folder / f"{name}.txt").read_text("utf-8").splitlines()
        (tmp_path / f"{name}.txt").write_text("\n".join([*lines[:18], *("qqq xxx " * 9 for _ in range(12))]), "utf-8")
    other = vocabulary(CaptionTranslation, str(tmp_path), 320)
    assert other.get_vocab() == tokens.get_vocab()
    few = task.collate([Sample("a", "a", "test", ("dog " * 80, "chat"), "pes " * 80)])
    assert few["source_0"].shape[1] == ROOM and few["words"].shape[1] == few["next"].shape[1] == ROOM
    assert few["words"][0, 0] == BEGIN and few["next"][0, -1] == END
    assert torch.equal(few["words"][0, 1:], few["next"][0, :-1])


KINDS = (*CaptionTranslation.references, "multi_source:combination=flat", "multi_source:combination=hierarchical")


def built(task, kind):
    torch.manual_seed(0)
    made = parse(kind).build(task, 24) if ":" in kind else task.reference(24, kind)
    return made.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_sees_those_before_it_and_the_sources_that_it_reads(folder, kind):
    task = task_of(folder)
    model, batch = built(task, kind), task.collate(task.judged("test")[:3])
    want = model(batch, batch["words"])
    assert_close(want.exp().sum(-1), torch.ones(want.shape[:2]), SAME)
    later = batch["words"].clone()
    later[:, 2:] = 7
    got = model(batch, later)
    assert is_close(got[:, :2], want[:, :2], SAME) and is_far(got[:, 2:], want[:, 2:], SAME)
    reads = {"one_source": {0}, "second_source": {1}}.get(kind, {0, 1})
    for i in range(2):
        changed = {**batch, f"source_{i}": batch[f"source_{i}"].roll(1, 0), f"mask_{i}": batch[f"mask_{i}"].roll(1, 0)}
        assert is_close(model(changed, batch["words"]), want, SAME) == (i not in reads)
        gone = batch["there"].clone()
        gone[:, i] = False
        assert is_close(model({**batch, "there": gone}, batch["words"]), want, SAME) == (i not in reads)
    padding = {**batch, "source_0": torch.where(batch["mask_0"], batch["source_0"], 9)}
    assert is_close(model(padding, batch["words"]), want, SAME)


def test_the_mean_of_two_models(folder):
    task = task_of(folder)
    both = built(task, "averaged_models")
    batch = task.collate(task.judged("test")[:3])
    first, second = (one(batch, batch["words"]).exp() for one in both.models)
    assert_close(both(batch, batch["words"]).exp(), (first + second) / 2, SAME)
    assert is_far(both(batch, batch["words"]).exp(), first, SAME)
    losses = [task.loss(one, batch).item() for one in both.models]  # each learns by itself
    assert task.loss(both, batch).item() == nearly(sum(losses) / 2, torch.float32, 512)


def test_what_is_written_is_the_likeliest_word_by_word(folder):
    task = task_of(folder)
    model, judged = built(task, "one_source"), task.judged("test")[:3]
    batch = task.collate(judged)
    said = task.predict(model, batch)
    tokens = vocabulary(CaptionTranslation, task.source, 320)
    row = [BEGIN]
    while len(row) < ROOM and END not in row:
        row.append(int(model(task.collate(judged[:1]), torch.tensor([row]))[0, -1].argmax()))
    assert said[0].text == tokens.decode([w for w in row[1:] if w != END]).strip()
    logs = model(batch, batch["words"])
    for i, one in enumerate(said):
        count = int((batch["next"][i] >= 0).sum())
        assert len(one.log_probs) == count
        assert_close(one.log_probs, [float(logs[i, t, batch["next"][i, t]]) for t in range(count)], SAME)
    total, count = (sum(f(one.log_probs) for one in said) for f in (sum, len))
    assert task.loss(model, batch).item() == nearly(-total / count, torch.float32, 512)


def test_scores(folder):
    task = task_of(folder)
    sample = Sample("a", "a", "test", ("dog", "chien"), "pes běží")
    right = task.score(sample, Said("pes běží", "pes běží", (-1.0, -3.0)))
    assert right["nll"] == nearly(2.0) and right["chrf"] == nearly(1.0, torch.float32)
    assert task.score(sample, Said("pes", "pes běží", (0.0,)))["chrf"] < 0.8
    assert task.score(sample, Said("kočka", "kočka", (0.0,)))["nll"] == nearly(math.log(320), torch.float32)


def test_files_of_ones_own(folder, tmp_path):
    for name, text in (("en.txt", "dog\nruns\n"), ("fr.txt", ""), ("no.txt", "  ")):
        (tmp_path / name).write_text(text)
    one, none = CaptionTranslation.open(tmp_path / "en.txt"), CaptionTranslation.open(tmp_path / "fr.txt")
    made = CaptionTranslation.joined([one, none])
    assert made.inputs == ("dog runs", "") and made.target is None
    task = task_of(folder)
    (said,) = task.predict(built(task, "multi_source:combination=flat"), task.collate([made]))
    assert str(said) == said.text and not said.log_probs
    with pytest.raises(UserError, match="are empty"):
        CaptionTranslation.joined([none, CaptionTranslation.open(tmp_path / "no.txt")])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read as text"):
        CaptionTranslation.open(tmp_path / "bytes")
    with pytest.raises(UserError, match="vocabulary is a number"):
        task_of(folder, vocabulary=5)
