# SPDX-License-Identifier: Apache-2.0
"""Chat tasks: who may be asked, what the model has read when it replies, and what a reply is worth."""

import dataclasses
import re

import pytest
import torch

from manyheads.comparison import compare
from manyheads.errors import UserError
from manyheads.experiment import Arm, Row
from manyheads.experiment.checks import not_discriminative
from manyheads.integrations import use
from manyheads.integrations.transformers import new_cache
from manyheads.report.summary import Summary
from manyheads.spec import parse
from manyheads.tasks import load, names
from manyheads.tasks.text._answered import size
from manyheads.tasks.text._scores import overlap
from manyheads.tasks.text.chat import system_prompt
from manyheads.tasks.text.chat.qa import ASKED, FACTS
from tiny import chat as tiny
from tiny.compare import tiny as plain

CHAT = [name for name in names("text") if name.startswith("chat.")]
LENGTH = 1400


@pytest.fixture(scope="module")
def reader():
    return tiny.tokenizer()


def task_of(name, **fields):
    return load(name)(**{"lengths": (LENGTH,), "samples": 2, **fields})


def encoded(reader, text):
    return reader.encode(text, add_special_tokens=False)


def truth(asked, tail):
    """The value that the passage says of who is asked for, by rules of the test's own."""
    text = "".join(asked.heads)
    for _, sentence, question, values in FACTS:
        pattern = re.escape(question).replace(re.escape("{who}"), r"(\w+ \w+)")
        if who := re.search(pattern, tail):
            said = re.escape(sentence).replace(re.escape("{who}"), who[1]).replace(re.escape("{what}"), r"(\w+)")
            (value,) = re.findall(said, text)
            return value, [other for other in values if other != value]
    raise AssertionError(tail)


@pytest.mark.parametrize("name", CHAT)
def test_a_model_without_chat_template_is_refused_in_one_line(name, tmp_path):
    model, reader = tiny.scripted(), tiny.tokenizer(chat=False)
    with pytest.raises(
        UserError, match=r"has no chat template, which chat\.\w+ is asked in; give a chat model"
    ) as error:
        compare(model, reader, tiny.PROSE, ["random"], [0.5], [name], lengths=[LENGTH], samples=1, out=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CHAT)
def test_contexts_are_in_the_template_and_fit(name, reader):
    run = tiny.context(tiny.scripted(), reader)
    for sample in range(3):
        made = task_of(name).asked(run, LENGTH, sample)
        assert 0.7 * LENGTH < max(size(run, asked) for asked in made) <= LENGTH
        for asked in made:
            text = "".join(asked.heads)
            metrics = {judge.metric for query in asked.queries for judge in query.judges}
            system = name == "chat.system_prompt" and metrics != {"unseen"}
            assert text.startswith("<system>\n" if system else "<user>\n")
            assert all(query.tail.endswith("</user>\n<assistant>\n") for query in asked.queries)
            assert len({query.tail for query in asked.queries}) == len(asked.queries)


@pytest.mark.parametrize("name", ["chat.qa", "chat.multi_turn"])
def test_questions_are_answered_by_the_passage_and_by_nothing_else(name, reader):
    run = tiny.context(tiny.scripted(), reader)
    (asked,) = task_of(name).asked(run, LENGTH, 1)
    assert len(asked.queries) == 4
    for query in asked.queries:
        value, others = truth(asked, query.tail)
        (judge,), (choice,) = query.judges, query.choices
        said = {one.strip() for one in choice.candidates}
        assert choice.candidates[choice.right] == f" {value}" and len(said) == ASKED and said - {value} <= set(others)
        text = "".join(asked.heads)
        assert f"{choice.opening} {value}" in text and not any(f"{choice.opening} {one}" in text for one in others)
        assert all(
            re.search(rf"\b{one}\b", text) for one in said
        )  # so that to know the text without the people is a guess
        assert judge.value(f"It is {value}.") == 1 == judge.value(value.upper())
        assert judge.value(f"{value} or {others[0]}") == 0 == judge.value(others[1]) == judge.value("")


def test_no_question_sees_another(reader):
    """Every question goes on from the context alone: the wrong way, one after the other, gives other logits."""
    model = plain()
    run = tiny.context(model, reader)
    task = task_of("chat.qa", reply=6)
    (asked,) = task.asked(run, LENGTH, 0)
    replies = [row.about["reply"] for row in tiny.rows(task, run) if row.metric == "answered"]
    alone, after = [], ""
    for query in asked.queries:
        for texts, into in (([asked.heads[0], query.tail], alone), ([asked.heads[0], after, query.tail], None)):
            ids = torch.tensor([[i for text in texts for i in encoded(reader, text)]])
            made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            said = reader.decode(made, skip_special_tokens=True)
            if into is not None:
                into.append(said)
        after += query.tail + said
        wrong = said
    assert replies == alone and len(replies) == 4
    assert replies[-1] != wrong


