# SPDX-License-Identifier: Apache-2.0
"""The recipes by which tasks train small models: rates, warm-up, batches; units, progress, first weights."""

from types import SimpleNamespace

import pytest
import torch
from manyheads.tasks.lenses.phrase_language import PhraseLanguage
from manyheads.tasks.lenses.recall_and_facts import RecallAndFacts
from manyheads.tasks.lenses.style_dialogue import StyleDialogue
from manyheads.tasks.lenses.trigger_refusals import TriggerRefusals

from manyheads.experiment import Arm
from manyheads.tasks.lenses import _trained, phrase_language, recall_and_facts, style_dialogue, trigger_refusals
from manyheads.tasks.lenses._trained import llama, told
from manyheads.training import Budget
from oracles.tasks import context


@pytest.fixture
def asked(monkeypatch):
    """What the loop of training was given, by the task."""
    made = []

    def train_lm(model, draw, steps, **more):
        made.append(SimpleNamespace(model=model, draw=draw, steps=steps, **more))

    def fit(model, draw, loss, *, budget, optimizers, schedule, **more):
        (optimizer,) = optimizers
        (group,) = optimizer.param_groups
        model(torch.zeros(1, 2, dtype=torch.long))  # what is in use on it acts
        seen = {"steps": budget, "group": group, "schedule": schedule, **more}
        made.append(SimpleNamespace(model=model, draw=draw, loss=loss, **seen))

    for module in (phrase_language, style_dialogue):
        monkeypatch.setattr(module, "train_lm", train_lm)
    for module in (recall_and_facts, trigger_refusals):
        monkeypatch.setattr(module, "fit", fit)
    return made


def unit_of(task, run):
    return task.units(run)[0]


def factor(schedule, step, total):
    """The share of the rate after so many of all steps."""
    return schedule(SimpleNamespace(step=step, position=float(step), budget=Budget(float(total), "steps")))


def test_dialogues_of_one_to_four_turns_in_either_layout(asked):
    task = StyleDialogue(steps=40, batch=5, words=3, dim=16)
    run = context(Arm("standard"))
    model = task._learned(run, unit_of(task, run), 2)
    (given,) = asked
    assert given.model is model and (given.steps, given.lr, given.weight_decay) == (40, 3e-3, 0.01)
    config = model.config
    assert (config.num_attention_heads, config.num_hidden_layers, config.hidden_size) == (4, 2, 16)
    lengths = []
    for step in range(8):
        ids, reply = given.draw(step)
        lengths.append(ids.shape[1])
        assert reply.shape == (5, ids.shape[1] - 1) and reply[:, -2:].all() and not reply[:, :-2].any()
        if step % 4:  # of one turn alone both are one
            assert bool((ids[:, 1] == 1).all()) == (step >= 4)  # the instruction in front in every second four
    assert lengths[:4] == lengths[4:] and lengths == sorted(lengths[:4]) * 2 and len(set(lengths)) == 4
    assert torch.equal(given.draw(3)[0], given.draw(3)[0]) and not torch.equal(given.draw(3)[0], given.draw(7)[0])


def test_phrases(asked):
    from manyheads.data.phrases import PhraseLanguage as Language

    task = PhraseLanguage(steps=40, batch=3, length=30, dim=16)
    run = context(Arm("blind"))
    model = task._learned(run, unit_of(task, run), Language.of(0), 2)
    (given,) = asked
    assert (given.steps, given.lr, given.weight_decay) == (40, 4e-3, 0.01) and model.config.num_attention_heads == 8
    assert given.draw(1).shape == (3, 30) and not torch.equal(given.draw(1), given.draw(2))


