# SPDX-License-Identifier: Apache-2.0
"""Heads behind a pronoun: scores equal their formulas, every method finds a planted head, gates have their odds."""

import math

import pytest
import torch

import manyheads
from manyheads.data.gender_bias import Profession
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.lenses._patching import ShiftResidual
from manyheads.lenses.gender_components import (
    Acdc,
    DiffMask,
    GenderComponents,
    PronounPrompts,
    ablation_outputs,
    drawn,
    effects,
    first_order,
    prompts,
)
from manyheads.lenses.gender_components.diff_mask import bernoulli_kl, hard_concrete, open_probability
from oracles import models
from tolerance import DEEP, SAME, assert_close, error, is_far, nearly

PLANTED = (1, 2)
KNOWN = [
    Profession(name, male, 0.0, 1.0 if male else -1.0)
    for male, names in ((True, "captain miner pilot"), (False, "nurse maid dancer"))
    for name in names.split()
]


class Words:
    """A token for each word, the model's vocabulary counted on."""

    def __init__(self):
        self.known = {}

    def encode(self, text, add_special_tokens=True):
        del add_special_tokens
        return [self.known.setdefault(word, 2 + len(self.known)) for word in text.split()]


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(prompts, "professions", lambda: KNOWN)


def asked(model, count=6, seed=0):
    return PronounPrompts(model, Words(), manyheads.use, drawn(count, seed))


def planted(dtype=torch.float32):
    """A model whose other heads write nothing."""
    model = models.build("llama", dtype=dtype)
    for layer, (site, _) in enumerate(find_sites(model)):
        weight = site.output().unflatten(1, (4, -1))
        for head in range(4):
            if (layer, head) != PLANTED:
                weight[:, head] = 0
    return model


def test_the_indirect_effect_is_its_formula():
    """A patched forward and probabilities in float64; without the ratio to the plain model it is another number."""
    model = models.build("llama", dtype=torch.float64)
    mine = asked(model)
    table = effects(mine, mine.other, "nie")
    plain = mine.runs.plain.softmax(-1)
    for row, site in enumerate(mine.runs.sites):
        for head in range(4):
            gate = torch.zeros(1, 4, dtype=torch.float64)
            gate[0, head] = 1
            patched = mine.runs.logits(mine.other, {site.name: gate}).softmax(-1)
            ratio = [p.gather(1, mine.anti[:, None]) / p.gather(1, mine.pro[:, None]) for p in (patched, plain)]
            want = (ratio[0] / ratio[1] - 1)[:, 0]
            assert_close(torch.tensor(table.values[:, row, head]), want, 100 * DEEP, unit=1.0)
            assert error(torch.tensor(table.values[:, row, head]), ratio[0][:, 0] - 1) > 1e-3


def test_the_effect_of_nothing_is_nothing():
    """Counterfactual equal to the prompt: 0; a constant on all logits: no change; the pronouns swapped: the inverse."""
    mine = asked(models.tiny("llama"))
    same = effects(mine, mine.runs.outputs, "nie").values
    assert abs(same).max() < 1e-4 < abs(effects(mine, mine.other, "nie").values).max()
    logits = mine.other_logits
    assert_close(mine.effect(logits + 3.0), mine.effect(logits), SAME, unit=10.0)
    one = mine.effect(logits)
    mine.pro, mine.anti = mine.anti, mine.pro
    mine.odds = -mine.odds
    assert_close((1 + one) * (1 + mine.effect(logits)), torch.ones(6), SAME)
    assert is_far((1 + one) * (1 + one), torch.ones(6), SAME)


def test_ablation_puts_zero_or_the_mean():
    mine = asked(models.tiny("llama"))
    for by, factor in (("zero", 0.0), ("mean", 1.0)):
        other = ablation_outputs(mine, by)
        for site, z in mine.runs.outputs.items():
            assert_close(other[site], factor * z.mean(0, keepdim=True), SAME, unit=1.0)
    zero = effects(mine, ablation_outputs(mine, "zero"), "zero")
    gate = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    site = mine.runs.sites[1].name
    none = {site: torch.zeros(1, 4, 8)}
    assert_close(torch.tensor(zero.values[:, 1, 1]), mine.effect(mine.runs.logits(none, {site: gate})).double(), SAME)


