# SPDX-License-Identifier: Apache-2.0
"""Pronouns behind professions: heads are found on some and judged on others, arms differ in what is tuned alone."""

import pytest
import torch

from manyheads.data.gender_bias import Pair, Profession
from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM
from manyheads.lenses.gender_components import prompts
from manyheads.tasks.lenses import _pronouns, pronoun_tuning
from manyheads.tasks.lenses.pronoun_heads import METHODS, PronounHeads
from manyheads.tasks.lenses.pronoun_tuning import PronounTuning
from oracles import tasks
from oracles.tasks import context, values
from tiny import chat as tiny

NAMES = {True: "captain miner pilot sailor", False: "nurse maid dancer typist"}
KNOWN = [Profession(name, male, 0.0, 1.0) for male, names in NAMES.items() for name in names.split()]
SMALL = {"prompts": 4, "judged": 4, "mask_steps": 3, "text": "code", "windows_of": 2, "tokens": 48, "top": 2}
HEADS, TUNING = PronounHeads(**SMALL, draws=2), PronounTuning(**SMALL, steps=1, batch=4, pairs=3, grammar_of=3, lr=1e-2)
PLAIN, CMA = Arm("as it is"), Arm("CMA", options={"heads": "nie"})
ARMS = PLAIN, CMA, Arm("random", options={"heads": "random"}), Arm("all", options={"heads": "all"})


@pytest.fixture(autouse=True)
def _made(monkeypatch):
    """No file is read: eight professions, pairs of sentences made here."""
    for module in (prompts, _pronouns):
        monkeypatch.setattr(module, "professions", lambda: KNOWN)
    monkeypatch.setattr(prompts, "pronouns", lambda tokenizer: (300, 301))
    pairs = [Pair(f"The nurse {i} left, she said.", f"The nurse {i} left, he said.", f"{i // 2}") for i in range(6)]
    monkeypatch.setattr(pronoun_tuning, "wino_bias", lambda kind: pairs)
    for name in ("winogender", "crows_pairs"):
        monkeypatch.setattr(pronoun_tuning, name, lambda: pairs)
    monkeypatch.setattr(pronoun_tuning, "grammar", lambda name: [("Two cats", "run", "runs")] * 1000)
    balanced = [(f"The nurse {i} said he left.", f"The nurse {i} said she left.") for i in range(4)]
    monkeypatch.setattr(pronoun_tuning, "_sentences", lambda name: balanced)


@pytest.fixture(scope="module")
def lm():
    return CausalLM("tiny", tiny.tiny(), tiny.tokenizer())


def test_heads_are_compared_and_patched(lm):
    run = context(*ARMS, subject=lm)
    found = tasks.rows(HEADS, run)
    assert {row.arm for row in found} == {"as it is", "CMA", "random"}  # every parameter is no head
    for method in METHODS:
        assert len(values(found, "shared_head", **{"with": method})) == 2  # of eight heads a quarter
    assert len(values(found, "stereotyped")) == 4
    moved = {arm: values(found, "odds_moved", arm, by="patched") for arm in ("CMA", "random")}
    assert len(moved["CMA"]) == 4 and (moved["CMA"] != moved["random"]).all()
    assert HEADS.heads(run, CMA) != HEADS.heads(run, ARMS[2], 0)
    assert HEADS.heads(run, ARMS[2], 0) != HEADS.heads(run, ARMS[2], 5) or len(set(HEADS.heads(run, ARMS[2]))) == 2
    assert [h[0] for h in sorted(HEADS.heads(run, CMA))] == [h[0] for h in sorted(HEADS.heads(run, ARMS[2]))]


def test_a_unit_of_tuning_gives_the_same_rows_in_any_order(lm):
    run, other = (context(*ARMS, subject=lm, seeds=(0, 1)) for _ in range(2))
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    units = TUNING.units(run)
    assert len(units) == 8
    made = {unit.params["arm"]: list(TUNING.measure(run, unit)) for unit in units[:4]}
    assert list(TUNING.measure(other, units[1])) == made["CMA"]  # though nothing ran before it
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    figures = {arm: values(rows, "pronoun_bias") for arm, rows in made.items()}
    assert len({tuple(figure) for figure in figures.values()}) == 4
    tuned = {arm: float(values(rows, "tuned")[0]) for arm, rows in made.items() if arm != "as it is"}
    assert tuned["CMA"] == tuned["random"] < tuned["all"]
    assert len(values(made["CMA"], "sentence_gap", set="WinoBias")) == 6
    again = list(TUNING.measure(run, units[4]))
    assert {row.seed for row in again} == {1} and list(values(again, "text_nll")) == list(
        values(made["as it is"], "text_nll")
    )


def test_likelihoods_are_of_the_whole_sentence(lm):
    """Of two sentences in one batch, padded, as of each by itself; the token before the first is no part."""
    sentences = ["The miller left.", "The miller of the village left the river, and nobody said why."]
    both = pronoun_tuning._log_likelihoods(lm.model, lm.tokenizer, sentences)
    for sentence, got in zip(sentences, both, strict=True):
        ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer.encode(sentence, add_special_tokens=False)]])
        with torch.no_grad():
            chances = lm.model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])
        assert got == pytest.approx(float(chances.sum()), rel=1e-5)
        assert got != pytest.approx(float(chances.mean()), rel=1e-2)


def test_professions_are_of_one_use(lm):
    run = context(*ARMS, subject=lm)
    found, judged = (HEADS.part(run, use) for use in ("found", "judged"))
    assert not set(found) & set(judged) and len(found) == len(judged) == 4
    assert sum(p.male for p in found) == sum(p.male for p in judged) == 2


def test_what_is_missing_is_said(lm, monkeypatch):
    run = context(*ARMS, subject=lm)
    assert HEADS.unsupported_reason(run) is None

    def none():
        raise UserError("professions cannot be had")

    monkeypatch.setattr(_pronouns, "professions", none)
    assert HEADS.unsupported_reason(run) == "professions cannot be had"
