# SPDX-License-Identifier: Apache-2.0
"""Reading and writing in turn: what is read when, words of pieces, scores, the language made up, and files."""

import math

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.spec import parse
from manyheads.tasks.language._streaming import prefix, stream, word_numbers
from manyheads.tasks.language._translator import BEGIN, END
from manyheads.tasks.language.simultaneous_translation import Simultaneous, SimultaneousTranslation
from tolerance import SAME, is_close, is_far, nearly


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = [" ".join(f"w{i}" for i in rng.integers(0, 6, int(rng.integers(2, 8)))) + f" n{k}" for k in range(30)]
    (place / "source.txt").write_text("\n".join(rows))
    (place / "target.txt").write_text("\n".join(row.replace("w", "v") for row in rows))
    return place


@pytest.fixture(scope="module")
def task(folder):
    return SimultaneousTranslation(
        folder=str(folder), dim=16, layers=2, heads=2, batch=4, vocabulary=300, dropout=0.0, rates=(1e-2,)
    )


@pytest.fixture(scope="module")
def model(task):
    torch.manual_seed(1)
    made = task.reference(24).eval()
    for weight in (made.places.weight, *(layer.sources.attend.out.weight for layer in made.decoder)):
        torch.nn.init.normal_(weight, std=2.0)  # so that it says something else at each place, and of each source
    return made


def wait(k):
    return lambda seen, length: torch.full_like(length, k + seen.shape[1] - 1)


def test_states_of_what_was_read_are_those_of_the_whole(task, model):
    """Nothing that follows is seen: reading a part of a sentence gives the states that all of it has there."""
    batch = task.collate(task.judged("test")[:3])
    (whole,), _ = model.read(batch)
    for j in (1, 3):
        part = {**batch, "source_0": batch["source_0"][:, :j], "mask_0": batch["mask_0"][:, :j]}
        assert is_close(model.read(part)[0][0], whole[:, :j], SAME)
    both = model.encoders[0].causal
    model.encoders[0].causal = False
    assert is_far(model.read(part)[0][0], model.read(batch)[0][0][:, :3], SAME)
    model.encoders[0].causal = both


def test_what_is_written_sees_what_was_read(task, model):
    """Step by step, of a source that is cut off after what has been read; rows keep what they were written with."""
    (sample,) = task.judged("test")[:1]
    batch = task.collate([sample])
    found = stream(model, batch, wait(2))
    words, length = [BEGIN], int(batch["mask_0"].sum())
    (states,), _ = model.read(batch)
    for t in range(found.words.shape[1]):
        read = min(t + 2, length)
        seen = torch.tensor([[min(i + 2, length) for i in range(t)] + [read]])
        cut = torch.where(torch.arange(states.shape[1])[:, None] < read, states, 50.0)  # nobody has seen that
        log_probs = model.write([cut], [prefix(batch["mask_0"], seen)], torch.tensor([words]))[0, -1]
        piece = int(log_probs.argmax())
        assert piece != END  # which would wait for the whole source, see below
        assert piece == found.words[0, t] and read == found.seen[0, t]
        assert float(found.log_probs[0, t].detach()) == nearly(float(log_probs[piece].detach()), torch.float32, 512)
        words.append(piece)
    whole = stream(model, batch, lambda seen, length: length)
    assert not torch.equal(whole.words, found.words) and len(set(words)) > 3


def test_an_end_waits_for_the_whole_source(task, model):
    batch = task.collate(task.judged("test")[:3])
    ends = torch.full((3, 1), END)
    length = batch["mask_0"].sum(1)
    assert torch.equal(stream(model, batch, wait(1), ends).seen[:, 0], length)
    other = torch.full((3, 1), END + 1)
    assert (stream(model, batch, wait(1), other).seen == 1).all()


def test_right_words_are_judged_by_what_was_read(task, model):
    batch = task.collate(task.judged("test")[:3])
    right = batch["next"]
    found = stream(model, batch, lambda seen, length: length, right)
    want = model(batch, batch["words"]).gather(-1, right.clamp(min=0)[..., None])[..., 0]
    there = right >= 0
    assert is_close(found.log_probs[there], want[there], SAME)
    early = stream(model, batch, wait(1), right)
    assert is_far(early.log_probs[there], want[there], SAME)
    for i in range(3):  # a batch is its sentences one by one
        alone = task.collate([task.judged("test")[i]])
        count = int(there[i].sum())
        one = stream(model, alone, wait(1), alone["next"])
        assert is_close(one.log_probs[0], early.log_probs[i, :count], SAME)
        assert torch.equal(one.seen[0], early.seen[i, :count])


def test_a_policy_is_never_undone(task, model):
    """What it asks for is held to the source, and never less than was read."""
    batch = task.collate(task.judged("test")[:3])
    length = batch["mask_0"].sum(1, keepdim=True)
    assert (stream(model, batch, lambda seen, length: length * 0 - 3).seen[:, 0] == 1).all()
    high = stream(model, batch, lambda seen, length: 99 * length)
    assert torch.equal(high.seen, length.expand_as(high.seen))


def test_who_has_read_enough_is_not_asked_again(task, model):
    """While others of the batch read on: a policy that tosses a coin would read all of it."""
    batch = task.collate(task.judged("test")[:2])
    asked = []

    def reading(seen, length):
        asked.append(seen.shape[1])
        times = asked.count(seen.shape[1])  # of this piece: the first reads three times, the second wants to later
        return seen[:, -1] + torch.tensor([int(times <= 3), int(times > 1)])

    right = torch.full((2, 2), END + 1)
    assert stream(model, batch, reading, right).seen[:, 0].tolist() == [4, 1]