def test_first_order_scores_are_derivatives():
    """Against differences: of a gate, and of the residual stream moved along what the head would write."""
    model = models.build("llama", dtype=torch.float64)
    mine = asked(model)
    made, step = first_order(mine), 1e-2  # norms are in float32, so no smaller one
    for row, head in ((0, 3), (1, 0)):
        site = mine.runs.sites[row]
        gate = torch.zeros(1, 4, dtype=torch.float64)
        gate[0, head] = step
        moved = [mine.odds_of(mine.runs.logits(mine.other, {site.name: sign * gate})) for sign in (1, -1)]
        slope = (moved[0] - moved[1]) / (2 * step)
        assert_close(torch.tensor(made["attribution"].values[:, row, head]), slope, 2e-3)
        weight = site.output().unflatten(1, (4, -1))[:, head]
        write = (mine.other[site.name] - mine.runs.outputs[site.name])[:, head] @ weight.T
        moved = [mine.odds_of(mine.runs.logits({}, {}, ShiftResidual(by=sign * step * write))) for sign in (1, -1)]
        slope = (moved[0] - moved[1]) / (2 * step)
        assert_close(torch.tensor(made["direct"].values[:, row, head]), slope, 2e-3)
    assert error(torch.tensor(made["direct"].values), torch.tensor(made["attribution"].values)) > 1e-2


def test_every_method_finds_a_planted_head():
    """Others that write nothing have no effect, stay out of the circuit, and their gates close."""
    model = planted()
    mine = asked(model, 12)
    found = GenderComponents(prompts=12).locate(model, Words(), manyheads.use)
    for name, table in found.tables.items():
        size = abs(table.mean)
        assert size[PLANTED] > 0 and size.sum() == nearly(size[PLANTED], torch.float32), name
    circuit = Acdc(threshold=1e-3).pruned(mine).tables["circuit"]
    assert circuit.mean[PLANTED] == 1 and circuit.mean.sum() == 1
    assert len(found.notes) == 3


@pytest.mark.parametrize("lens", [GenderComponents(prompts=2), DiffMask(batch=2, steps=2), Acdc(prompts=2)])
def test_a_checkpoint_in_half_precision(lens):
    """As published models are loaded; what is computed in float32 beside them may not change their stream's dtype."""
    found = lens.locate(planted(torch.bfloat16), Words(), manyheads.use)
    assert found.tables and all(0 < abs(table.mean).max() < float("inf") for table in found.tables.values())


def test_layers_that_are_named_and_no_others():
    model = models.tiny("llama")
    whole = GenderComponents(prompts=4).locate(model, Words(), manyheads.use).tables
    for lens in (
        GenderComponents(prompts=4, layers=(1,)),
        Acdc(prompts=4, layers=(1,)),
        DiffMask(steps=2, layers=(1,)),
    ):
        for name, table in lens.locate(model, Words(), manyheads.use).tables.items():
            assert table.layers == (1,) and table.values.shape[1:] == (1, 4), name
            if name in ("nie", "direct"):
                assert_close(torch.tensor(table.values), torch.tensor(whole[name].values[:, 1:]), SAME)


def test_gates_have_the_odds_of_the_paper():
    """A hundred and forty-four locations of 0: 0.5798 each, 83.49 together; drawn gates are open as often."""
    chance = open_probability(torch.zeros(144, dtype=torch.float64))
    assert float(chance[0]) == nearly(1 / (1 + math.exp(-0.2 * math.log(5))))
    assert round(float(chance[0]), 4) == 0.5798 and round(float(chance.sum()), 2) == 83.49
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for phi in (0.0, -1.0):
        location = torch.tensor(phi, dtype=torch.float64)
        drawn_open = (hard_concrete(location, u) > 0).double()
        assert abs(float(drawn_open.mean() - open_probability(location))) < 2 * 0.5 / math.sqrt(len(u))
        assert abs(float(drawn_open.mean() - torch.sigmoid(location))) > 6 * 0.5 / math.sqrt(len(u))
    gates = hard_concrete(torch.tensor([-50.0, 50.0]), torch.tensor([0.5, 0.5]))
    assert gates.tolist() == [0.0, 1.0]


