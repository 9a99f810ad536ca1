# SPDX-License-Identifier: Apache-2.0
"""Every figure of the tasks on text, recomputed: one context and one token at a time, from a cache made by hand."""

import math

import numpy as np
import pytest
import torch

import manyheads
from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.integrations.transformers import new_cache
from manyheads.tasks.text import _multikey, _prefill, _text_task
from manyheads.tasks.text._text_task import TARGET, answers, tensor
from manyheads.tasks.text.memory import Memory
from manyheads.tasks.text.niah_multikey import NiahMultikey
from manyheads.tasks.text.niah_single import NiahSingle
from manyheads.tasks.text.perplexity import Perplexity
from manyheads.tasks.text.variable_tracking import VariableTracking
from oracles.tasks import rows
from tiny import compare as tiny
from tolerance import is_close

texts, tokenizer, model = tiny.texts, tiny.tokenizer, tiny.model
FULL, SNAP, NORM = Arm("full"), Arm("snap", "snapkv:window_size=8", 0.3), Arm("norm", "knorm", 40)
SIZE = {"lengths": (448,), "samples": 3}


@pytest.fixture
def run(model, tokenizer, texts):
    """All arms compress after the whole prompt, so that a question may be fed token by token."""
    return RunContext(CausalLM("tiny", model, tokenizer), (FULL, SNAP, NORM), data={"texts": texts})


def after(model, arm, read, fed):
    """Logits after each of the tokens ``fed``, fed alone behind ``read``; and the bytes held before them."""
    strategy = arm.strategy if arm.spec else manyheads.parse("full")
    with torch.no_grad(), manyheads.use(model):
        cache = new_cache(model, strategy)
        model(torch.tensor([list(read)]), past_key_values=cache, use_cache=True)
        held = cache.bytes()
        tokens = torch.tensor([int(token) for token in fed]).view(-1, 1, 1)
        logits = [model(token, past_key_values=cache, use_cache=True).logits[0, -1] for token in tokens]
    return torch.stack(logits), held


def judged(model, arm, context, question, answer, known=0):
    """Whether the answer is what greedy decoding would say if told each of its tokens, its nats, and the bytes."""
    read, fed = [*context, *question[:known]], [*question[known:], *answer[:-1]]
    logits, held = after(model, arm, read, fed)
    said = logits[-len(answer) :]
    nats = [
        math.log(float(row.double().exp().sum())) - float(row[token]) for row, token in zip(said, answer, strict=True)
    ]
    return float(said.argmax(-1).tolist() == list(answer)), float(np.mean(nats)), held


def test_an_answer_is_right_if_every_token_is(run, model):
    """Rows whose answer is right, wrong in the first token, in the last, and in all."""
    ids = torch.randint(0, 1500, (1, 40), generator=torch.Generator().manual_seed(3))
    with manyheads.use(model), torch.no_grad():
        said = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 40:]
        wrong = (said + 1) % 1500
        wanted = torch.stack([said, said, said, wrong])
        wanted[1, 0], wanted[2, 2] = wrong[0], wrong[2]
        cache = new_cache(model, manyheads.parse("full"))
        _prefill._forward(model, ids[:, :30].expand(4, -1).contiguous(), cache, 1)
        right, nats = answers(run, cache, ids[:, 30:].expand(4, -1), wanted, None)
    assert right[0] and not right[2] and not right[3]
    assert not right[1]
    for row, cost in zip(wanted.tolist(), nats, strict=True):
        found = judged(model, FULL, ids[0, :30].tolist(), ids[0, 30:].tolist(), row)
        assert cost == pytest.approx(found[1], abs=1e-4) and right[wanted.tolist().index(row)] == found[0]


def test_a_single_needle(run, model):
    task = NiahSingle(**SIZE)
    contexts = task.contexts(run).single(448)
    found = rows(task, run)
    assert len(found) == 2 * 3 * 3
    for row in found:
        context = contexts[int(row.sample.split("-")[1])]
        (question,) = context.questions
        aware = row.metric == "query_aware"
        arm = next(arm for arm in run.arms if arm.key == row.arm)
        known = len(question.question) - 1 if aware else 0
        right, nats, held = judged(model, arm, context.ids, question.question, question.answer, known)
        assert (row.value, row.about["nats"]) == (right, pytest.approx(nats, abs=2e-4)), row
        assert row.bytes is None if aware else row.bytes == pytest.approx(held, rel=0.01)
        assert row.at == {"length": 448, "depth": question.depth} and row.context == row.sample
        assert row.about["text"] == context.text and row.about["overlaps"] == context.overlaps
    cost = {(row.metric, row.sample): row.about["nats"] for row in found if row.arm == SNAP.key}
    assert any(abs(cost["query_aware", s] - cost["query_agnostic", s]) > 0.01 for _, s in cost)  # they are two figures


