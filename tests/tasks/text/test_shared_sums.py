# SPDX-License-Identifier: Apache-2.0
"""What texts say of sums, and writers over shared blocks beside a batch of rows."""

import pytest
import torch

from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.integrations import use
from manyheads.tasks.text import shared_sums
from manyheads.tasks.text.shared_cache import SharedCache
from manyheads.tasks.text.shared_sums import SharedSums, said
from manyheads.writing import Written
from tiny import compare as tiny
from tolerance import SAME, nearly

texts, tokenizer, model = tiny.texts, tiny.tokenizer, tiny.model


def test_the_answer_to_a_sum_is_what_most_say_and_of_equals_the_first():
    asked = [(1, 2), (3, 4), (5, 6)]
    found, repeated = said(["1 + 2 = 4, 3+4=7", "1 + 2 = 3. 9 + 9 = 18", "so 1 + 2 = 3 and 3 + 4 = 8"], asked)
    assert found == {(1, 2): 3, (3, 4): 7} and repeated == nearly(3 / 5)
    assert said(["5 + 6 = 11"], asked) == ({(5, 6): 11}, 0.0) and said(["9 + 9 = 18"], asked) == ({}, 0.0)


def context(arms, model, tokenizer, texts):
    return RunContext(subject=CausalLM("tiny", model, tokenizer), arms=arms, data={"texts": texts})


def test_sums_are_scored_by_arm_with_the_tokens_that_each_has(model, tokenizer, texts, monkeypatch):
    asked = []

    def write(strategy, request):
        asked.append((strategy.spec, request.most))
        prompt = tokenizer.decode(request.ids[0])
        assert all(int(c) == int(a) + int(b) for a, b, c in shared_sums._SUM.findall(prompt))
        a, b = map(int, prompt.rpartition("sum.\n")[2].split("\n")[0].split(" + "))
        lines = {"Alice": f"{a} + {b} = {a + b}", "Bob": f"{a} + {b} = {a + b}. {a} + {b} = 1"}
        return Written([5], 4, {"texts": lines} if strategy.slug == "hogwild" else {})

    monkeypatch.setattr(shared_sums, "write", write)
    arms = (Arm("full"), Arm("more", options={"times": 3}), Arm("two", "hogwild:finish=2"))
    run, task = context(arms, model, tokenizer, texts), SharedSums(lists=1, sums=4, tokens=10)
    rows = {(row.arm, row.metric): row.value for unit in task.units(run) for row in task.measure(run, unit)}
    assert asked == [("sampling:top_k=1", n) for n in (4, 10, 30)] + [("hogwild:finish=2", 12)]
    assert rows["two", "solved"] == rows["two", "stated"] == 0.25  # no sum comes twice here
    assert rows["two", "repeated"] == nearly(2 / 3)
    assert rows["full", "solved"] == rows["full", "stated"] == 0 and rows["two", "step"] == rows["two", "seconds"] * 250


@pytest.fixture(scope="module")
def shared(model, tokenizer, texts):
    arms = (Arm("batch"), *(Arm(kind, options={"blocks": kind}) for kind in ("joint", "apart", "swapped")))
    run = context(arms, model, tokenizer, texts)
    task = SharedCache(lengths=(96,), samples=1, writers=(1, 3), steps=2)
    with torch.inference_mode(), use(model):
        return [row for unit in task.units(run) for row in task.rows(run, unit)]


def test_blocks_predict_what_rows_do_and_in_the_wrong_order_something_else(shared):
    error = {(row.arm, row.at["writers"]): row.value for row in shared if row.metric == "error"}
    assert set(error) == {("joint", 1), ("apart", 1), ("swapped", 1), ("apart", 3)}
    assert max(error["joint", 1], error["apart", 1], error["apart", 3]) < 4 * SAME < error["swapped", 1]


def test_bytes_are_of_one_prompt_and_every_arm_is_timed(shared):
    held = {(row.arm, row.at["writers"]): row.value for row in shared if row.metric == "cache"}
    assert held["batch", 3] == 3 * held["batch", 1] and held["apart", 3] == held["joint", 3] < 2 * held["batch", 1]
    times = [row for row in shared if row.metric == "step"]
    assert len(times) == 4 * 2 * 2 and all(row.value > 0 for row in times)
