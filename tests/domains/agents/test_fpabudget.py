# SPDX-License-Identifier: Apache-2.0
"""fpabudget: bids by the formula, the budget, what is known of others' bids, degenerate cases, growth of the loss."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from manyheads.domains.agents.fpabudget import Fpabudget, best_bids
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.agents.first_price_auctions import FirstPriceAuctions
from tolerance import FORMULA, is_close, is_far

LEVELS = 20


def auctions(seed=0, runs=3, rounds=60):
    rng = np.random.default_rng(seed)
    return rng.random((runs, rounds)), rng.beta(2, 3, (runs, rounds))


def bids_of(values, others, rho=0.08, **fields):
    return Fpabudget(levels=LEVELS, **fields).bids(values, others, rho, np.random.default_rng(0))


def by_formula(values, others, rho, step, one_sided=False, optimism=0.0, late=False):
    """Bids of one run, auction by auction and level by level."""
    total, levels = len(values), [i / LEVELS for i in range(LEVELS + 1)]
    price, left, told, made = 0.0, rho * total, [], []
    for t in range(total):
        best, best_gain, best_chance = 0.0, 0.0, 0.0
        for level in levels:
            known = [(b, d) for b, d in told if not one_sided or b <= level]
            chance = sum(d <= level for _, d in known) / len(known) if known else 0.0
            if optimism and t:
                chance = min(1.0, chance + optimism * (np.log(total) / len(known)) ** 0.5) if known else 1.0
            gain = (values[t] - (1 + price) * level) * chance
            if level == 0:
                best_gain, best_chance = gain, chance
            elif gain > best_gain:
                best, best_gain, best_chance = level, gain, chance
        if best > left or values[t] <= 0:
            best, best_chance = 0.0, 0.0
        made.append(best)
        left -= best if best >= others[t] else 0.0
        price = max(0.0, price - step * total**-0.5 * (rho - best * best_chance))
        told.append((best, others[t + late - 1] if late and t else others[t]))
    return made


@pytest.mark.parametrize("fields", [{}, {"feedback": "one_sided"}, {"feedback": "one_sided", "optimism": 0.3}])
def test_bids_are_the_formula(fields):
    values, others = auctions()
    found = bids_of(values, others, step=2.0, relative=False, **fields)
    one_sided, optimism = "feedback" in fields, fields.get("optimism", 0.0)
    want = [by_formula(v, d, 0.08, 2.0, one_sided, optimism) for v, d in zip(values, others, strict=True)]
    assert is_close(found, want, FORMULA) and found.max() > 0.2
    for wrong in ({"step": 4.0}, {"one_sided": not one_sided}, {"optimism": optimism + 0.3}):
        given = {"step": 2.0, "one_sided": one_sided, "optimism": optimism, **wrong}
        other = [by_formula(v, d, 0.08, **given) for v, d in zip(values, others, strict=True)]
        assert is_far(found, other, FORMULA) or "optimism" in wrong
    relative = bids_of(values, others, step=2.0 * 0.08, relative=True, **fields)
    assert is_close(relative, found, FORMULA)


FIELDS = st.fixed_dictionaries({
    "feedback": st.sampled_from(["full", "one_sided"]), "step": st.sampled_from([0.0, 0.5, 20.0]),
    "optimism": st.sampled_from([0.0, 0.5]), "rule": st.sampled_from(["first_price", "shading", "random"]),
})  # fmt: skip


@given(fields=FIELDS, seed=st.integers(0, 99), rho=st.sampled_from([0.001, 0.05, 0.3, 2.0]))
def test_no_more_is_spent_than_there_is(fields, seed, rho):
    values, others = auctions(seed, 2, 40)
    made = bids_of(values, others, rho, **fields)
    paid = (made * (made >= others)).sum(1)
    assert (paid <= rho * 40 + 1e-12).all() and (made >= 0).all()
    if rho == 0.05 and fields["rule"] == "random":  # control: without a budget it would be more
        free = bids_of(values, others, 9.0, **fields)
        assert ((free * (free >= others)).sum(1) > paid).any()


@given(seed=st.integers(0, 99), feedback=st.sampled_from(["full", "one_sided"]))
def test_only_what_was_told_before_counts(seed, feedback):
    values, others = auctions(seed, 2, 30)
    made = bids_of(values, others, feedback=feedback)
    changed = others.copy()
    changed[:, 15:] = 1 - changed[:, 15:]
    assert (bids_of(values, changed, feedback=feedback)[:, :16] == made[:, :16]).all()


def test_a_large_budget_has_no_price():
    values, others = auctions(rounds=200)
    found = bids_of(values, others, 1.0, step=50.0)
    assert (found == bids_of(values, others, 1.0, step=0.0)).all()
    assert (found != bids_of(values, others, 0.05, step=50.0)).any()
    last = [np.sort(row[:-1]) for row in others]  # the best response to all that was seen
    grid = np.linspace(0, 1, LEVELS + 1)
    best = [
        grid[((v - grid) * np.searchsorted(d, grid, "right")).argmax()]
        for v, d in zip(values[:, -1], last, strict=True)
    ]
    assert found[:, -1].tolist() == best


def test_what_is_worth_nothing_is_not_bid_for():
    values, others = auctions()
    for rule in ("first_price", "shading", "random"):
        assert bids_of(np.zeros_like(values), others, rule=rule).max() == 0
        assert bids_of(values, others, rule=rule).max() > 0


@given(st.integers(0, 999))
def test_bids_rise_with_the_value_and_fall_with_the_price(seed):
    chance = np.sort(np.random.default_rng(seed).random(31))
    values = np.linspace(0, 1, 40)
    over_values = best_bids(values, np.full(40, 0.7), chance)
    over_prices = best_bids(np.full(40, 0.9), 3 * values, chance)
    assert (np.diff(over_values) >= 0).all() and (np.diff(over_prices) <= 0).all()
    assert over_values[-1] > over_values[0] == 0


def test_against_uniform_bids_half_the_shaded_value_is_best():
    values, price = np.array([0.2, 0.4, 0.8, 1.0]), np.array([0.0, 1.0, 1.0, 0.25])
    found = best_bids(values, price, np.linspace(0, 1, 101)) / 100
    assert is_close(found, values / (2 * (1 + price)), FORMULA)  # all of them levels
    assert is_far(best_bids(values, price, np.linspace(0, 1, 101) ** 2) / 100, values / (2 * (1 + price)), FORMULA)


def test_against_one_price_that_price_is_bid_or_nothing():
    values, _ = auctions(rounds=200)
    others = np.full_like(values, 0.25)
    for feedback in ("full", "one_sided"):
        made = bids_of(values, others, feedback=feedback)
        assert set(np.unique(made)) == {0.0, 0.25} and made[:, 0].max() == 0  # the first one tells the price
    assert len(np.unique(bids_of(values, others, rule="shading"))) > 2


def test_bids_of_nothing_tell_all():
    """Where nothing was bid both kinds of feedback have told the same; where much was bid they have not."""
    values, others = auctions(rounds=30)
    early = values.copy()
    early[:, :-1] = 0
    full, one_sided = (bids_of(early, others, feedback=kind)[:, -1] for kind in ("full", "one_sided"))
    assert (full == one_sided).all() and full.max() > 0
    values, others = auctions(rounds=400)
    assert (bids_of(values, others) != bids_of(values, others, feedback="one_sided")).any()


def test_the_loss_grows_as_the_square_root():
    """At growing T; without a price of the budget it grows with T."""
    task = FirstPriceAuctions(rounds=(400, 3200), runs=10)

    def exponent(**fields):
        rows = Fpabudget(levels=100, **fields).run(task, np.random.default_rng(0))
        return np.mean([value for metric, _, value in rows if metric == "exponent"])

    assert 0.35 < exponent() < 0.7
    assert exponent(step=0.0) > 0.9


def test_it_is_run_beside_a_control(tmp_path):
    fields = "first_price_auctions:rounds=50+200,runs=3"
    results = manyheads.train(["fpabudget", "fpabudget:step=0"], fields, out=tmp_path / "run")
    rows = [row for row in results.rows if row.metric == "spent"]
    assert len(rows) == 6 and {row.arm for row in rows} == {"fpabudget", "fpabudget:step=0.0"}
    with pytest.raises(UserError, match="nothing is trained"):
        manyheads.train(["fpabudget"], fields, budget="10m", out=tmp_path / "other")
    with pytest.raises(UserError, match="nothing is trained"):
        manyheads.train(["fpabudget"], fields, data=tmp_path, out=tmp_path / "other")
    with pytest.raises(UserError, match="field"):
        manyheads.train(["text_match"], fields, out=tmp_path / "other")
    with pytest.raises(UserError, match="no task of a field"):
        manyheads.train(["resper"], fields, out=tmp_path / "other")


def test_what_cannot_be_is_refused():
    for spec in ("step=-1", "levels=1", "rule=other", "feedback=none"):
        with pytest.raises(UserError, match="fpabudget"):
            parse(f"fpabudget:{spec}")

    class Other:
        name = "other"

    with pytest.raises(UserError, match="first_price_auctions"):
        list(Fpabudget().run(Other(), np.random.default_rng(0)))
