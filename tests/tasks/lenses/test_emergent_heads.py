# SPDX-License-Identifier: Apache-2.0
"""The recipe and the task of ``thinking_sparks``: halves apart, rows of every comparison, controls of their own."""

import json

import numpy as np
import pytest
import torch

from manyheads.experiment import Arm, CausalLM
from manyheads.recipes import thinking_sparks as recipe
from manyheads.tasks.lenses import emergent_heads
from manyheads.tasks.lenses.emergent_heads import EmergentHeads
from oracles.tasks import context, rows, values
from tiny import chat
from tolerance import is_close, is_far

TASK = EmergentHeads(
    steps=4, batch=2, lr=1e-2, source="sums", looks=1, prompts=2, tokens=4, edges=20, patched_edges=30, patched=1,
    exact=4, heads=2, draws=2, problems=5, solved=2, longest=90,
)  # fmt: skip
ARMS = Arm("EAP-IG", options={"steps": 2}), Arm("EAP", options={"steps": 0}), Arm("weight change")


@pytest.fixture(scope="module")
def lm():
    return CausalLM("tiny", chat.tiny(), chat.tokenizer())


@pytest.fixture(scope="module")
def found(lm):
    weights = {name: x.clone() for name, x in lm.model.state_dict().items()}
    made = rows(TASK, context(*ARMS, subject=lm))
    assert all(torch.equal(x, weights[name]) for name, x in lm.model.state_dict().items())
    return made


def test_halves_share_no_question():
    """Sums and GSM8K; a draw of the other half has questions of it."""
    rng = np.random.default_rng(0)
    first, second = ({p.question for p in recipe.draw_problems(300, rng, half)} for half in (False, True))
    assert not first & second and first & {p.question for p in recipe.draw_problems(300, rng, False)}
    both = recipe.draw_problems(8, rng, True)
    assert len(both) == 8 and sum(p.question.startswith("What is ") for p in both) == 4
    assert len(recipe.draw_problems(6, rng, True, "gsm8k")) == 6
    assert all(p.question.startswith("What is ") for p in recipe.draw_problems(6, rng, True, "sums"))


def test_every_comparison_has_its_rows(found):
    for model, heads in (("tuned", ("chosen", "random", "most important")), ("base", ("chosen", "most important"))):
        assert len(values(found, "answer_nll", "EAP-IG", model=model)) == 5
        for chosen in heads:
            assert len(values(found, "heads_cost", "EAP-IG", model=model, heads=chosen, by="zero")) == 5
    assert len(values(found, "heads_cost", "EAP-IG", model="base", heads="random", by="scale")) == 5
    assert len(values(found, "heads_cost", "weight change", model="tuned", heads="chosen", by="zero")) == 5
    assert not [row for row in found if row.arm == "EAP" and row.metric == "heads_cost"]
    chosen, random = (
        values(found, "heads_cost", "EAP-IG", model="tuned", heads=h, by="zero") for h in ("chosen", "random")
    )
    assert is_far(chosen, random)
    assert (values(found, "answer_nll", model="tuned") < values(found, "answer_nll", model="base")).all()
    pairs = len(values(found, "agreement", "EAP-IG", score="magnitude"))
    assert 1 <= pairs <= 2 and (np.abs(values(found, "agreement")) <= 1).all()
    assert {(row.arm, row.at["edges"]) for row in found if row.metric == "left"} == {
        ("EAP-IG", "circuit"), ("EAP-IG", "random"), ("EAP", "circuit"),
    }  # fmt: skip
    assert len(values(found, "solved", model="base", heads="all")) == 2


def test_cohorts_add_up_to_the_circuit(found):
    kinds = {kind: values(found, "heads_of", kind=kind)[0] for kind in ("emergent", "retained", "lost")}
    last = values(found, "heads_of", kind="in the circuit", checkpoint=2)
    assert len(last) == 3 and last.sum() == kinds["emergent"] + kinds["retained"]


def test_controls_are_other_heads_of_the_same_layers(lm):
    from manyheads.heads import HeadTable

    table = HeadTable("", ("a", "b"), np.zeros((2, 4)), {}, (0, 1))
    drawn = emergent_heads._others(table, ("0.1", "1.2", "1.3"), 4, 0)
    assert sorted(name[0] for name in drawn) == ["0", "1", "1"] and not set(drawn) & {"0.1", "1.2", "1.3"}
    import copy

    tuned = copy.deepcopy(lm.model)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.o_proj.weight[:, 32:48] *= 1.5  # head 2
    assert emergent_heads._most_changed(lm.model, tuned, table, 1) == ("1.2",)


def test_answers_alone_are_judged(lm):
    """A problem's loss by hand, without and with a head zeroed."""
    from manyheads import use
    from manyheads.recipes.reasoning_rhythm import imitation

    run = context(*ARMS, subject=lm)
    problems = TASK._drawn(run, test=True)
    assert not {p.question for p in problems} & {p.question for p in TASK._drawn(run, test=False)}
    ids, counts = imitation(lm.model, lm.tokenizer, problems[:1])
    for specs in ((), ("ablate:heads=1.2",)):
        with torch.no_grad(), use(lm.model, *specs):
            logits = lm.model(ids).logits[0, :-1].log_softmax(-1)
        nll = -logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        mine = TASK._nll(run, lm.model, problems, *specs)[0]
        assert is_close(mine, nll[counts[0]].mean()) and is_far(mine, nll.mean())
    assert TASK.unsupported_reason(context(*ARMS, subject=CausalLM("recall")))


def test_the_recipe_keeps_checkpoints_and_follows_them(lm, tmp_path, capsys):
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    out = tmp_path / "tuned"
    arguments = [
        "--model",
        str(tmp_path / "base"),
        "--out",
        str(out),
        "--source",
        "sums",
        "--steps",
        "4",
        "--every",
        "2",
    ]
    more = ["--batch", "2", "--lr", "1e-2", "--prompts", "2", "--edges", "20", "--device", "cpu"]
    assert recipe.main([*arguments, *more]) == 0, capsys.readouterr().err
    made = json.loads((out / "cohorts.json").read_text())
    assert made["checkpoints"] == ["step-2", "tuned"] and [sum(row) for row in made["since"]] == list(
        map(len, made["heads"])
    )
    assert (out / "step-2" / "config.json").exists() and (out / "cohorts.svg").stat().st_size > 1000
    assert json.loads((out / "tuned.json").read_text())["steps"] == 4
    with pytest.raises(SystemExit):
        recipe.main([*arguments, *more])  # the folder holds a model