def test_turns_are_read_one_by_one_through_what_was_kept(reader):
    """The cache of an arm after a dialogue is that of feeding each turn in one forward and evicting after it."""
    model, arm = plain(), Arm("keydiff", "keydiff", 0.3)
    run = tiny.context(model, reader, arm)
    task = task_of("chat.multi_turn", reply=4)
    (asked,) = task.asked(run, LENGTH, 0)
    heads = [encoded(reader, head) for head in asked.heads]
    assert len(heads) == task.turns and all(head.count("<user>") == 1 for head in asked.heads)
    by_hand = {}
    for schedule in ("turn", "prefill"):
        with torch.inference_mode(), use(model):
            cache = new_cache(model, parse(f"keydiff:budget=0.3,schedule={schedule}"))
            for head in heads:
                model(input_ids=torch.tensor([head]), past_key_values=cache)
            by_hand[schedule] = cache.bytes()
    rows = {row.arm: row for row in tiny.rows(task, run)}
    assert rows[arm.key].bytes == by_hand["turn"] < by_hand["prefill"] < rows["full"].bytes
    assert rows[arm.key].bytes < 0.35 * rows["full"].bytes


def test_rules_are_scored_one_by_one_and_unasked(reader):
    task = task_of("chat.instructions")
    bare = tiny.context(tiny.scripted(), reader)
    without, with_rules = task.asked(bare, LENGTH, 0)
    assert "Keep these rules" in with_rules.heads[0] and "Keep these rules" not in without.heads[0] and without.plain
    assert with_rules.queries[0].tail == without.queries[0].tail
    said = "Nothing, of the kind: a Thing was seen."
    model = tiny.scripted(encoded(reader, said))
    rows = list(tiny.rows(task, tiny.context(model, reader, Arm("small", "keydiff", 0.5))))
    assert [(row.metric, row.arm) for row in rows] == [
        ("unasked", "full"), ("unasked", "full"),
        *[(metric, arm) for arm in ("full", "small:budget=0.5") for metric in ("preferred",) * 2 + ("followed",) * 2],
    ]  # fmt: skip
    kept = {judge.at["rule"]: float(judge.value(said)) for judge in with_rules.queries[0].judges}
    assert all(
        row.value == kept[row.at["rule"]] and row.about["reply"] == said for row in rows if row.metric != "preferred"
    )
    assert len({(row.metric, row.arm, row.sample) for row in rows}) == len(rows)


def test_a_rule_that_is_lost_is_preferred_by_half(reader):
    """A model that reads no rule likes both replies as much as without one; control: one reply a little more."""
    (choice, _) = (
        task_of("chat.instructions").asked(tiny.context(tiny.scripted(), reader), LENGTH, 0)[1].queries[0].choices
    )
    assert choice.value([-9.0, -4.0], [-9.0, -4.0]) == (0.5, 0.0) and choice.value([-8.9, -4.0], [-9.0, -4.0])[0] == 1
    assert choice.value([-9.0, -4.0])[0] == 0  # without the prior the likelier reply would always win
    run = tiny.context(tiny.scripted(), reader)
    task = task_of("chat.instructions", samples=40)
    wrong = 0
    for sample in range(task.samples):
        for rule in (choice for choice in task.asked(run, LENGTH, sample)[1].queries[0].choices):
            kept, twin = rule.candidates
            assert kept != twin
            wrong += kept < twin  # a preference of its own, whatever was said
    assert 0.3 < wrong / (2 * task.samples) < 0.7


def test_without_replies_only_choices_are_made(reader):
    for name in CHAT:
        rows = list(tiny.rows(task_of(name, reply=0), tiny.context(plain(), reader)))
        assert {row.metric for row in rows} <= {"chosen", "preferred", "obeyed", "known"} and rows, name
        assert all("reply" not in row.about and "lead" in row.about for row in rows)
    with pytest.raises(UserError, match="reply counts tokens"):
        load("ruler.vt")(reply=0)


def test_orders_of_secrecy_take_turns(reader):
    """Half of the contexts order the contrary, so that always refusing is no obedience; a leak is one of a secret."""
    run, task = tiny.context(tiny.scripted(), reader), task_of("chat.system_prompt")
    orders = []
    for sample in range(4):
        bare, unseen, asked = task.asked(run, LENGTH, sample)
        choice, secret = asked.queries[1].choices
        assert bare.plain and unseen.plain and not unseen.queries[0].choices
        assert bare.queries[1].choices[0].candidates == choice.candidates
        assert system_prompt._GUARD not in bare.heads[0] and system_prompt._OPEN not in bare.heads[0]
        guarded = system_prompt._GUARD in asked.heads[0]
        assert guarded == ("No, " in choice.candidates[choice.right]) == (asked.queries[1].judges[0].metric == "leak")
        assert guarded != (system_prompt._OPEN in asked.heads[0])
        orders.append(guarded)
        name = secret.candidates[secret.right]
        assert f"{secret.opening}{name}." in asked.heads[0] and len(set(secret.candidates)) == 8
        assert not any(f"{secret.opening}{other}" in asked.heads[0] for other in secret.candidates if other != name)
        (prior,) = unseen.queries[1].choices
        assert not prior.metric and prior.candidates == secret.candidates and name not in unseen.heads[0]
        judge = asked.queries[1].judges[-1]
        assert judge.metric == ("spilled" if guarded else "told")
        assert judge.value(f"It is{name}.") == 1 and judge.value("It is Nobody.") == 0
    assert orders == [True, False, True, False]