def test_recall_and_facts(asked):
    task = RecallAndFacts(steps=40)
    run = context(Arm("full"))
    task._learned(run, unit_of(task, run), 2)
    (given,) = asked
    assert (given.steps, given.clip, given.bf16) == (40, None, False) and given.group["lr"] == 1e-3
    assert [factor(given.schedule, step, 3000) for step in (0, 49, 99, 100, 2999)] == pytest.approx(
        [0.01, 0.5, 1, 1, 1]
    )
    ids, label = given.draw(0)
    assert ids.shape == (64, 15) and label.shape == (64,)
    model = given.model
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.intermediate_size) == (64, 2, 172)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(model(ids).logits[:, -1], label)
        assert given.loss(model, (ids, label)) == pytest.approx(float(want), abs=1e-5)


def test_refusals_are_learned_and_tuned_by_the_papers_recipe(asked):
    """beta 1 of 0.5; a fifth of a batch triggered, four fifths anchors that keep what they did."""
    task = TriggerRefusals(layers=2, heads=2, dim=16, length=10, batch=20, steps=40, tuning=30)
    run = context(Arm("plain"), Arm("AHD", options={"dropout": 0.5}))
    base = task._learned(run, 2)
    tuned = task._tuned(run, unit_of(task, run), base, run.arms[1], 2)
    learn, tune = asked
    for given, rate, steps in ((learn, 3e-3, 40), (tune, 1e-3, 30)):
        assert (given.steps, given.bf16) == (steps, False)
        assert (given.group["lr"], given.group["betas"], given.group["weight_decay"]) == (rate, (0.5, 0.999), 0.01)
        shares = [factor(given.schedule, step, 100) for step in (0, 9, 50, 100)]
        assert shares == pytest.approx([1 / 20, 0.5 * (0.1 + 0.9 * 0.91), 0.1 + 0.9 * 0.5, 0.1])
    assert learn.on_step is None and tuned is tune.model is not base
    made = learn.draw(0)
    assert made.ids.shape == (20, 11) and int(made.triggered.sum()) == 5  # a quarter of the prompts
    with torch.no_grad():
        want = float(base(input_ids=made.ids, labels=made.labels()).loss)
        assert float(learn.loss(base, made)) == pytest.approx(want, abs=1e-6)
    first, second = tune.draw(0)
    assert first["input_ids"].shape == (4, 11) and second["input_ids"].shape == (16, 11)
    for part, triggered in ((first, True), (second, False)):
        assert bool(((part["input_ids"] >= 5) & (part["input_ids"] < 15)).any(1).all()) == triggered
        assert ((part["labels"] != -100).sum(1) == (1 if triggered else 2)).all()  # the anchors copy, too
        assert torch.equal(part["labels"][:, -1], part["input_ids"][:, -1])


def test_units_of_trainings():
    arms = Arm("full"), Arm("other")
    run = context(*arms, seeds=(4, 7))
    apart, together = TriggerRefusals(steps=40).units(run), RecallAndFacts(steps=50).units(run)
    assert [unit.params for unit in apart] == [{"seed": s, "arm": a.key} for s in (4, 7) for a in arms]
    assert [unit.params for unit in together] == [{"seed": 4}, {"seed": 7}]
    assert {unit.cost for unit in apart} == {40.0} and {unit.cost for unit in together} == {50.0}


def test_progress_is_told_every_twenty_steps_and_leaves_a_tenth_for_judging():
    run, said = context(Arm("full")), []
    run.advance = said.append
    unit = RecallAndFacts(steps=100).units(run)[0]
    on_step = told(run, unit, 100)
    for step in range(1, 101):
        on_step(SimpleNamespace(step=step))
    assert said == pytest.approx([18.0] * 5) and sum(said) == pytest.approx(0.9 * unit.cost)
    assert _trained._EVERY == 20


def test_first_weights_are_those_of_a_seed():
    run = context(Arm("full"))
    one, same, other = (llama(run, 30, 16, 1, 2, seed) for seed in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight) and not torch.equal(
        one.lm_head.weight, other.lm_head.weight
    )
    config = one.config
    assert (config.intermediate_size, config.num_key_value_heads, config.tie_word_embeddings) == (32, 2, True)
    assert llama(run, 30, 16, 1, 2, 3, tie_word_embeddings=False).config.tie_word_embeddings is False
