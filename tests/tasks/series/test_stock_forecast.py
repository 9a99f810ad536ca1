# SPDX-License-Identifier: Apache-2.0
"""Forecasts of shares: folds by time, no look ahead, accounts, scores by hand, a file of one's own."""

import numpy as np
import pytest
import torch

from manyheads.data.stocks import Prices, echoes
from manyheads.errors import UserError
from manyheads.tasks.series._portfolio import wealth
from manyheads.tasks.series._returns import LastToken, Recurrent, ReturnForecast, features
from manyheads.tasks.series.stock_forecast import StockForecast
from tolerance import DEEP, FORMULA, is_close, is_far

TINY = {"dim": 16, "layers": 1, "heads": 2, "batch": 4, "source_of": "echo", "history": 20}


def dates(task, part):
    return np.array([sample.name.rpartition(" ")[2] for sample in task.samples(part)], dtype="datetime64[D]")


def test_folds_walk_forward():
    tests = []
    for fold in (0, 1, 2):
        task = StockForecast(**TINY, fold=fold)
        train, validation, test = (dates(task, part) for part in ("train", "validation", "test"))
        assert train.max() < validation.min() and validation.max() < test.min()
        tests.append(test)
        assert len(task.judged("test")) == len(test)  # no day is left out
        assert len(StockForecast(**TINY, fold=fold, samples_judged=5).fitting()) == len(train)
    assert tests[1].max() < tests[0].min() and tests[2].max() < tests[1].min()
    assert len(dates(StockForecast(**TINY, fold=2), "train")) < len(dates(StockForecast(**TINY), "train"))


def test_nothing_later_changes_what_is_read():
    share, day = echoes()[0], 100
    later = share.values.copy()
    later[day + 1 :] *= 3
    earlier = share.values.copy()
    earlier[day] *= 1.1
    rows, deviation = features(share, 60, day)
    for values, same in ((later, True), (earlier, False)):
        found, other = features(Prices("x", share.dates, values), 60, day)
        assert (np.array_equal(found, rows) and other == deviation) is same
    task = StockForecast(**TINY)
    for sample in task.samples("test")[:50]:
        assert np.datetime64(sample.inputs.date) < np.datetime64(sample.name.rpartition(" ")[2])


def test_features_are_those_by_hand():
    share = echoes()[2]
    volume = share.column("volume") * np.exp(np.random.default_rng(0).uniform(-3, 3, len(share.dates)))
    values = np.concatenate((share.values[:, :5], volume[:, None]), 1)
    values[:, 3] = values[:, 2] + 0.25 * (values[:, 1] - values[:, 2])  # closes a quarter up from the low
    rows, deviation = features(Prices("x", share.dates, values), 60, 100)
    returns = 100 * np.diff(np.log(values[60:101, 4]))
    ranges = 100 * np.log(values[61:101, 1] / values[61:101, 2])
    assert rows.shape == (40, 4) and deviation == pytest.approx(np.std(returns))
    assert is_close(rows[:, 0], returns / deviation, DEEP) and is_close(rows[:, 1], ranges / deviation, DEEP)
    assert is_close(rows[:, 2], -0.25, DEEP, unit=250.0)  # a range is 0.4 % of the prices that it is the difference of
    assert is_close(rows[:, 3], np.diff(np.log(volume[60:101] + 1)).clip(-3, 3), DEEP)


def test_a_target_is_the_next_days_return():
    share = echoes()[3]
    sample = next(s for s in StockForecast(**TINY).samples("train") if s.name == f"echo 03 {share.dates[200]}")
    want = 100 * np.log(share.column("close")[200] / share.column("close")[199])
    assert sample.target[0] == pytest.approx(want) and sample.inputs.close == share.column("adjusted")[199]
    assert sample.inputs.rows[-1, 0] * sample.inputs.deviation == pytest.approx(100 * share.log_returns()[198])


def test_scores_are_those_by_hand():
    task = StockForecast(**TINY)
    sample = task.judged("test")[0]
    (right,) = sample.target
    close = sample.inputs.close
    said = ReturnForecast(close, right + 1)
    price, guess = (close * np.exp(x / 100) for x in (right, right + 1))
    found = task.score(sample, said)
    assert found["mae"] == pytest.approx(1) and found["accuracy"] == pytest.approx(1 - abs(guess - price) / price)
    assert task.score(sample, ReturnForecast(close, -right))["direction"] == 0
    assert task.score(sample, task.truth(sample)) == {"mae": 0, "direction": 1, "accuracy": 1}
    table = task.table(sample)
    assert table.column("last")[0] == 0 and table.column("season")[0] == pytest.approx(
        sample.inputs.rows[-5, 0] * sample.inputs.deviation
    )