@pytest.mark.parametrize(("cls", "metric", "count"), [(NiahMultikey, "multikey", 4), (VariableTracking, "tracked", 3)])
@pytest.mark.parametrize("at_once", [None, 2])
def test_each_question_is_put_to_its_own_context(run, model, monkeypatch, cls, metric, count, at_once):
    if at_once:
        monkeypatch.setattr(_multikey, "sequences_at_once", lambda *_: at_once)
    task = cls(**SIZE)
    contexts = task.contexts(run).multikey(448)
    found = rows(task, run)
    assert len(found) == 3 * 3 * count and {row.metric for row in found} == {metric}
    for row in found[:: 2 if at_once is None else 5]:
        context = contexts[int(row.context)]
        question = context.questions[int(row.sample.partition(".")[2])]
        assert row.sample.partition(".")[0] == row.context and question.task == task.name
        arm = next(arm for arm in run.arms if arm.key == row.arm)
        right, nats, held = judged(model, arm, context.ids, question.question, question.answer)
        assert (row.value, row.about["nats"]) == (right, pytest.approx(nats, abs=2e-4)), row
        assert row.bytes == pytest.approx(held, rel=0.01) and row.at == {"length": 448, "depth": question.depth}
    assert len({(row.arm, row.sample) for row in found}) == len(found)


def test_two_tasks_read_a_context_once(run, model, monkeypatch):
    """And not another one's: units of other arms or contexts are read anew."""
    made = []
    monkeypatch.setattr(
        _multikey, "Prefix", lambda model, ids, arms: made.append(ids.shape) or _prefill.Prefix(model, ids, arms)
    )
    rows(NiahMultikey(**SIZE), run), rows(VariableTracking(**SIZE), run)
    assert made == [(3, 448)]
    rows(NiahMultikey(lengths=(448, 512), samples=3), run)
    assert made == [(3, 448), (3, 512)]  # of the longest alone


@pytest.mark.parametrize("options", [{}, {"piece": 7}, {"lengths": (96, 448)}])
def test_loss_of_what_follows(run, model, options):
    task = Perplexity(**{**SIZE, "target": 20, **options})
    longest = task.lengths[-1]
    drawn = task.contexts(run).plain("loss", longest, 3, 21)
    found = rows(task, run)
    assert len(found) == 3 * 3 * len(task.lengths)
    for row in found[::2]:
        ids, text, overlaps = drawn[int(row.sample)]
        length = row.at["length"]
        arm = next(arm for arm in run.arms if arm.key == row.arm)
        following = ids[length : length + 21]
        logits, held = after(model, arm, ids[:length], following[:-1])
        nats = [
            math.log(float(x.double().exp().sum())) - float(x[t]) for x, t in zip(logits, following[1:], strict=True)
        ]
        assert row.value == pytest.approx(np.mean(nats), abs=2e-4) and row.bytes == pytest.approx(held, rel=0.01)
        assert row.about == {"text": text, "overlaps": overlaps}


def test_loss_of_a_stream_holds_what_is_held_at_its_end(run, model):
    """Read 64 tokens, then the rest behind them in pieces; by hand in the same pieces."""
    arms = (FULL, Arm("window", "streaming_llm:schedule=8", 40))
    run.arms = arms
    task = Perplexity(lengths=(96,), samples=2, target=16, start=64, piece=8)
    drawn = task.contexts(run).plain("loss", 96, 2, 17)
    for row in rows(task, run):
        ids = torch.tensor(drawn[int(row.sample)][0])[None]
        arm = next(arm for arm in arms if arm.key == row.arm)
        nats = []
        with torch.no_grad(), manyheads.use(model):
            cache = new_cache(model, arm.strategy if arm.spec else manyheads.parse("full"))
            model(ids[:, :64], past_key_values=cache, use_cache=True)
            for at in range(64, 112, 8):
                logits = model(ids[:, at : at + 8], past_key_values=cache, use_cache=True).logits[0].double()
                nats += (-logits.log_softmax(-1).gather(1, ids[0, at + 1 : at + 9, None]))[:, 0].tolist()
            held = cache.bytes()
        assert row.value == pytest.approx(np.mean(nats[-16:]), abs=2e-4)
        assert row.bytes == pytest.approx(held, rel=0.01)


def test_bytes_after_compression(run, model):
    task = Memory(lengths=(96, 448), samples=1)
    drawn = {length: task.contexts(run).plain("memory", length, 1, 1)[0][0] for length in (96, 448)}
    found = rows(task, run)
    assert [(row.at["length"], row.arm) for row in found] == [(n, arm.key) for n in (96, 448) for arm in run.arms]
    for row in found:
        length = row.at["length"]
        arm = next(arm for arm in run.arms if arm.key == row.arm)
        _, held = after(model, arm, drawn[length][:length], [1])
        assert row.value == row.bytes == pytest.approx(held, rel=0.01) and row.metric == "cache"
        slots = {"full": length, SNAP.key: math.ceil(0.3 * length), NORM.key: 40}[row.arm]
        assert row.value == pytest.approx(
            slots * 2 * 2 * 2 * 16 * 4, rel=0.15
        )  # k and v of 2 layers, 2 heads, 16 channels


