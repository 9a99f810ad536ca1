# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks: what stands in a context answers its question, lengths hold in any tokenizer, replies are scored."""

import json
import re
from collections import Counter

import pytest

from manyheads import comparison
from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks import given, load, names
from manyheads.tasks.text._answered import size
from manyheads.tasks.text._haystack import TooShort, fitted, spread
from tiny import chat as tiny
from tolerance import nearly

RULER = [name for name in names("text") if name.startswith("ruler.")]
LENGTH = 900


@pytest.fixture(scope="module")
def reader():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """Two articles of a made file in SQuAD's format, with a question that has no answer."""
    place = tmp_path_factory.mktemp("squad")
    paragraphs = [
        {
            "context": f"The lighthouse of bay {i} was built in {1800 + i} by engineer number {i}.",
            "qas": [
                {
                    "question": f"When was the lighthouse of bay {i} built?",
                    "answers": [{"text": str(1800 + i)}, {"text": f"in {1800 + i}"}],
                },
                {"question": "Who painted it?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(40)
    ]
    (place / "dev.json").write_text(json.dumps({"data": [{"title": "bays", "paragraphs": paragraphs}]}))
    return place


@pytest.fixture(scope="module")
def hotpot(tmp_path_factory):
    place = tmp_path_factory.mktemp("hotpot")
    rows = [
        {
            "question": f"In which land lies the town of poet {i}?", "answer": f"land {i}",
            "supporting_facts": [[f"poet {i}", 0], [f"town {i}", 0]],
            "context": [
                [f"poet {i}", [f"Poet {i} lives in town {i}."]], [f"town {i}", [f"Town {i} lies in land {i}."]],
                *([f"hill {i}.{j}", [f"Hill {i}.{j} is", " high."]] for j in range(8)),
            ],
        }
        for i in range(12)
    ]  # fmt: skip
    (place / "dev.json").write_text(json.dumps(rows))
    return place


@pytest.fixture
def make(squad, hotpot):
    def task(name, **fields):
        home = {"ruler.qa_1": {"folder": str(squad)}, "ruler.qa_2": {"folder": str(hotpot)}}.get(name, {})
        return load(name)(**{"lengths": (LENGTH,), "samples": 3, **home, **fields})

    return task


def answers(head, tail):
    """What is asked for, read off the text by rules of the test's own."""
    if "access" in tail:
        asked = re.search(r"of (.+) that the text", tail)[1]
        keys = re.split(r", | and ", asked)
        return [
            v
            for key in keys
            for k, v in re.findall(r"access \w+ of ((?:the )?[\w -]+?) is ([\w-]+)\.", head)
            if k == key
        ]
    if "variables" in tail:
        held = {value := re.search(r"value (\d+)", tail)[1]}
        for name, other in re.findall(
            r"Variable (\w+) is set to (?:variable )?(\w+)", head.rpartition("\n\nThe sent")[2]
        ):
            held |= {name} if other in held else set()
        return sorted(held - {value})
    if "coded words" in tail:
        words = Counter(re.findall(r"\b[a-z]{6}\b", head.split("stands in it.\n\n")[1]))
        return [word for word, _ in words.most_common(3)]
    if "10 words" in tail:
        listed = head.rpartition("Remember which.\n\n")[2]
        return [word for word, _ in Counter(re.findall(r"\d+\. (\w+)", listed)).most_common(10)]
    raise AssertionError(tail)


@pytest.mark.parametrize("name", RULER)
def test_the_context_holds_the_answers_and_fills_the_length(make, reader, name):
    task = make(name)
    run = tiny.context(tiny.scripted(), reader)
    for sample in range(3):
        (asked,) = task.asked(run, LENGTH, sample)
        (head,), (query,) = asked.heads, asked.queries
        ids = reader.encode(head, add_special_tokens=False) + reader.encode(query.tail, add_special_tokens=False)
        assert 0.8 * LENGTH < size(run, asked) <= LENGTH and abs(len(ids) - size(run, asked)) <= 1
        assert head.startswith("<user>\n") and "<assistant>\n" in query.tail and "<" not in head[7:]
        (judge,) = query.judges
        if "qa" in name:
            number = re.search(r"(?:bay|poet) (\d+)", query.tail)[1]
            right = [str(1800 + int(number))] if name == "ruler.qa_1" else [f"land {number}"]
            assert right[0] in head and head.count("Document ") > 3
        else:
            right = answers(head, query.tail)
            expected = {"multivalue": 4, "multiquery": 4, ".vt": 5, "cwe": 10, "fwe": 3}
            assert len(right) == next((n for part, n in expected.items() if part in name), 1)
            if "single_1" not in name and ".vt" not in name and name != "ruler.fwe":
                assert not re.search(r"[A-Z_]+ = \d", head)  # no assignment in prose
        assert judge.value(f"It is {', '.join(right)}.") == 1 and judge.value("I do not know.") == 0
        if len(right) > 1:  # one of several is not all of them
            assert judge.value(right[0]) == nearly(1 / len(right))


def test_samples_are_the_same_in_every_process_and_differ(make, reader):
    one, two = (tiny.context(tiny.scripted(), reader) for _ in range(2))
    task = make("ruler.niah_single_2")
    heads = [[task.asked(run, LENGTH, i)[0].heads[0] for i in (2, 0, 1)] for run in (one, two)]
    assert heads[0] == heads[1] and len(set(heads[0])) == 3


def test_without_a_template_the_question_stands_as_it_is(make):
    run = tiny.context(tiny.scripted(), tiny.tokenizer(chat=False))
    (asked,) = make("ruler.niah_single_2").asked(run, LENGTH, 0)
    assert asked.heads[0].startswith("Somewhere") and re.match(r"What is .*\?\nThe access", asked.queries[0].tail)
    assert size(run, asked) <= LENGTH


def test_too_short_a_context_is_skipped_in_one_line(make, reader):
    run = tiny.context(tiny.scripted(), reader)
    assert "too short" in make("ruler.cwe", lengths=(200,)).unsupported_reason(run)
    assert "reads 2048" in make("ruler.vt", lengths=(2040,)).unsupported_reason(run)
    assert make("ruler.vt").unsupported_reason(run) is None


def test_files_that_are_absent_or_other_are_said_in_one_line(make, reader, monkeypatch, tmp_path):
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path))
    run = tiny.context(tiny.scripted(), reader)
    reason = make("ruler.qa_1", folder="").unsupported_reason(run)
    assert "text/squad" in reason and "--tasks ruler.qa_1:folder=DIR" in reason and "\n" not in reason
    (tmp_path / "x.json").write_text('{"data": [{}]}')
    assert "SQuAD's JSON format" in make("ruler.qa_2", folder=str(tmp_path)).unsupported_reason(run)


def test_the_likeliest_reply_is_that_of_generate(make, reader):
    """Every token is read once, and the cache goes on from the context: as transformers' own loop has it."""
    import torch

    from tiny.compare import tiny as plain

    model = plain()
    run = tiny.context(model, reader)
    task = make("ruler.niah_single_2", reply=12)
    rows = list(tiny.rows(task, run))
    (asked,) = task.asked(run, LENGTH, 0)
    texts = (asked.heads[0], asked.queries[0].tail)
    ids = torch.tensor([[i for text in texts for i in reader.encode(text, add_special_tokens=False)]])
    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    twice = model.generate(torch.cat([ids, ids[:, -1:]], 1), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert rows[0].about["reply"] == reader.decode(made, skip_special_tokens=True) != ""
    assert rows[0].about["reply"] != reader.decode(twice[0, ids.shape[1] + 1 :], skip_special_tokens=True)


def test_a_reply_is_scored_and_stops_when_it_is_right(make, reader):
    task = make("ruler.niah_multivalue")
    (asked,) = task.asked(tiny.context(tiny.scripted(), reader), LENGTH, 0)
    right = answers(asked.heads[0], asked.queries[0].tail)
    for said, value in ((" and ".join(right) + " and more", 1.0), (right[1], 0.25)):
        model = tiny.scripted(reader.encode(f" {said}", add_special_tokens=False))
        run = tiny.context(model, reader, Arm("small", "keydiff", 0.25))
        rows = list(tiny.rows(task, run))
        assert [row.value for row in rows] == [value, value] and rows[1].bytes < 0.4 * rows[0].bytes
        assert "more" not in rows[0].about["reply"]


@pytest.mark.parametrize("aware", [False, True])
def test_the_question_comes_after_compression_unless_it_is_asked_before(make, reader, aware):
    model = tiny.scripted()
    run = tiny.context(model, reader, Arm("small", "streaming_llm", 0.25))
    task = make("ruler.niah_single_2", query_aware=aware)
    (asked,) = task.asked(run, LENGTH, 0)
    tail = len(reader.encode(asked.queries[0].tail, add_special_tokens=False))
    list(tiny.rows(task, run))
    context, *fed = [len(ids) for ids in model.asked]
    after = 1 if aware else tail
    assert context == size(run, asked) - after and sum(fed) == 2 * after  # two arms, no token of a reply


def test_fields_are_named_with_a_task():
    task, named = given("ruler.vt:query_aware=true,reply=7")
    assert task.query_aware and task.reply == 7 and named == {"query_aware": True, "reply": 7}
    for wrong, said in (("ruler.vt:aware=1", "no field"), ("ruler", "ruler.cwe"), ("ruler.vtt", "did you mean")):
        with pytest.raises(UserError, match=said):
            given(wrong)
    with pytest.raises(UserError, match="repeat goes with"):
        given("ruler.vt:repeat=0.5")


def test_fields_that_are_named_stay_and_the_sizes_of_a_run_are_taken():
    """A field that the text of a task names is not overwritten by the run's own, nor does it reach another task."""
    model = tiny.scripted()
    plan = comparison.plan(
        CausalLM("tiny", model, tiny.tokenizer()), ["keydiff"], [0.5],
        ["ruler.vt:samples=2,label=twice,text=plays", "ruler.vt", "perplexity:target=8"], [256], 5, text="code",
    ).at("cpu")  # fmt: skip
    one, other, loss = plan.tasks
    assert (one.key, one.samples, one.text, one.lengths) == ("twice", 2, "plays", (256,))
    assert (other.key, other.samples, other.text) == ("ruler.vt", 5, "prose")
    assert (loss.target, loss.text, loss.samples) == (8, "code", 5)
    with pytest.raises(UserError, match=r"two tasks are called ruler\.vt"):
        comparison.plan(CausalLM("tiny", model, None), ["keydiff"], [0.5], ["ruler.vt", "ruler.vt:reply=9"]).at("cpu")


def test_needles_stand_at_their_depths_in_their_order():
    body = [str(i) for i in range(10)]
    assert spread(body, ["b", "a"], [0.5, 0.5]) == [*body[:5], "b", "a", *body[5:]]
    assert spread(body, ["x", "y"], [1.0, 0.0]) == ["y", *body, "x"] and spread([], ["x"], [0.3]) == ["x"]


@pytest.mark.parametrize("length", range(3, 40))
def test_the_longest_that_fits(length):
    def write(n):
        return "ab" + "cde" * n

    made = fitted(write, len, length, 8)
    assert len(made) <= length and (len(made) == 26 or len(made) + 3 > length)
    with pytest.raises(TooShort):
        fitted(write, len, 1, 8)
