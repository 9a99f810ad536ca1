# SPDX-License-Identifier: Apache-2.0
"""Windows and contexts with a tokenizer whose tokens are bytes: where they begin, whose they are, what is put in."""

from itertools import pairwise

import numpy as np
import pytest

from manyheads.data.texts import Text
from manyheads.errors import UserError
from manyheads.tasks.text import _corpus
from manyheads.tasks.text._contexts import ALIASES, CONSTANTS, DEPTHS, PASSAGE, Contexts
from manyheads.tasks.text._corpus import Corpus, encode
from manyheads.tasks.text._needles import CODE, PROSE, NeedleInserter
from manyheads.tasks.training._bytes import Bytes


def rng(seed=0):
    return np.random.default_rng(seed)


def numbered(name, lines):
    """Text whose every line says which it is."""
    return Text(name, "".join(f"{name} {i:03d}\n" for i in range(lines)))


def read(window):
    return bytes(window.ids.astype(np.uint8).tolist()).decode()


class Begins(Bytes):
    """Adds a token of its own before a text, unless it is told not to."""

    bos_token_id = 0

    def encode(self, text, add_special_tokens=True, **_):
        return [0] * add_special_tokens + super().encode(text)


def test_tokens_as_in_the_middle_of_a_text():
    class Spaced(Bytes):
        def encode(self, text, **_):
            return super().encode(text if text.startswith(" ") else " " + text)

    assert encode(Bytes(), "ab") == list(b"ab") and encode(Begins(), "ab") == list(b"ab")
    assert encode(Spaced(), "ab") == list(b"ab")  # no space of the tokenizer's own

    class Odd:
        def encode(self, text, **_):
            return [len(text)]  # one token whatever follows: nothing to cut at

    assert encode(Odd(), "ab") == [2]


@pytest.mark.parametrize("seed", range(4))
def test_one_window_of_each_text_before_the_second_of_any(seed):
    texts = [numbered(name, lines) for name, lines in (("a", 40), ("b", 60), ("c", 20))]
    corpus = Corpus(texts, Bytes())
    windows = corpus.windows(60, 9, rng(seed))
    assert {w.text for w in windows[:3]} == {"a", "b", "c"} and not any(w.overlaps for w in windows)
    assert sum(w.text == "c" for w in windows) <= 2 and len(windows) == 9  # 120 bytes hold two
    for window in windows:
        text = next(t.content for t in texts if t.name == window.text)
        assert len(window.ids) == 60 and read(window) in text
    for window in windows[:3]:  # a line begins, or a word where none does between the text's begin and its place
        assert (
            read(window)[0] == window.text
            or read(window) in next(t.content for t in texts if t.name == window.text)[:67]
        )
    for name in "abc":
        text = next(t.content for t in texts if t.name == name)
        starts = sorted(text.index(read(w)) for w in windows if w.text == name)
        assert all(b - a >= 60 for a, b in pairwise(starts))
    again = Corpus(texts, Bytes()).windows(60, 9, rng(seed))
    assert all((a.ids == b.ids).all() for a, b in zip(windows, again, strict=True))
    more = corpus.windows(60, 30, rng(seed))
    assert len(more) == 30 and [w.overlaps for w in more] == sorted(w.overlaps for w in more) and more[-1].overlaps


def test_short_texts_serve_only_where_long_ones_do_not():
    """Joined in their order, and no more of them than is needed."""
    short = [Text(f"s{i}", f"{i}" * 40) for i in range(9)]
    long = numbered("a", 40)
    corpus = Corpus([*short, long], Bytes())
    assert [w.text for w in corpus.windows(100, 1, rng())] == ["a"]
    mixed = corpus.windows(100, 5, rng())
    joined = [w for w in mixed if w.text == "short texts, joined"]
    assert joined and all(read(w) in "".join(t.content for t in short) for w in joined)
    alone = Corpus(short, Bytes())
    assert read(alone.windows(360, 1, rng())[0]) == "".join(t.content for t in short)
    with pytest.raises(UserError, match="it has 360 tokens, and the longest context needs 361"):
        alone.windows(361, 1, rng())
    assert len(Corpus([Text("x", "y" * 100)], Bytes()).windows(100, 1, rng())[0].ids) == 100


@pytest.mark.parametrize(
    ("text", "start", "first", "want"),
    [
        ("one two\nthree four", 12, 0, 8),  # the begin of a line
        ("One two. Three four five", 18, 0, 8),  # no line: of a sentence, the space before it its own
        ("one two three four", 16, 0, 13),  # no sentence: of a word
        ("one\ntwo", 4, 0, 4), ("one\ntwo", 0, 0, 0), ("one\ntwo three", 6, 6, 6), ("one\ntwo three", 6, 5, 6),
        ("abcdefgh", 5, 0, 5),  # nothing begins anywhere
        ("a\nb\n  indented here", 12, 0, 3),  # an indent is no begin: the end of the line before it is
        ("wait... what? Yes", 15, 0, 13),
    ],
)  # fmt: skip
def test_where_a_window_begins(text, start, first, want):
    ids = np.array(list(text.encode()), np.int64)
    got = Corpus([Text("x", text)], Bytes())._begin(ids, start, first)
    assert got in (want, want + 1) if text[want : want + 1] == " " else got == want


def test_a_begin_is_looked_for_so_far_back_and_texts_are_read_so_far(monkeypatch):
    text = "line\n" + "x" * 500
    ids = np.array(list(text.encode()), np.int64)
    corpus = Corpus([Text("x", text)], Bytes())
    assert corpus._begin(ids, 205, 0) == 5 and corpus._begin(ids, 206, 0) == 206
    monkeypatch.setattr(_corpus, "_MOST", 50)
    assert len(Corpus([Text("x", text)], Bytes())._tokens(0)) == 50


