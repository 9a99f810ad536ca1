# SPDX-License-Identifier: Apache-2.0
"""Spans that may not be dropped: how they are written, read, counted and refused."""

import io

import pytest
import torch
from rich.console import Console

import manyheads
from manyheads.attention.protect import Protected, as_protect, within
from manyheads.comparison import compare
from manyheads.errors import UserError
from manyheads.models.chat import chat_text, system_span
from manyheads.report.compare import print_summary
from manyheads.report.summary import Summary
from manyheads.spec import protecting
from oracles import caches, models
from tiny import chat as tiny

SAID = [{"role": "system", "content": "Be brief, the code is 7."}, {"role": "user", "content": "Hello there."}]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([(0, 40)], "0-39"), ([(0, 40), (60, 61)], "0-39+60"), ([[(0, 4)], [], [(2, 3), (5, 9)]], "0-3//2+5-8"),
        ("0-39+60/3", "0-39+60/3"), ("system", "system"), (None, ""), ([], ""), ("", ""),
    ],
)  # fmt: skip
def test_what_is_given_is_what_a_spec_says(given, text):
    made = as_protect(given)
    assert str(made) == text and as_protect(text) == made and bool(made) == bool(text)
    strategy = manyheads.parse("snapkv:budget=0.25").protecting(given)
    assert manyheads.parse(strategy.spec) == strategy
    assert ("protect=" in strategy.spec) == bool(text)


@pytest.mark.parametrize("given", [[(3, 3)], [(-1, 4)], "4-2", "x", 7, [(1, 2, 3)], "1-x", [[1, 2], [3]]])
def test_what_is_no_span_is_refused_in_one_line(given):
    with pytest.raises(UserError, match="protect") as error:
        as_protect(given)
    assert "\n" not in str(error.value)


def test_positions_lie_in_the_spans_of_their_row():
    spans = as_protect("0-1+4/2").tensor(4, torch.device("cpu"))
    at = torch.arange(-1, 6).expand(4, 2, -1)
    found = within(at, spans)
    one, two = [False, True, True, False, False, True, False], [False, False, False, True, False, False, False]
    assert found.tolist() == [[one] * 2] * 2 + [[two] * 2] * 2
    assert Protected().tensor(3, torch.device("cpu")) is None
    with pytest.raises(UserError, match="2 rows, and the batch has 3"):
        as_protect("0/1").tensor(3, torch.device("cpu"))
    with pytest.raises(UserError, match="where there are messages"):
        as_protect("system").tensor(1, torch.device("cpu"))


def test_a_budget_is_a_target_that_protected_tokens_may_exceed():
    model = models.tiny("llama")
    ids = models.tokens(1, 40)
    with manyheads.use(model):
        held = [
            caches.stores(caches.prefilled(model, f"keydiff:budget=8{more}", ids))[0].live.size
            for more in ("", ",protect=0-3", ",protect=0-7", ",protect=3-22")
        ]
    assert held == [8, 8, 8, 20]


def test_strategies_that_keep_no_slots_refuse():
    model = models.tiny("llama")
    for specs, said in ((["hcattention"], "storage of its own"), ([], "none is given")):
        with pytest.raises(UserError, match=said) as error:
            manyheads.use(model, *specs, protect=[(0, 4)])
        assert "\n" not in str(error.value)
    assert manyheads.use(model, "full", protect=[(0, 4)]).strategies[0].spec == "full:protect=0-3"


def test_nothing_is_merged_into_protected_tokens():
    model, ids = models.tiny("llama"), models.tokens(1, 40)
    with manyheads.use(model):
        whole = caches.stores(caches.prefilled(model, "full", ids))[0].live
        moved = {}
        for protect in ("", ",protect=0-9"):
            store = caches.stores(caches.prefilled(model, f"d2o:budget=0.5{protect}", ids))[0].live
            at = store.positions()[0, 0]
            first = (at >= 0) & (at < 10)
            moved[protect] = (store.keys[0, 0, first] - whole.keys[0, 0, at[first]]).abs().max()
    assert moved[",protect=0-9"] == 0 < moved[""]