def test_the_loss_of_gates():
    """The divergence is that of the formula and 0 between equals; closed gates leave P(pro) / P(anti) alone."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    p, q = torch.sigmoid(a), torch.sigmoid(b)
    want = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(bernoulli_kl(a, b)) == nearly(float(want))
    assert float(bernoulli_kl(a, a)) == 0 and float(bernoulli_kl(b, a)) != nearly(float(want))
    mine = asked(models.tiny("llama"))
    phi = {site: torch.full((4,), -50.0) for site in mine.other}
    loss, spare = DiffMask(k=3).loss(mine, phi, torch.Generator().manual_seed(0))
    assert float(loss) == nearly(float((-mine.odds).exp().mean()), torch.float32, 512)
    assert float(spare) == nearly(-3.0, torch.float32)


def test_gates_open_at_the_head_that_turns_the_pronoun():
    """The likelier of two: only the planted head changes anything, so its gate is the one that stays open longest."""
    mine = asked(planted(), 12)
    if float((mine.odds_of(mine.other_logits) - mine.odds).mean()) < 0:
        mine.pro, mine.anti = mine.anti, mine.pro  # so that patching is what the loss wants
    gate = DiffMask(k=1, steps=60, seed=0).fitted([mine]).tables["gate"]
    assert gate.top(1) == [PLANTED] or gate.top(1, largest=False) == [PLANTED]
    others = [gate.mean[i, h] for i in range(2) for h in range(4) if (i, h) != PLANTED]
    assert max(others) - min(others) < 1e-6 < abs(gate.mean[PLANTED] - others[0])


def test_prompts_are_balanced_and_drawn():
    first, again, other = drawn(12, 0), drawn(12, 0), drawn(12, 1)
    assert first == again != other
    assert [profession.male for profession, _ in first] == [True, False] * 6
    assert len(set(drawn(102, 0))) == 102 == len(drawn(0, 0))  # six professions in 17 templates
    with pytest.raises(UserError, match="balanced prompts, not 103"):
        drawn(103, 0)


def test_what_cannot_be():
    for wrong in ({"prompts": -1}, {"top": 0}):
        with pytest.raises(UserError, match="prompts is 0 or more"):
            GenderComponents(**wrong)
    with pytest.raises(UserError, match="at least 1"):
        DiffMask(k=0)
    with pytest.raises(UserError, match="0 or more"):
        Acdc(threshold=-1)

    class Same(Words):
        def encode(self, text, add_special_tokens=True):
            return [7, 7]

    with pytest.raises(UserError, match="same first token"):
        GenderComponents(prompts=2).locate(models.tiny("llama"), Same(), manyheads.use)


def test_the_page_of_inspect_shows_it(tmp_path):
    """Beside what is read: tables by their names, on the prompts that were asked."""
    from manyheads.inspect.run import inspect_model
    from manyheads.report.inspect import page
    from manyheads.report.page import write

    class Reader(Words):
        model_max_length = 256

        def __call__(self, text, **more):
            return {"input_ids": self.encode(text)}

        def decode(self, ids):
            return " ".join(map(str, ids))

    from manyheads.inspect.prompts import Prompt

    reader = Reader()
    text = [Prompt(list(range(2, 40)), "text")]
    seen = inspect_model(models.tiny("llama"), reader, lenses=["gender_components:prompts=4"], prompts=text)
    found = seen.found["gender_components:prompts=4"]
    assert {"nie", "zero", "mean", "attribution", "direct"} <= set(found.tables)
    assert found.tables["nie"].about["prompts"] == 4 and found.tables["nie"].values.shape == (4, 2, 4)
    assert "natural indirect effect" in write(page(seen), tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="prompts of its own"):
        manyheads.watch(models.tiny("llama"), "gender_components")