@pytest.fixture
def contexts():
    texts = [numbered(name, 400) for name in "abcd"]
    return lambda samples=3, **more: Contexts(Corpus(texts, Bytes()), Bytes(), samples, 5, **more)


def test_plain_contexts_with_what_follows(contexts):
    made = contexts()
    drawn = made.plain("loss", 100, 3, 7)
    assert [len(ids) for ids, _, _ in drawn] == [107] * 3 and made.plain("loss", 100, 3, 7) is drawn
    assert made.start == [] and (contexts().plain("loss", 100, 3, 7)[1][0] == drawn[1][0]).all()
    other = contexts()
    other.seed = 6
    assert any((a[0] != b[0]).any() for a, b in zip(other.plain("loss", 100, 3, 7), drawn, strict=True))
    assert any((a[0] != b[0]).any() for a, b in zip(contexts().plain("speed", 100, 3, 7), drawn, strict=True))
    began = Contexts(Corpus([numbered("a", 400)], Begins()), Begins(), 2, 5)
    assert began.start == [0]
    for ids, _, _ in began.plain("loss", 100, 2, 7):
        assert len(ids) == 107 and ids[0] == 0 and (ids[1:] != 0).all()
    for one in (*began.single(400), *began.multikey(900)):
        assert len(one.ids) in (400, 900) and one.ids[0] == 0


@pytest.mark.parametrize("wording", [CODE, PROSE])
def test_planted_lines_stand_at_their_depths(contexts, wording):
    made = contexts(7, wording=wording)
    for i, context in enumerate(made.single(1200)):
        (question,) = context.questions
        text = bytes(context.ids.astype(np.uint8).tolist()).decode()
        value = bytes(question.answer).decode().strip()
        assert question.depth == DEPTHS[i % 3] and len(context.ids) == 1200
        assert text.count(value) == 1 and abs(text.index(value) / 1200 - question.depth) < 0.06
    for context in made.multikey(1500):
        assert len(context.ids) == 1500 and len(context.questions) == CONSTANTS + ALIASES
        text = bytes(context.ids.astype(np.uint8).tolist()).decode()
        for question in context.questions:
            said = bytes([*question.question, *question.answer]).decode()
            assert 0.02 <= question.depth <= 0.95
            if question.task == "niah_multikey":
                value = said.strip().split()[-1]
                assert abs(text.index(value) / 1500 - question.depth) < 0.2


def test_a_line_is_put_where_one_ends_and_order_is_kept():
    inserter = NeedleInserter(Bytes())
    body = np.array(list(b"aaa\nbbb\nccc\nddd"), np.int64)
    lines = [list(b"\nX"), list(b"\nY")]

    def put(*depths):
        return bytes(inserter.insert(body, lines, depths).tolist()).decode()

    assert put(0.2, 0.8) == "aaa\nX\nbbb\nccc\nY\nddd" and put(0.8, 0.2) == "aaa\nY\nbbb\nccc\nX\nddd"
    assert put(0.5, 0.5) == "aaa\nbbb\nX\nY\nccc\nddd" and put(0.0, 1.0) == "aaa\nX\nbbb\nccc\nY\nddd"
    plain = np.array(list(b"abcdefgh"), np.int64)  # no line ends: at the depth itself
    assert bytes(inserter.insert(plain, lines[:1], [0.5]).tolist()) == b"abcd\nXefgh"
    prose = NeedleInserter(Bytes(), PROSE)
    said = np.array(list(b"One. Two! Three, four? Five.Six"), np.int64)
    assert bytes(prose.insert(said, [list(b" X.")], [0.3]).tolist()) == b"One. Two! X. Three, four? Five.Six"


def test_questions_have_one_length_and_names_share_no_word():
    inserter = NeedleInserter(Bytes())
    for seed in range(5):
        drawn = inserter.draw(6, rng(seed))
        words = [word for constant in drawn for word in constant.words]
        assert len(set(words)) == 12 and all(inserter.fits(c.name, c.value) for c in drawn)
        assert all(c.name == "_".join(c.words).upper() and 10_000 <= int(c.value) < 100_000 for c in drawn)
        alias = inserter.draw_alias(drawn[0], [c.name for c in drawn], rng(seed))
        assert alias not in {c.name for c in drawn} and inserter.fits(alias, drawn[0].value)
        asked, answer = inserter.ask_alias(alias, drawn[0])
        assert bytes([*asked, *answer]).decode() == f"\nassert {alias} == {drawn[0].name} == {drawn[0].value}"
        assert bytes(inserter.alias_line(alias, drawn[0])).decode() == f"\n{alias} = {drawn[0].name}"
        assert bytes(inserter.line(drawn[0].name, "12345")).decode() == f"\n{drawn[0].name} = 12345"
    assert inserter.line_size in range(10, 40) and inserter.answer_size == 5


def test_repeated_passages_take_their_part(contexts):
    made = contexts(2, repeat=0.5)
    drawn = made.plain("loss", 480, 2, 5)
    count = int(0.5 * 480 / PASSAGE)
    for ids, _, _ in drawn:
        text = bytes(ids.astype(np.uint8).tolist()).decode()
        assert len(ids) == 485
        passages = {text[i : i + PASSAGE] for i in range(len(text) - PASSAGE)}
        assert max(text.count(passage) for passage in passages) == count
    assert all(len(one.ids) == 480 for one in made.single(480)) and made._passages(480) == count
    assert contexts(2)._passages(480) == 0
