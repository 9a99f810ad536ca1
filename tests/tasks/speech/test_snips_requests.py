# SPDX-License-Identifier: Apache-2.0
"""SNIPS requests: slots of tags, a folder of one's own, scores by hand, and shares of the training part."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.speech import snips_requests
from manyheads.tasks.speech.snips_requests import Frame, SnipsRequests, spans

LINES = {
    "train": [("play jazz", "Play", "O B-genre"), ("weather in new york", "Weather", "O O B-city I-city")] * 2
    + [("play rock now", "Play", "O B-genre O"), ("rain in bonn", "Weather", "O O B-city")],
    "dev": [("rain in bonn", "Weather", "O O B-city")],
    "test": [("play blues", "Play", "O B-genre"), ("go home", "Travel", "O B-place")],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Requests, and a tokenizer of words: new is two tokens, as ``ne`` and ``##w`` are."""
    for part, rows in LINES.items():
        (tmp_path / part).mkdir()
        for name, column in zip(("seq.in", "label", "seq.out"), zip(*rows, strict=True), strict=True):
            (tmp_path / part / name).write_text("\n".join(column) + "\n")
    words = "[PAD] [UNK] play jazz weather in ne ##w york rock now rain bonn".split()
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    monkeypatch.setattr(snips_requests, "_tokenizer", lambda name: made)
    return tmp_path


def task_of(folder, **fields):
    return SnipsRequests(folder=str(folder), **{"dim": 16, "layers": 1, "heads": 2, "batch": 4, **fields})


def test_slots_of_tags():
    assert spans("O B-a I-a B-a I-b O I-b".split()) == (("a", 1, 3), ("a", 3, 4), ("b", 4, 5), ("b", 6, 7))
    assert spans([]) == ()


def test_a_folder_of_ones_own(folder):
    task = task_of(folder)
    texts = {part: sorted(s.group for s in task.samples(part)) for part in ("train", "validation", "test")}
    assert texts == {  # what is in another part too is not trained on, and what is there twice is once
        "train": ["play jazz", "play rock now", "weather in new york"], "validation": ["rain in bonn"],
        "test": ["go home", "play blues"],
    }  # fmt: skip
    assert task.labels() == (["Play", "Weather"], ["O", "B-city", "I-city", "B-genre", "I-genre"])
    (york,) = [s for s in task.samples("train") if "york" in s.group]
    (jazz,) = [s for s in task.samples("train") if "jazz" in s.group]
    batch = task.collate([york, jazz])
    assert batch["first"].tolist() == [[0, 1, 2, 4], [0, 1, 0, 0]]  # york stands behind two tokens of new
    assert batch["tags"].tolist() == [[0, 0, 1, 2], [0, 3, -100, -100]] and batch["intents"].tolist() == [1, 0]
    assert task.collate(task.samples("test"))["intents"].tolist().count(-100) == 1  # no training request travels
    assert str(york.target) == "Weather city=new_york"


def test_a_file_and_folders_that_will_not_do(folder):
    task, file = task_of(folder), folder / "mine.txt"
    file.write_text("Play JAZZ\n")
    sample = task.open(file)
    assert sample.inputs == ("play", "jazz") and sample.target is None and "tags" not in task.collate([sample])
    model = task.reference(8).eval()
    (said,) = task.predict(model, task.collate([sample]))
    assert said.intent in ("Play", "Weather") and said.words == ("play", "jazz")
    file.write_text(" ")
    with pytest.raises(UserError, match="empty"):
        task.open(file)
    (folder / "dev" / "seq.out").write_text("O O\n")
    with pytest.raises(UserError, match="line 1"):
        SnipsRequests.read(folder)
    (folder / "dev" / "seq.out").write_text("O\nO\n")
    with pytest.raises(UserError, match="number of lines"):
        SnipsRequests.read(folder)
    (folder / "test" / "label").unlink()
    (folder / "dev" / "seq.out").write_text("O O B-city\n")
    with pytest.raises(UserError, match="give a folder"):
        SnipsRequests.read(folder)


def test_a_share_is_of_the_training_part(folder):
    task = task_of(folder, share=0.34)
    drawn = {s.name for i in range(9) for s in task.draw(np.random.default_rng(i), task.samples("train"))}
    assert drawn == {task.samples("train")[0].name}
    whole = task_of(folder)
    assert len({s.name for i in range(9) for s in whole.draw(np.random.default_rng(i), whole.samples("train"))}) == 3
    with pytest.raises(UserError, match="share"):
        task_of(folder, share=0.0)


def test_scores_are_those_by_hand(folder):
    task = task_of(folder)
    sample = Sample("x", "x", "test", tuple("weather in new york".split()), Frame("Weather", (("city", 2, 4),)))
    for said, f1, frame in (
        (Frame("Weather", (("city", 2, 4),)), 1, 1), (Frame("Weather", (("city", 2, 3),)), 0, 0),
        (Frame("Play", (("city", 2, 4), ("genre", 0, 1))), 2 / 3, 0), (Frame("Weather", ()), 0, 0),
    ):  # fmt: skip
        score = task.score(sample, said)
        assert score["slot_f1"] == f1 and score["frame"] == frame and score["intent"] == (said.intent == "Weather")
    even = (torch.zeros(2).log_softmax(0), torch.zeros(4, 5).log_softmax(-1))
    assert task.score(sample, Frame("Play", (), (), even))["nll"] == pytest.approx(np.log(2) + np.log(5))
    none = Sample("y", "y", "test", ("hello",), Frame("Play", ()))
    assert task.score(none, Frame("Play", ()))["slot_f1"] == 1


def test_the_whole_is_a_weighted_sum_of_words(folder):
    """Words that are no there have no part in it: a longer neighbour changes nothing."""
    task = task_of(folder)
    torch.manual_seed(0)
    model, samples = task.reference(8).eval(), task.samples("train")
    batch = task.collate(samples)
    intents, tags = model(batch)
    for i, sample in enumerate(samples):
        alone, words = model(task.collate([sample]))
        assert (alone[0] - intents[i]).abs().max() < 1e-5
        assert (words[0] - tags[i, : len(sample.inputs)]).abs().max() < 1e-5
    open_to_all = model({**batch, "there": torch.ones_like(batch["there"])})[0]  # control
    assert (open_to_all - intents).abs().max() > 1e-4