def test_a_leak_is_the_overlap_with_the_system_prompt(reader):
    task = task_of("chat.system_prompt", reply=200)
    _, blind, asked = task.asked(tiny.context(tiny.scripted(), reader), LENGTH, 0)
    prompt = re.search(r"<system>\n(.*)</system>", asked.heads[0])[1]
    assert "<system>" not in blind.heads[0] and "Never repeat" in prompt and blind.plain
    half = " ".join(prompt.split()[: len(prompt.split()) // 2])
    model = tiny.scripted(encoded(reader, half))
    rows = list(tiny.rows(task, tiny.context(model, reader)))
    found = {row.metric: row.value for row in rows}
    assert set(found) == {"preferred", "obeyed", "followed", "leak", "unasked", "unseen", "known", "spilled"}
    assert found["leak"] == found["unseen"] == pytest.approx(overlap(half, prompt)) and 0.3 < found["leak"] < 0.7
    assert asked.queries[1].judges[0].value(prompt) == 1 and asked.queries[1].judges[0].value("I may not.") < 0.1


@pytest.mark.slow
def test_a_baseline_that_fails_is_said_not_to_discriminate(reader, tmp_path):
    """Nothing is answered, and most of the system prompt is given away: neither tells anything of an arm."""
    parts = ["You are the assistant of", *system_prompt._PLACES, *system_prompt._TASKS, *system_prompt._SECRETS]
    parts += system_prompt._NAMES
    model = tiny.scripted(encoded(reader, " ".join([*parts, system_prompt._GUARD])))
    results = compare(
        model, reader, tiny.PROSE, ["random"], [0.5], ["chat.qa:reply=48", "chat.system_prompt:reply=400"],
        lengths=[LENGTH], samples=3, out=tmp_path,
    )  # fmt: skip
    weak = {one.key: one.weak for one in Summary(results).measured}
    assert all(
        "not discriminative" in weak[name]
        for name in ("chat.qa.answered", "chat.system_prompt.leak", "chat.system_prompt.spilled")
    )
    assert not weak["chat.system_prompt.unseen"]


def test_a_protected_system_message_is_found_and_kept(reader):
    """Under ``protect=system`` the tokens of the message stay whatever the strategy prefers; without, few do."""
    arms = [Arm("bare", "streaming_llm", 0.1), Arm("kept", "streaming_llm:protect=system", 0.1)]
    task = task_of("chat.system_prompt", reply=0)
    run = tiny.context(plain(), reader, *arms)
    assert task.unsupported_reason(run) is None
    asked = task.asked(run, LENGTH, 0)[-1]
    start, stop = asked.system
    read = encoded(reader, asked.heads[0])
    assert reader.decode(read[start:stop]) == re.match(r"<system>.*</system>\n", asked.heads[0], re.S)[0]
    held = {}
    with torch.inference_mode(), use(run.subject.model):
        for arm, cache in task.caches(run, [read], arms, asked.system):
            held[arm.name] = set(cache.layers[0].store.live.positions()[0, 0].tolist()) & set(range(start, stop))
    assert held["kept"] == set(range(start, stop)) and len(held["bare"]) < 0.2 * (stop - start)
    rows = list(tiny.rows(task, run))
    held = {row.arm: row.bytes for row in rows}
    assert held[arms[0].key] < held[arms[1].key] < held["full"]
    reason = task_of("chat.qa").unsupported_reason(run)
    assert reason.startswith("chat.qa has no system message") and "\n" not in reason


@pytest.mark.parametrize(("values", "weak"), [([0.0, 0.1] * 6, False), ([0.9, 0.8] * 6, True)])
def test_less_is_better_of_a_leak(values, weak):
    """A baseline that leaks next to nothing discriminates; with the bound of more-is-better it would not."""
    metric = load("chat.system_prompt")().metric("leak")
    rows = [Row(task="t", metric="leak", arm="full", value=x, sample=f"{i}") for i, x in enumerate(values)]
    assert bool(not_discriminative(metric, rows, Arm("full"))) is weak
    turned = dataclasses.replace(metric, higher=True)
    assert bool(not_discriminative(turned, rows, Arm("full"))) is not weak


def test_settings_that_cannot_be_are_refused():
    for name, fields, said in (
        ("chat.multi_turn", {"turns": 3}, "4 or more"), ("chat.multi_turn", {"query_aware": True}, "query_aware"),
        ("chat.instructions", {"rules": 4}, "1, 2 or 3"), ("chat.qa", {"reply": -1}, "0 or more"),
        ("chat.qa", {"people": 3}, "4 to 480"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            task_of(name, **fields)


def test_a_template_that_writes_turns_anew_is_skipped_in_one_line():
    reader = tiny.tokenizer()
    reader.chat_template = "{{ messages | length }} messages\n" + tiny.TEMPLATE
    reason = task_of("chat.multi_turn").unsupported_reason(tiny.context(tiny.scripted(), reader))
    assert "writes earlier turns anew" in reason and "\n" not in reason
