# SPDX-License-Identifier: Apache-2.0
"""Recall of attention, recomputed from the weights that the model itself returns."""

import copy

import pytest
import torch

import manyheads
from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.integrations import use
from manyheads.strategy import AttentionWatch
from manyheads.tasks.text.attention_recall import AttentionRecall
from manyheads.tasks.text.niah_single import NiahSingle
from manyheads.tasks.text.speed import Speed
from oracles.tasks import rows
from tiny import compare as tiny

texts, tokenizer, model = tiny.texts, tiny.tokenizer, tiny.model
SIZES = "budget=24,block=16,first=8,local=8,last=16"
ARMS = {
    "chunks": f"dhsa:{SIZES},chunk=8",
    "by head": f"dhsa.rival:by=minference,index=query,{SIZES},chunk=8",
    "recent": f"dhsa.rival:by=a_shape,{SIZES}",
}
FULL, SIZE = Arm("full"), {"lengths": (160,), "samples": 2}


class Calls(AttentionWatch):
    def __init__(self):
        object.__setattr__(self, "layers", None)
        object.__setattr__(self, "found", [])

    def watch(self, call, out):
        self.found.append(call)


def run_of(model, tokenizer, texts, *arms, seeds=(0,)):
    return RunContext(CausalLM("tiny", model, tokenizer), (FULL, *arms), data={"texts": texts}, seeds=seeds)


def value(found, arm, metric, sample):
    (one,) = [r.value for r in found if (r.arm, r.metric, r.sample) == (arm, metric, sample)]
    return one


def test_recall_and_pairs_are_those_of_the_weights_of_the_model(model, tokenizer, texts):
    run = run_of(model, tokenizer, texts, *(Arm(name, spec) for name, spec in ARMS.items()))
    task = AttentionRecall(**SIZE)
    found = rows(task, run)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    first, last = 24 + 8 + 8 + 16, 160 - 16
    for i, (ids, _, _) in enumerate(task._drawn(run, 160)[:2]):
        ids, calls = torch.tensor([list(ids)]), Calls()
        with torch.no_grad():
            weights = eager(ids, output_attentions=True).attentions
            with use(model, calls):
                model(ids)
        for name, spec in ARMS.items():
            strategy, shares, pairs = manyheads.parse(spec), [], []
            for call, layer in zip(calls.found, weights, strict=True):
                ((_, _, _, row),) = strategy.rows(call)
                mask = strategy.pattern(row).to_mask()[0].expand(layer.shape[1], -1, -1)
                seen = mask & torch.ones_like(mask[0]).tril()
                shares.append(float((layer[0, :, : 160 - 16, : 160 - 16] * seen)[:, first:last].sum(-1).mean()))
                pairs.append(float(seen[:, first:last].sum((1, 2)).float().mean()) / sum(range(first + 1, last + 1)))
            assert value(found, name, "recall", f"160-{i}") == pytest.approx(sum(shares) / len(shares), abs=1e-5)
            assert value(found, name, "pairs", f"160-{i}") == pytest.approx(sum(pairs) / len(pairs))
        assert len({round(value(found, name, "pairs", f"160-{i}"), 9) for name in ARMS}) == 1
        assert value(found, "full", "recall", f"160-{i}") == 1.0
    more = rows(task, run_of(model, tokenizer, texts, Arm("more", ARMS["chunks"].replace("24", "40"))))  # control
    assert value(more, "more", "recall", "160-0") > value(found, "chunks", "recall", "160-0")
    assert value(more, "more", "pairs", "160-0") > value(found, "chunks", "pairs", "160-0")


def test_boundaries_are_fitted_once_for_each_seed(model, tokenizer, texts):
    arms = Arm("chunks", ARMS["chunks"]), Arm("fitted", ARMS["chunks"], options={"fit": True})
    run = run_of(model, tokenizer, texts, *arms, seeds=(0, 1))
    found = rows(AttentionRecall(**SIZE, fit_texts=3, fit_tokens=64, fit_steps=3), run)
    fitted = {r.seed: r.value for r in found if (r.arm, r.metric, r.sample) == ("fitted", "recall", "160-0")}
    assert set(fitted) == {0, 1} and len(set(fitted.values())) == 2
    assert {r.seed for r in found if r.arm == "chunks"} == {None}


def test_what_it_does_not_fit(model, tokenizer, texts):
    task = AttentionRecall(**SIZE)
    assert "no arm chooses" in task.unsupported_reason(run_of(model, tokenizer, texts, Arm("snap", "snapkv", 0.5)))
    wide = run_of(model, tokenizer, texts, Arm("chunks", ARMS["chunks"].replace("24", "200")))
    assert "read whole" in task.unsupported_reason(wide)
    assert task.unsupported_reason(run_of(model, tokenizer, texts, Arm("chunks", ARMS["chunks"]))) is None


def test_a_sparse_prompt_among_other_tasks(model, tokenizer, texts):
    """A needle is looked for under the arms that are named, and a time of kernels is not taken on a CPU."""
    run = run_of(model, tokenizer, texts, *(Arm(name, spec) for name, spec in ARMS.items()))
    found = rows(NiahSingle(lengths=(448,), samples=1, only=("full", "recent")), run)
    assert {r.arm for r in found} == {"full", "recent"}
    assert "GPU" in Speed(lengths=(160,), gpu_only=True).unsupported_reason(run)
    assert Speed(lengths=(160,)).unsupported_reason(run) is None