def test_a_model_reads_the_last_days_and_forecasts_in_per_cent():
    task = StockForecast(**{**TINY, "history": 12})
    judged = task.judged("test")[:5]
    batch = task.collate(judged)
    for b, one in enumerate(judged):
        assert is_close(batch["inputs"][b], torch.from_numpy(one.inputs.rows[-12:]).float())
        assert float(batch["targets"][b]) == pytest.approx(one.target[0] / one.inputs.deviation, rel=1e-6)
    said = task.predict(lambda inputs: batch["targets"], batch)
    assert [one.percent for one in said] == pytest.approx([one.target[0] for one in judged], rel=1e-5)
    returns = judged[0].inputs.rows[:, 0] * judged[0].inputs.deviation
    assert task.table(judged[0]).column("25 days ago")[0] == pytest.approx(returns[-25])
    weeks = [task.context(one) for one in judged]
    assert weeks == [str(np.datetime64(one.inputs.date, "W")) for one in judged]


@pytest.mark.parametrize("kind", ["lstm", "last token"])
def test_the_last_day_is_read_and_earlier_ones_by_it(kind):
    torch.manual_seed(0)
    model = (Recurrent("lstm", 8, 6, 1, 0.0) if kind == "lstm" else LastToken([Still()], 8, 5)).double().eval()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    before = model(x)
    last, first = x.clone(), x.clone()
    last[:, -1] += 1
    first[:, 0] += 1
    assert before.shape == (2,) and is_far(model(last), before, DEEP)
    assert is_far(model(first), before, DEEP) is (kind == "lstm")  # tokens that blocks leave alone know no other day
    if kind == "lstm":  # one day after the other
        state = model.network(model.embed(x))[1][0][-1]
        assert is_close(before, model.head(state)[:, 0], DEEP)
    else:
        own = model.embed(x[:, -1]) + model.positions[-1]
        assert is_close(before, model.head(model.norm(own))[:, 0], DEEP)


class Still(torch.nn.Module):
    def forward(self, x, mask):
        return x


def test_accounts():
    rng = np.random.default_rng(0)
    prices = 100 * np.exp(np.cumsum(rng.standard_normal(50) / 50))
    held = wealth(prices, np.ones(50), 0.0)
    assert is_close(held, prices / prices[0], DEEP)
    assert is_close(wealth(prices, np.zeros(50), 0.01), 1.0, FORMULA)
    turns = (np.arange(50) // 5 % 2).astype(float)
    assert is_close(wealth(np.full(50, 7.0), turns, 0.0), 1.0, FORMULA)  # a price that stays
    switched = np.abs(np.diff(turns, prepend=0.0)).sum()
    assert wealth(np.full(50, 7.0), turns, 0.01)[-1] == pytest.approx(0.99**switched)
    by_hand = np.cumprod([1, *np.where(turns[:-1] == 1, prices[1:] / prices[:-1], 1.0)])
    assert is_close(wealth(prices, turns, 0.0), by_hand, DEEP)
    assert (wealth(prices, turns, 0.01) <= by_hand).all()


def test_a_file_of_ones_own(tmp_path):
    share = echoes()[0]
    lines = [f"{d},{v[0]},{v[1]},{v[2]},{v[3]},{v[5]}" for d, v in zip(share.dates, share.values, strict=True)]
    for name, rows in (("mine", lines), ("short", lines[:10])):
        (tmp_path / f"{name}.csv").write_text("\n".join(["Date,Open,High,Low,Close,Volume", *rows]))
    task = StockForecast(**TINY)
    with torch.no_grad():
        (said,) = task.predict(task.reference(32).eval(), task.collate([task.open(tmp_path / "mine.csv")]))
    assert said.close == pytest.approx(share.column("close")[-1]) and " after " in str(said)
    with pytest.raises(UserError, match="has 9 days, the model reads 20"):
        task.collate([task.open(tmp_path / "short.csv")])


def test_what_following_a_forecast_is_worth_is_drawn():
    task = StockForecast(**TINY)
    judged = task.judged("test")
    (picture,) = task.pictures(judged, [task.truth(sample) for sample in judged])
    held, own = np.array(picture.values)
    assert picture.kind == "lines" and own[-1] > held[-1] and held[0] == 1


@pytest.mark.parametrize("fields", [{"source_of": "none"}, {"fold": 9}, {"history": 1}])
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(UserError):
        StockForecast(**fields)
