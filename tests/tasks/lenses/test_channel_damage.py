# SPDX-License-Identifier: Apache-2.0
"""Reading and knowing under damage: prompts say what they mean, no damage keeps all, answers are those of the model."""

import numpy as np
import pytest
import torch

from manyheads.data.knowledge import NAMES, SETS
from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses.channel_damage import CONTEXTUAL, PARAMETRIC, ChannelDamage, _known
from manyheads.tasks.lenses.channel_norms import ChannelNorms
from oracles.tasks import context, rows, values
from tolerance import nearly

SPEC = "massive_values:damage=top,of=qk,channels="
TASK = ChannelDamage(tokens=96, windows_of=2, questions=4, text="code")


@pytest.fixture(scope="module")
def lm():
    subject = CausalLM("default")
    subject.load("cpu")
    return subject


def test_prompts_hold_what_is_asked_for_or_do_not(lm):
    run = context(subject=lm)
    prompts = TASK._prompts(run)
    assert len(prompts) == 2 * 2 * 2 * 4 and {len(prompt.ids) for prompt in prompts} == {96}
    for prompt in prompts[::2]:
        text, facts = lm.tokenizer.decode(prompt.ids), SETS[prompt.at["set"]]
        answer = facts.facts[prompt.right][1]
        asked = text.rsplit("\n", 1)[-1]
        if prompt.at["knowledge"] == CONTEXTUAL:
            assert f"{asked} {answer}." in text and any(name in asked for name in NAMES)
        else:
            assert f" {answer}." not in text and facts.facts[prompt.right][0] in asked
        planted = [fact for _, fact in facts.facts if f" {fact}.\n" in text]
        assert len(planted) == TASK.planted
    one, other = (next(p for p in prompts if p.at["knowledge"] == kind) for kind in (CONTEXTUAL, PARAMETRIC))
    assert one.choices == other.choices and (one.ids[:12] == other.ids[:12]).all()  # the same passage, asked twice
    for prompt, swapped in zip(prompts[::2], prompts[1::2], strict=True):
        text, facts = lm.tokenizer.decode(swapped.ids), SETS[swapped.at["set"]]
        asked = text.rsplit("\n", 1)[-1]
        assert (prompt.sample, prompt.at, prompt.right) == (swapped.sample, swapped.at, swapped.right)
        if swapped.at["knowledge"] == CONTEXTUAL:  # the other name of the context, whose answer is the other one
            assert f"{asked} {facts.facts[swapped.right][1]}." not in text and f"{asked} " in text.rsplit("\n", 1)[0]
        else:
            assert facts.facts[swapped.right][0] not in asked and asked != lm.tokenizer.decode(prompt.ids)
    with pytest.raises(UserError, match="too few"):
        ChannelDamage(tokens=40, windows_of=2, questions=2, text="code")._prompts(run)


@pytest.mark.slow
def test_damage_of_nothing_keeps_all_and_answers_are_the_models(lm):
    run = context(Arm("full"), Arm("none", f"{SPEC}0"), Arm("top", f"{SPEC}6"), subject=lm)
    assert TASK.unsupported_reason(run) is None
    found = rows(TASK, run)
    for metric in ("answered", "kept", "new_token", "known_token", "text_nll"):
        assert (values(found, metric, "none") == values(found, metric, "full")).all()
    assert (values(found, "text_nll", "top") > values(found, "text_nll", "full")).all()
    prompts, right = TASK._prompts(run), []
    for prompt in prompts:
        with torch.no_grad():
            logits = lm.model(torch.from_numpy(prompt.ids)[None]).logits[0, -1]
        right.append(float(max(prompt.choices, key=lambda token: float(logits[token])) == prompt.choices[prompt.right]))
    assert values(found, "swapped", "full").tolist() == right[1::2]
    right = right[::2]
    assert values(found, "answered", "full").tolist() == right


def test_kept_is_over_the_baseline_of_its_kind(lm):
    run = context(Arm("full"), subject=lm)
    prompts = TASK._prompts(run)
    asked, known = ([p.metric == "answered" for p in prompts], [p.at["knowledge"] == PARAMETRIC for p in prompts])
    answers = [asked[i] and (known[i] or i % 8 == 0) for i in range(len(prompts))]
    run.kept(("undamaged", TASK), lambda: answers)
    found = rows(TASK, run)
    for kind in (CONTEXTUAL, PARAMETRIC):
        assert values(found, "kept", "full", knowledge=kind).mean() == nearly(1)
    assert set(values(found, "kept", "full", knowledge=PARAMETRIC)) == {1.0}
    assert values(found, "kept", "full", knowledge=CONTEXTUAL).max() > 1


def test_who_repeats_a_planted_answer_keeps_nothing(lm, monkeypatch):
    """Whoever is asked for, it says the last planted answer: half of what is read is right, and none of it counts."""
    run = context(Arm("full"), Arm("parrot"), subject=lm)
    prompts = TASK._prompts(run)

    def parrot(self, run, arm, prompts):
        texts = [lm.tokenizer.decode(prompt.ids) for prompt in prompts]
        said = [text[: text.rindex(".\n")].rsplit(" ", 1)[-1] for text in texts]
        facts = [SETS[prompt.at["set"]].facts[prompt.right][1] for prompt in prompts]
        return [answer == fact for answer, fact in zip(said, facts, strict=True)]

    run.kept(("undamaged", TASK), lambda: [prompt.metric == "answered" for prompt in prompts])
    monkeypatch.setattr(ChannelDamage, "_answers", parrot)
    found = rows(TASK, run)
    assert values(found, "answered", "parrot", knowledge=CONTEXTUAL).sum() > 0
    assert values(found, "kept", "parrot").tolist() == [0] * len(values(found, "answered", "parrot"))


def test_known_tokens_stood_before():
    assert _known(torch.tensor([[5, 6, 5, 7, 7]])).tolist() == [[False, True, False, True]]


def test_answers_of_a_set_differ():
    for facts in SETS.values():
        answers = [answer for _, answer in facts.facts]
        assert len(set(answers)) == len(answers) == 30 and len(facts.knows) == len(facts.says) == 2
    assert len(set(NAMES)) == len(NAMES)


def test_norms_of_channels_of_each_layer(lm):
    found = rows(ChannelNorms(tokens=64, windows_of=2), context(subject=lm))
    peaks = {of: values(found, "channel_peak", of=of) for of in ("q", "k", "v")}
    assert all(len(peak) == lm.model.config.num_hidden_layers and (peak > 1).all() for peak in peaks.values())
    assert peaks["q"].mean() > peaks["v"].mean() and np.isfinite(peaks["k"]).all()