def test_pieces_are_of_words():
    assert word_numbers(["Ġa", "b", "Ġc", ".", "Ġ", "d"]) == [1, 1, 2, 2, 3, 3]
    assert word_numbers(["x", "Ġa"]) == [1, 2] and word_numbers([]) == []


def test_delays_are_of_words(task, monkeypatch):
    """A word is written with its last piece; a word of the source counts once it has begun."""
    from manyheads.tasks.language import simultaneous_translation as module
    from manyheads.tasks.language._streaming import Streamed

    sample = Sample("a", "a", "test", ("w1 n23",), "v1 n23")
    batch = task.collate([sample])
    pieces = task.tokens.encode("w1 n23").tokens
    row = [*task.tokens.encode("v1 n23").ids, END]
    assert len(pieces) > 3 and len(row) > 4  # words of several pieces
    own = word_numbers(task.tokens.encode("v1 n23").tokens)
    for seen in ([1] * len(row), list(range(1, len(row) + 1)), [len(pieces) + 1] * len(row)):
        made = Streamed(torch.tensor([row]), torch.tensor([seen]), torch.zeros(1, len(row)))
        monkeypatch.setattr(module, "stream", lambda *_, made=made: made)
        (said,) = task.streamed(None, batch, None)
        begun = [*word_numbers(pieces), 2]
        ends = [max(i for i, n in enumerate(own) if n == word) for word in (1, 2)]
        assert said.words == ("v1", "n23") and said.source == ("w1", "n23")
        assert said.read == tuple(begun[min(seen[i], len(begun)) - 1] for i in ends)
    row, seen = [BEGIN, 999, *row], [len(pieces)] * (len(row) + 2)
    made = Streamed(torch.tensor([row]), torch.tensor([seen]), torch.zeros(1, len(row)))
    monkeypatch.setattr(module, "stream", lambda *_: made)
    (said,) = task.streamed(None, batch, None)
    assert said.words == ("v1", "n23")  # what stands for no text is none


def test_scores(task):
    sample = Sample("a", "a", "test", ("a b c d",), "e f g h")
    said = Simultaneous(("e", "f", "g", "h"), (1, 2, 3, 4), ("a", "b", "c", "d"), "e f g h", (-1.0, -3.0), 0.25)
    found = task.score(sample, said)
    assert found == {
        "nll": nearly(2.0), "al": 1, "laal": 1, "dal": 1, "ap": 10 / 16, "misplaced": 0.25,
        "chrf": nearly(1.0, torch.float32),
    }  # fmt: skip
    short = Simultaneous(("e", "f"), (2, 4), said.source, "e f g h", (-1.0,))
    assert task.score(sample, short)["al"] == (2 + 4 - 2) / 2 and task.score(sample, short)["laal"] == (2 + 4 - 1) / 2
    none = task.score(sample, Simultaneous((), (), said.source, "e f g h", (-1.0,)))
    assert none["al"] == none["dal"] == 4 and none["chrf"] == 0
    other = task.score(sample, Simultaneous(said.words, said.read, said.source, "other", (-1.0,)))
    assert other["nll"] == nearly(math.log(300), torch.float32) and other["al"] == 4 and other["misplaced"] == 1
    assert str(said) == "[a] e [b] f [c] g [d] h"
    assert str(Simultaneous(("e", "f", "g"), (2, 2, 4), said.source)) == "[a b] e f [c d] g"
    (picture,) = task.pictures([sample], [said])
    assert picture.values == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert not task.pictures([sample], [Simultaneous((), (), said.source)])


def test_a_language_made_up():
    """Its target says when to wait: a word is one of the target, and half of them change places with the next."""
    task = SimultaneousTranslation(language="made", vocabulary=600)
    parts = {part: {s.target for s in task.samples(part)} for part in ("train", "validation", "test")}
    assert len(task.samples("train")) > 19_000 and not parts["train"] & parts["test"]
    assert len(parts["test"] & parts["validation"]) < 20
    plain = [s for s in task.samples("test") if len(s.inputs[0].split()) == len(s.target.split())]
    same = SimultaneousTranslation(language="made", vocabulary=600).samples("test")
    assert [s.target for s in same] == [s.target for s in task.samples("test")] and len(plain) > 500
    pieces = [len(task.tokens.encode(s.inputs[0]).ids) / len(s.inputs[0].split()) for s in plain[:100]]
    assert sum(pieces) / 100 < 1.2  # a word is a piece
    with pytest.raises(UserError, match="give german, french, czech or made"):
        SimultaneousTranslation(language="danish")


def test_files_of_ones_own(task, model, tmp_path):
    (tmp_path / "en.txt").write_text("w1 w2 n3\n")
    made = SimultaneousTranslation.joined([SimultaneousTranslation.open(tmp_path / "en.txt")])
    (said,) = task.predict(model, task.collate([made]))
    assert said.source == ("w1", "w2", "n3") and said.target is None
    assert str(said).startswith("[w1 w2 n3] ") and set(said.read) == {3}
    recipe = parse("emma:threshold=0")
    torch.manual_seed(0)
    (said,) = recipe.predict(task, recipe.build(task, 24).eval(), task.collate([made]))
    assert set(said.read) <= {1, 3} and 1 in said.read
    with pytest.raises(UserError, match=r"no source\.txt"):
        SimultaneousTranslation.read(tmp_path)
