# SPDX-License-Identifier: Apache-2.0
"""Rankings of shares: labels, what is read, accounts of a portfolio and their figures, folds, files of one's own."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from manyheads.data.stocks import Prices, peaks
from manyheads.domains.series.naive_forecast import NaiveForecast
from manyheads.errors import UserError
from manyheads.tasks._statistics import rank_correlation
from manyheads.tasks.series._panels import HISTORY, cross_sections, quantile_classes
from manyheads.tasks.series._portfolio import figures, held, portfolio
from manyheads.tasks.series._rankings import Ranking
from manyheads.tasks.series.stock_ranking import StockRanking
from tolerance import DEEP, DRAWN, FORMULA, is_close, is_far

TINY = {"dim": 16, "layers": 1, "heads": 2, "batch": 4}


@cache
def panel():
    """Eight shares of 40 weeks, a close a week, of which one begins late.

    Returns of 3 % are differences of prices, which are 1 / 0.03 of their deviations: the unit of what rounds.
    """
    rng = np.random.default_rng(5)
    returns, volumes = 0.03 * rng.standard_normal((40, 8)), rng.uniform(1, 9, (40, 8))
    return returns, volumes


def shares(returns, volumes, late=6):
    dates = np.datetime64("2024-01-05") + 7 * np.arange(len(returns))
    found = []
    for s in range(returns.shape[1]):
        close = 10 * np.cumprod(1 + returns[:, s])
        values = np.stack((*[close] * 5, volumes[:, s]), 1)
        first = late if s == 7 else 0
        found.append(Prices(f"share {s}", dates[first:], values[first:]))
    return found


def test_classes_are_the_papers_intervals():
    places = np.arange(101) / 100
    three, five = quantile_classes(places, 3, 0.2), quantile_classes(places, 5, 0.2)
    assert [int(k) for k in three[[0, 19, 20, 39, 40, 59, 60, 79, 80, 100]]] == [2, 2, -1, -1, 1, 1, -1, -1, 0, 0]
    assert (five >= 0).all() and [int(k) for k in five[[0, 19, 20, 40, 60, 79, 80, 100]]] == [4, 4, 3, 2, 1, 1, 0, 0]
    assert (np.diff(five) <= 0).all() and [int((three == k).sum()) for k in range(3)] == [21, 20, 20]
    assert quantile_classes(np.array([np.nan, 1.0, 0.0]), 2, 0.5).tolist() == [-1, 0, 1]


def test_what_is_read_is_of_one_date_and_nothing_later():
    returns, volumes = panel()
    found = list(cross_sections(shares(returns, volumes), "week"))
    assert len(found) == 40 - HISTORY and found[-1][1] is None and all(one is not None for _, one in found[:-1])
    section, outcome = found[3]  # the week 23 is the last that is read
    assert section.date == "2024-06-14" and section.there.tolist() == [True] * 7 + [False]
    seen, traded = returns[4:24, :7], volumes[4:24, :7]
    for k, x in enumerate((seen, traded / traded.mean(0))):
        want = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        assert is_close(section.rows[:7, :, k].T, want, DEEP, unit=1 / 0.03) and not section.rows[7].any()
    assert is_close(outcome.returns[:7], 100 * returns[24, :7], DEEP, unit=100.0) and np.isnan(outcome.returns[7])
    assert is_close(outcome.places[:7], returns[24, :7].argsort().argsort() / 6, FORMULA)
    for first, same in ((24, True), (23, False)):
        changed, more = returns.copy(), volumes.copy()
        changed[first:] *= -0.5
        more[first:] *= 3 * np.arange(1, 9)
        other, came = list(cross_sections(shares(changed, more), "week"))[3]
        assert np.array_equal(other.rows, section.rows) is same
        assert is_far(came.returns[:7], outcome.returns[:7])


def test_what_all_shares_have_in_common_is_not_seen():
    returns, volumes = panel()
    common = 0.05 * np.random.default_rng(1).standard_normal((40, 1))
    for shift, same in ((common, True), (common * np.arange(8), False)):
        one, other = (list(cross_sections(shares(x, volumes), "week"))[5] for x in (returns, returns + shift))
        assert is_close(one[0].rows, other[0].rows, DEEP, unit=1 / 0.03) is same
        assert np.array_equal(one[1].places, other[1].places, equal_nan=True) is same


def test_periods_end_where_they_should():
    dates = np.arange(np.datetime64("2024-01-01"), np.datetime64("2024-12-31"))
    close = 1 + np.arange(len(dates), dtype=float)
    days = [Prices(str(s), dates, np.stack([close + s] * 6, 1)) for s in range(5)]
    (section, outcome), *_ = cross_sections(days, "week")
    assert section.date == "2024-05-26"  # a Sunday, of the 21st week
    assert is_close(outcome.returns[0], 100 * 7 / close[146], DEEP)
    with pytest.raises(UserError, match="no month has 5 shares"):
        list(cross_sections(days, "month"))
    with pytest.raises(UserError, match="no week has 5 shares"):
        list(cross_sections(days[:4], "week"))


def test_equal_returns_share_a_place_and_what_is_equal_is_0():
    returns, volumes = panel()
    flat = np.zeros_like(returns)
    section, outcome = next(cross_sections(shares(flat, volumes), "week"))
    assert not section.rows[..., 0].any() and is_close(outcome.places[:7], 0.5, FORMULA)
    section, _ = next(cross_sections(shares(returns, 0 * volumes), "week"))
    assert not section.rows[..., 1].any() and section.rows[..., 0].any()


def test_the_best_are_held():
    scores = np.array([0.1, np.nan, 0.9, 0.5, 0.9, 0.2])
    assert held(scores, 0.4).tolist() == [0, 0, 0.5, 0, 0.5, 0] and held(scores, 0.01).tolist() == [0, 0, 1, 0, 0, 0]
    assert (held(scores, 0.6) > 0).sum() == 3  # of five that can be bought
    assert held(scores, 1.0).tolist() == [0.2, 0, 0.2, 0.2, 0.2, 0.2]


def by_hand(weights, returns, cost):
    """The same in numbers of shares: orders at prices of 1 that then grow, fees out of what the portfolio is worth."""
    price, pieces, worth, net = np.ones(len(weights[0])), np.zeros(len(weights[0])), 1.0, []
    for wanted, gains in zip(weights, returns, strict=True):
        now = pieces * price
        traded = np.abs(wanted * worth - now).sum()
        after = worth - cost * traded
        pieces = wanted * after / price
        price = price * (1 + gains)
        net.append((pieces * price).sum() / worth - 1)
        worth = (pieces * price).sum()
    return np.array(net)


def test_accounts():
    rng = np.random.default_rng(2)
    returns = list(0.05 * rng.standard_normal((30, 10)))
    weights = [held(rng.standard_normal(10), 0.3) for _ in returns]
    for cost in (0.0, 0.003, 0.02):
        net, bought = portfolio(weights, returns, cost)
        assert is_close(net, by_hand(weights, returns, cost), DEEP, unit=1.0) and bought[0] == pytest.approx(1)
        assert cost == 0 or is_far(net, portfolio(weights, returns, 0.0)[0], DEEP)
    assert (bought[1:] > 0.3).all() and (bought <= 1 + 1e-12).all()
    stay, still = [np.eye(10)[0]] * 30, [np.zeros(10)] * 30
    net, bought = portfolio(stay, returns, 0.01)  # one share throughout: bought once
    assert is_close(np.prod(1 + net), 0.99 * np.prod([1 + r[0] for r in returns]), DEEP) and not bought[1:].any()
    turns = [np.eye(10)[t % 2] for t in range(30)]
    assert is_close(portfolio(turns, still, 0.01)[0], np.array([-0.01] + [-0.02] * 29), DEEP, unit=1.0)


def test_chance_earns_the_mean_and_foresight_the_most():
    task = StockRanking(**TINY, cost=0.0)
    dates, rng = task.judged("test"), np.random.default_rng(0)

    def gained(scores):
        said = [Ranking(one.inputs.names, x, 0.2) for one, x in zip(dates, scores, strict=True)]
        return np.array([found["excess"] for found in task.scores(dates, said)])

    drawn = np.array([gained(rng.standard_normal((len(dates), 60))) for _ in range(40)]).mean(1)
    spread = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean()) < DRAWN * spread
    best = gained([one.target.returns for one in dates])
    assert best.mean() > 30 * spread and (best >= gained(rng.standard_normal((len(dates), 60)))).all()


def weighted(net, weights, per_year):
    """The figures of periods that count ``weights`` times, adding to their number."""
    share, logs = weights / len(net), np.log1p(net)
    mean = (share * net).sum()
    course = np.concatenate(([0.0], np.cumsum(weights * logs)))
    deepest = max(course[i] - course[j] for i in range(len(course)) for j in range(i, len(course)))
    return {
        "annual_return": 100 * (math.exp(per_year * (share * logs).sum()) - 1),
        "sharpe": math.sqrt(per_year) * mean / math.sqrt((share * (net - mean) ** 2).sum()),
        "drawdown": 100 * (1 - math.exp(-deepest)),
    }


def test_figures_and_what_each_period_adds():
    net = 0.004 + 0.02 * np.random.default_rng(8).standard_normal(25)
    found, n, step = figures(net, 52), len(net), 1e-6
    truth = weighted(net, np.ones(n), 52)
    assert found.keys() == truth.keys()
    for name, values in found.items():
        assert values.mean() == pytest.approx(truth[name], rel=1e-12)
        for i in range(n):
            sides = [
                weighted(net, (1 - d) * np.ones(n) + d * n * np.eye(n)[i], 52)[name] for d in (step, -step)
            ]  # the period i counts more, or less
            slope = (sides[0] - sides[1]) / (2 * step)
            assert values[i] - truth[name] == pytest.approx(slope, rel=1e-4, abs=1e-3 * values.std())
    assert "sharpe" not in figures(np.full(4, 0.01), 52) and not figures(np.full(4, 0.01), 52)["drawdown"].any()


def test_scores_are_those_by_hand():
    task = StockRanking(**TINY)
    dates = sorted(task.judged("test"), key=lambda one: one.name)
    rng = np.random.default_rng(3)
    said = [Ranking(one.inputs.names, rng.standard_normal(60), 0.2) for one in dates]
    found = task.scores(dates[::-1], said[::-1])[::-1]  # their order says nothing
    weights = [held(one.scores, 0.2) for one in said]
    net, bought = portfolio(weights, [one.target.returns / 100 for one in dates], 0.003)
    for t, one in enumerate(found):
        returns = dates[t].target.returns
        assert one["excess"] == pytest.approx(100 * net[t] - returns.mean())
        assert one["ic"] == pytest.approx(rank_correlation(said[t].scores, returns))
        assert one["turnover"] == pytest.approx(bought[t])
        assert one["gross"] == pytest.approx(weights[t] @ returns - returns.mean())
        best = set(np.argsort(-returns)[:12])  # a fifth
        assert one["precision"] == pytest.approx(len(best & set(np.flatnonzero(weights[t]))) / 12)
    assert np.mean([one["sharpe"] for one in found]) == pytest.approx(math.sqrt(52) * net.mean() / net.std())
    alone = task.score(dates[1], said[1])
    gains, mean = (weights[1] * dates[1].target.returns).sum() / 100, dates[1].target.returns.mean()
    assert alone.pop("precision") == found[1]["precision"] and len({one["precision"] for one in found}) > 3
    assert alone == pytest.approx({"excess": 100 * (0.997 * (1 + gains) - 1) - mean, "ic": found[1]["ic"]})
    assert abs(alone["excess"] - found[1]["excess"]) > 0.01  # by itself a date has everything bought
    table = task.table(dates[0])
    assert np.array_equal(table.column("last"), dates[0].inputs.rows[:, -1, 0])
    assert np.array_equal(table.column("season"), dates[0].inputs.rows[:, -13, 0])
    rows = {date: value for name, date, value in NaiveForecast().run(task, rng) if name == "turnover"}
    assert len(rows) == len(dates) and rows[dates[0].name] == 1  # all is bought once, and then a part
    assert np.mean(list(rows.values())) < 0.95


def test_folds_walk_forward():
    tests = []
    for fold in (0, 1, 2):
        task = StockRanking(**TINY, fold=fold)
        parts = [sorted(one.name for one in task.samples(part)) for part in ("train", "validation", "test")]
        assert parts[0][-1] < parts[1][0] and parts[1][-1] < parts[2][0]
        assert len(task.judged("test")) == len(parts[2]) > 40  # none is left out
        contexts = [task.context(one) for one in task.judged("test")]
        assert len(parts[2]) / 4 <= len(set(contexts)) <= len(parts[2]) / 4 + 2
        assert all(np.datetime64(c.split()[-1]) <= np.datetime64(one.name)
                   for c, one in zip(contexts, task.judged("test"), strict=True))  # fmt: skip
        tests.append(parts[2])
    assert tests[1][-1] < tests[0][0] and tests[2][-1] < tests[1][0]


def test_some_shares_are_drawn_with_the_labels_of_all():
    task = StockRanking(**TINY, drawn=16)
    samples = task.samples("train")
    drawn = task.draw(np.random.default_rng(0), samples)
    batch = task.collate(drawn)
    assert batch["inputs"].shape == (4, 16, 20, 2) and batch["mask"].all()
    for b, one in enumerate(drawn):
        whole = next(sample for sample in samples if sample.name == one.name)
        at = np.flatnonzero(one.inputs.there)
        every = task.collate([whole])
        assert torch.equal(batch["labels"][b], every["labels"][0, at])
        assert torch.equal(batch["inputs"][b], every["inputs"][0, at])
    counts = [int((task.collate([sample])["labels"] == k).sum()) for sample in samples[:5] for k in range(5)]
    assert set(counts) == {12}


def test_the_last_periods_are_read_and_tables_have_gains_over_the_mean():
    task = StockRanking(**TINY, history=13)
    one = task.judged("test")[0]
    batch, table = task.collate([one]), task.table(one)
    assert is_close(batch["inputs"][0], torch.from_numpy(one.inputs.rows[:, -13:]).float())
    assert table.features.shape == (60, 26) and np.array_equal(table.column("season"), one.inputs.rows[:, -13, 0])
    assert is_close(table.targets, one.target.returns - one.target.returns.mean(), DEEP, unit=100.0)
    assert np.array_equal(table.column("turnover 2"), one.inputs.rows[:, -3, 1])


def test_the_loss_of_the_reference_is_of_shares_in_a_class():
    task = StockRanking(**TINY, classes=3)
    batch = task.collate(task.judged("test")[:2])
    logits = torch.randn(*batch["labels"].shape, 3, generator=torch.Generator().manual_seed(0))
    at = batch["labels"] >= 0
    want = -logits.log_softmax(-1)[at].gather(1, batch["labels"][at][:, None]).mean()
    assert not at.all() and is_close(task.loss(lambda inputs, mask: logits, batch), want)


def test_the_week_of_most_volume_tells_the_next_return():
    task, found = StockRanking(**TINY), {"planted": [], "no sign": [], "last": [], "mean": []}
    for one in task.samples("train"):
        returns, volumes = one.inputs.rows[..., 0], one.inputs.rows[..., 1]
        most = returns[np.arange(60), volumes.argmax(1)]
        said = {"planted": -np.sign(volumes[:, -1]) * most, "no sign": most, "last": returns[:, -1],
                "mean": returns.mean(1)}  # fmt: skip
        for name, values in said.items():
            found[name].append(rank_correlation(values, one.target.returns))
    means = {name: np.mean(values) for name, values in found.items()}
    assert means.pop("planted") > 0.2 and max(map(abs, means.values())) < 0.1
    assert np.array_equal(peaks()[3].values, peaks()[3].values)


def test_files_of_ones_own(tmp_path):
    returns, volumes = panel()
    rows = {share.name: [f"{d},{v[3]},{v[5]}" for d, v in zip(share.dates, share.values, strict=True)]
            for share in shares(returns, volumes)}  # fmt: skip
    (tmp_path / "each").mkdir()
    for name, lines in rows.items():
        (tmp_path / "each" / f"{name}.csv").write_text("\n".join(["date,close,volume", *lines]))
    together = [f"{name},{line}" for name, lines in rows.items() for line in lines]
    (tmp_path / "all.csv").write_text("\n".join(["Ticker,date,close,volume", *together]))
    task = StockRanking(**TINY)
    torch.manual_seed(0)
    model = task.reference(32).eval()
    with torch.no_grad():
        one, other = task.predict(model, task.collate([task.open(tmp_path / p) for p in ("all.csv", "each")]))
    assert str(one) == str(other) and str(one).startswith("hold share ") and "; not share " in str(one)
    section, _ = list(cross_sections(shares(returns, volumes), "week"))[-1]
    want = model(torch.from_numpy(section.rows[None]).float(), torch.ones(1, 8, dtype=torch.bool)).softmax(-1)[0, :, 0]
    assert is_close(one.scores, want.detach().numpy())
    few = [line for line in together if line < "share 4"]
    (tmp_path / "few.csv").write_text("\n".join(["Ticker,date,close,volume", *few]))
    with pytest.raises(UserError, match="no week has 5 shares"):
        task.collate([task.open(tmp_path / "few.csv")])
    assert len(StockRanking(**{**TINY, "folder": str(tmp_path / "each")}).samples("test")) == 3


def test_what_the_best_are_worth_is_drawn():
    task = StockRanking(**TINY)
    judged = task.judged("test")
    (picture,) = task.pictures(judged, [task.truth(sample) for sample in judged])
    every, best = np.array(picture.values)
    assert picture.kind == "lines" and best[-1] > every[-1] and best[0] == every[0] == 1


@pytest.mark.parametrize(
    "fields", [{"source_of": "none"}, {"fold": 4}, {"history": 12}, {"top": 0.5}, {"classes": 1}, {"period": "hour"}]
)
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(UserError):
        StockRanking(**fields)