def test_the_system_message_is_found_through_the_template():
    reader = tiny.tokenizer()
    start, stop = system_span(reader, SAID)
    ids = reader.encode(chat_text(reader, SAID), add_special_tokens=False)
    assert start == 0 and reader.decode(ids[:stop]) == chat_text(reader, SAID[:1], generate=False)
    with pytest.raises(UserError, match="no system message"):
        system_span(reader, SAID[1:])
    with pytest.raises(UserError, match="no chat template"):
        system_span(tiny.tokenizer(chat=False), SAID)
    reader.chat_template = "{% if messages[0].role != 'system' %}<system>own</system>{% endif %}" + tiny.TEMPLATE
    ids = reader.encode(chat_text(reader, SAID[1:]), add_special_tokens=False)
    assert reader.decode(ids[: system_span(reader, SAID[1:])[1]]).startswith("<system>own</system>")
    reader.chat_template = (  # as Gemma's: the system message is said by the user, and alone it is refused
        "{% if messages | length < 2 %}{{ raise_exception('no') }}{% endif %}<user>\n{{ messages[0].content }}\n\n"
        "{{ messages[1].content }}</user>"
    )
    ids = reader.encode(chat_text(reader, SAID), add_special_tokens=False)
    assert reader.decode(ids[: system_span(reader, SAID)[1]]).endswith("the code is 7.")


def test_a_spec_is_given_what_to_protect():
    assert protecting("snapkv:budget=0.25", "0-3") == "snapkv:budget=0.25,protect=0-3"
    assert protecting("dhsa + keydiff", "system") == "dhsa + keydiff:protect=system"
    for spec, said in (("dhsa", "drops nothing"), ("hcattention", "storage of its own"), ("keydiff", "no span")):
        with pytest.raises(UserError, match=said):
            protecting(spec, "a-b" if spec == "keydiff" else "0-3")


def test_what_a_model_is_asked_keeps_the_system_message(monkeypatch):
    """``ask`` finds the message; its tokens lie in the cache that questions go on from, and others do not."""
    model, reader = models.build("llama", vocab_size=tiny.tokenizer().vocab_size, max_position_embeddings=2048), None
    reader = tiny.tokenizer()
    seen = []
    monkeypatch.setattr("manyheads.questions._answer", lambda m, t, cache, *_: seen.append(cache) or "")
    for more in ("", ",protect=system"):
        manyheads.ask(
            model, reader, "A long text. " * 20, ["What?"], strategy=f"streaming_llm:budget=8{more}", system="Be brief."
        )
    bare, kept = ({p for p in caches.stores(cache)[0].live.positions()[0, 0].tolist() if p >= 0} for cache in seen)
    _, stop = system_span(reader, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}])
    assert set(range(stop)) <= kept and not set(range(stop)) <= bare


def test_a_table_says_that_budgets_are_targets(tmp_path):
    """And a task without a system message says that it has none, in a line."""
    said = {}
    for spec in ("streaming_llm", "streaming_llm:protect=system"):
        results = compare(
            tiny.scripted(), tiny.tokenizer(), tiny.PROSE, [spec], [0.2],
            ["chat.system_prompt:reply=0", "chat.qa:reply=0"], lengths=[900], samples=1,
            out=tmp_path / spec.partition(":")[2],
        )  # fmt: skip
        screen = Console(file=io.StringIO(), width=200)
        print_summary(Summary(results), screen)
        said[spec] = screen.file.getvalue()
    assert "a budget is a target there" in said["streaming_llm:protect=system"]
    assert "chat.qa has no system message" in said["streaming_llm:protect=system"]
    assert "a budget is a target" not in said["streaming_llm"] and "no system message" not in said["streaming_llm"]