def test_bytes_of_a_token_and_batches_that_fit(run, model, monkeypatch):
    size = _text_task.per_token(run)
    assert size == 2 * 2 * 2 * 16 * 4
    cpu = torch.device("cpu")
    for length, count in ((1, 2**30 // 512), (2**20, 2), (2**20 + 1, 1), (2**24, 1)):
        assert _prefill.sequences_at_once(cpu, length, size) == count
    monkeypatch.setattr(_text_task, "sequences_at_once", lambda *_: 5)
    task = NiahSingle(lengths=(96,), samples=12)
    for sequences, parts in ((1, [(0, 4), (4, 8), (8, 12)]), (2, [(2 * i, 2 * i + 2) for i in range(6)])):
        units = list(task.batches(run, 96, 7.0, sequences, "x"))
        assert [(u.params["first"], u.params["last"]) for u in units] == parts
        assert [u.cost for u in units] == [7.0 * (last - first) for first, last in parts]
        assert all(u.params["arms"] == [0, 3] and task.arms_of(run, u) == run.arms for u in units)
        assert [u.shares for u in units] == [f"x/96/{first}/0" for first, _ in parts]
    assert len(list(task.batches(run, 96, 1.0, 50))) == 12 and not next(iter(task.batches(run, 96, 1.0))).shares


def test_arms_are_parted_on_a_gpu(run, monkeypatch):
    monkeypatch.setattr(_text_task, "sequences_at_once", lambda *_: 100)
    run.arms = tuple(Arm(f"{i}") for i in range(20))
    _text_task.per_token(run)
    run.device = torch.device("cuda")
    task = NiahSingle(lengths=(96,), samples=4)
    units = list(task.batches(run, 96, 6.0, 1, "x"))
    assert [u.params["arms"] for u in units] == [[i, i + 4] for i in range(0, 20, 4)]
    assert {u.cost for u in units} == {4.8}
    assert [arm for u in units for arm in task.arms_of(run, u)] == list(run.arms)


@pytest.mark.parametrize(
    ("spec", "budget", "size"),
    [
        ("", None, None), ("full", None, None), ("snapkv", 0.3, None), ("knorm:schedule=16", 0.3, 16),
        ("keydiff:schedule=step", 0.5, 1 + 200 // 50), ("keydiff:schedule=step", 75, 1 + 1),
        ("keydiff:schedule=step", 1.0, None), ("h2o", 0.25, 1 + 100 // 50), ("streaming_llm", 0.25, 1 + 100 // 50),
    ],
)  # fmt: skip
def test_chunks_are_as_decoding_sees_them(spec, budget, size):
    """A query sees at most a fiftieth of the budget more than in decoding."""
    assert _prefill.chunk_size(Arm("a", spec, budget), 400) == size


def test_logits_in_chunks_are_those_of_one_forward(model):
    ids = torch.randint(0, 1500, (2, 29), generator=torch.Generator().manual_seed(0))
    with manyheads.use(model), torch.no_grad():
        whole = model(ids).logits
        for keep, size in ((1, None), (29, 4), (7, 3), (7, 7), (3, 5), (29, 29)):
            cache = new_cache(model, manyheads.parse("full"))
            got = _prefill.forward_chunked(model, cache, ids, keep, size)
            assert got.dtype == torch.float32 and is_close(got, whole[:, -keep:])
            assert cache.get_seq_length() == 29


def test_what_does_not_fit_a_subject(run):
    most = run.subject.max_context
    assert most == 2048
    for task, fits in (
        (NiahSingle(lengths=(most - 2 * TARGET,)), True), (NiahSingle(lengths=(most - 2 * TARGET + 1,)), False),
        (Perplexity(lengths=(most - 200,), target=200), True), (Perplexity(lengths=(most - 199,), target=200), False),
    ):  # fmt: skip
        assert (task.unsupported_reason(run) is None) == fits
    inserter = NiahSingle().contexts(run).inserter
    single, many = 4 * inserter.line_size, 4 * 7 * inserter.line_size
    for cls, least in ((NiahSingle, max(32, single)), (NiahMultikey, many)):
        assert cls(lengths=(least,)).unsupported_reason(run) is None
        assert "too short" in cls(lengths=(least - 1,) if least > 32 else (32,)).unsupported_reason(run) or least == 32
    for wrong in ({"lengths": (31,)}, {"samples": 0}, {"repeat": 1.0}, {"repeat": -0.1}):
        with pytest.raises(manyheads.UserError):
            NiahSingle(**wrong)
    for wrong in ({"target": 0}, {"piece": -1}, {"start": -1}, {"lengths": (64, 96), "start": 65}):
        with pytest.raises(manyheads.UserError):
            Perplexity(**wrong)
    assert NiahSingle(lengths=(96, 64, 96)).lengths == (64, 96)


def test_tokens_stand_on_the_runs_device(run):
    made = tensor(run, [[1, 2], np.array([3, 4])])
    assert made.dtype == torch.int64 and made.tolist() == [[1, 2], [3, 4]] and made.device == run.device
