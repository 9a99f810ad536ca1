# SPDX-License-Identifier: Apache-2.0
"""Order books: labels by brute force, thresholds of the training part, the simulator's rules, files of one's own."""

import numpy as np
import pytest
import torch

from manyheads.data.order_books import COLUMNS, _Book, read_book, simulated_day
from manyheads.domains.series.tabular_classes import TabularClasses, _row
from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.series.order_book import DeepLOB, OrderBook, trend
from tolerance import DEEP, PASSES, WRONG, is_close

TINY = {"dim": 8, "layers": 1, "heads": 2, "batch": 8, "frames": 12, "horizon": 6, "smooth": 4, "every": 2, "width": 8}


def lobster(path, day):
    np.savetxt(path, day.values, delimiter=",", fmt="%d")


def mid(day):
    return (day.values[:, 0] + day.values[:, 2]) / 2


def spread(day):
    return day.values[:, 0] - day.values[:, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("books")
    for i in range(5):
        lobster(place / f"ABC_2024-01-0{i + 1}_34200000_57600000_orderbook_10.csv", simulated_day(i, 60))
    return place


@pytest.mark.parametrize(("horizon", "smooth"), [(5, 3), (3, 5), (1, 1), (7, 7)])
def test_labels_are_those_of_brute_force(horizon, smooth):
    mid = 100 + np.cumsum(np.random.default_rng(0).standard_normal(40))
    found, w = trend(mid, horizon, smooth), min(horizon, smooth)
    for t in range(len(mid)):
        if t < w - 1 or t + horizon >= len(mid):
            assert np.isnan(found[t])
            continue
        before = np.mean([mid[t - i] for i in range(w)])
        after = np.mean([mid[t + horizon - i] for i in range(w)])
        assert found[t] == pytest.approx((after - before) / before, abs=1e-12)
    assert len(mid) - horizon - w + 1 == np.isfinite(found).sum()


def test_a_label_sees_nothing_behind_its_horizon_and_a_line_has_one_slope():
    mid = 100 + np.cumsum(np.random.default_rng(1).standard_normal(40))
    other = mid.copy()
    other[26:] += 50
    same = trend(mid, 5, 3) == trend(other, 5, 3)
    assert same[2:21].all() and not same[21:35].any()
    line = trend(1e6 + np.arange(40.0), 5, 3)
    assert np.nanmax(line) - np.nanmin(line) < 1e-9 and np.nanmean(line) == pytest.approx(5e-6, rel=1e-3)


def test_a_window_ends_where_its_label_is_taken(folder):
    task = OrderBook(folder=str(folder), **TINY)
    day = simulated_day(4, 60)
    values, bound = trend(mid(day), 6, 4), task.bound()
    found = {s.name: s for s in task.samples("test")}
    assert set(found) == {f"ABC_2024-01-05_34200000_57600000_orderbook_10 {t}" for t in range(11, 54, 2)}
    for name, sample in found.items():
        t = int(name.rpartition(" ")[2])
        assert sample.target == ("up" if values[t] > bound else "down" if values[t] < -bound else "flat")
        raw = day.values[t - 11 : t + 1]
        assert sample.inputs.shape == (12, 40) and sample.inputs.dtype == torch.float32
        assert sample.inputs[3, 4] == pytest.approx((raw[3, 4] / mid(day)[t] - 1) * 1e4, rel=1e-5, abs=1e-5)
        assert sample.inputs[5, 7] == pytest.approx(np.log1p(raw[5, 7]), rel=1e-6)
        assert abs(sample.inputs[-1, 0] + sample.inputs[-1, 2]) < 1e-4  # about the last mid price


def test_the_threshold_is_of_the_training_part_alone(folder, tmp_path):
    days = [simulated_day(i, 60) for i in range(5)]
    mean = np.nanmean(np.abs(np.concatenate([trend(mid(day), 6, 4) for day in days[:3]])))
    assert OrderBook(folder=str(folder), **TINY).bound() == pytest.approx(mean / 2, rel=1e-9)
    bound = OrderBook(folder=str(folder), threshold="spread", **TINY).bound()
    mids, spreads = (np.concatenate([of(day) for day in days[:3]]) for of in (mid, spread))
    assert bound == pytest.approx(spreads.mean() / mids.mean(), rel=1e-9)
    for path in folder.glob("*.csv"):  # control: other test days change nothing, other training days do
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lobster(tmp_path / "ABC_2024-01-05_34200000_57600000_orderbook_10.csv", simulated_day(9, 60))
    assert OrderBook(folder=str(tmp_path), **TINY).bound() == pytest.approx(mean / 2, rel=1e-9)
    with_other = tmp_path / "other"
    with_other.mkdir()
    for i in (7, 8, 9, 3, 4):
        name = f"ABC_2024-01-0{1 + (7, 8, 9, 3, 4).index(i)}_34200000_57600000_orderbook_10.csv"
        lobster(with_other / name, simulated_day(i, 60))
    assert OrderBook(folder=str(with_other), **TINY).bound() != pytest.approx(mean / 2, rel=1e-3)


def test_intervals_are_over_days_where_several_are_tested(folder, tmp_path):
    task = OrderBook(folder=str(folder), **TINY)
    assert {task.context(one) for one in task.samples("test")} == {""}
    for i in range(10):
        lobster(tmp_path / f"ABC_2024-01-{i + 1:02}_34200000_57600000_orderbook_10.csv", simulated_day(i, 30))
    task = OrderBook(folder=str(tmp_path), **TINY)
    assert {task.context(one) for one in task.samples("test")} == {"2024-01-09", "2024-01-10"}


@pytest.mark.parametrize("names", [
    ("Train_Dst_NoAuction_DecPre_CF_7", "Test_Dst_NoAuction_DecPre_CF_1"),
    ("Train_Dst_NoAuction_DecPre_CF_7", "Train_Dst_NoAuction_DecPre_CF_8", "Test_Dst_NoAuction_DecPre_CF_8"),
])  # fmt: skip
def test_days_that_fi_2010_has_in_two_files_are_refused(tmp_path, names):
    """Train_..._CF_7 holds days 1 to 7, Test_..._CF_k day k + 1."""
    for i, name in enumerate(names):
        np.savetxt(tmp_path / f"{name}.txt", simulated_day(i, 60).values.T / 1e4)
    with pytest.raises(UserError, match="one training file"):
        OrderBook(folder=str(tmp_path), **TINY).samples("train")


def test_days_are_in_one_part_and_fi_2010_keeps_its_own(folder, tmp_path):
    task = OrderBook(folder=str(folder), **TINY)
    assert [{s.group for s in task.samples(p)} for p in ("train", "validation", "test")] == [
        {"2024-01-01", "2024-01-02", "2024-01-03"}, {"2024-01-04"}, {"2024-01-05"},
    ]  # fmt: skip
    first, second, test = (simulated_day(i, 100).values for i in range(3))
    np.savetxt(tmp_path / "Train_Dst_NoAuction_DecPre_CF_7.txt", np.concatenate((first / 1e4, second / 3e3)).T)
    np.savetxt(tmp_path / "Test_Dst_NoAuction_DecPre_CF_7.txt", np.concatenate((test / 1e4, np.zeros((100, 109))), 1).T)
    own = OrderBook(folder=str(tmp_path), **TINY)
    counts = {part: len(own.samples(part)) for part in ("train", "validation", "test")}
    assert counts == {"train": 64, "validation": 4, "test": 42}  # two shares of 80 and 20 snapshots, one of 100
    assert len(read_book(tmp_path / "Train_Dst_NoAuction_DecPre_CF_7.txt")) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a_orderbook_10.csv", "1,2,3\n", "40 columns"), ("a_orderbook_10.csv", "x" + ",1" * 39, "no order book"),
        ("a_orderbook_10.csv", ",".join(["1", "1", "2", "1"] * 10), "prices that are none"),
        ("ZScore_NoAuction_1.txt", "\n".join(["-1 -1"] * 40), "DecPre"),
    ],
)  # fmt: skip
def test_a_file_that_will_not_do(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_book(tmp_path / name)
    with pytest.raises(UserError, match="holds no order book"):
        OrderBook(folder=str(tmp_path / "none"), **TINY).samples("train")


def test_a_file_of_ones_own_is_judged_window_by_window(folder):
    task = OrderBook(folder=str(folder), **TINY)
    path = sorted(folder.glob("*.csv"))[-1]
    torch.manual_seed(0)
    batch = task.collate([task.open(path)])
    assert batch["starts"] == [tuple(range(0, 49, 2))]
    labelled = next(s for s in task.samples("test") if s.name.endswith(" 15"))
    assert torch.equal(batch["inputs"][2], labelled.inputs)  # frames 4 to 15
    (said,) = task.predict(task.reference(8).eval(), batch)
    assert said.log_probs.shape == (25, 3) and " from 0" in str(said)


def test_the_simulated_book_keeps_the_rules_of_one():
    day = simulated_day(3, 300)
    asks, bids = day.values[:, 0::4], day.values[:, 2::4]
    assert (np.diff(asks) > 0).all() and (np.diff(bids) < 0).all() and (spread(day) >= 1).all()
    assert (day.values == np.round(day.values)).all() and (day.values[:, 1::2] >= 0).all()
    assert (day.values[:, [1, 3]] > 0).all()
    assert len(COLUMNS) == 40 and COLUMNS[:4] == ("ask price 1", "ask size 1", "bid price 1", "bid size 1")
    again, other = simulated_day(3, 300), simulated_day(4, 300)
    assert (again.values == day.values).all() and (other.values != day.values).any()


def followed(signal):
    """Correlation of the hidden flow with the move of the mid price over the next ten snapshots, and how many moves."""
    flows, moves = [], []
    for seed in range(8):
        book, mids = _Book(np.random.default_rng(seed), signal), []
        for t in range(400):
            if t % 10 == 0:
                flows.append(book.x)
                mids.append((book.bid + book.ask) / 2)
            book.step()
        moves += [*np.diff(mids), (book.bid + book.ask) / 2 - mids[-1]]
    return np.corrcoef(flows, moves)[0, 1], len(moves)


def test_prices_follow_the_hidden_flow_and_without_a_signal_they_do_not():
    (told, n), (nothing, _) = followed(0.8), followed(0.0)
    assert abs(nothing) < PASSES / n**0.5 < WRONG / n**0.5 < told


def test_orders_behind_the_best_prices_follow_the_hidden_pressure():
    """Bids where it is high, asks where it is low; orders at the best prices do not."""
    came = {True: [], False: []}
    for seed in range(4):
        book = _Book(np.random.default_rng(seed), 0.0)
        own = book._limit

        def limit(buys, deep, book=book, own=own):
            came[deep].append((book.z, buys))
            own(buys, deep)

        book._limit = limit
        for _ in range(300):
            book.step()
    behind, best = (np.corrcoef(np.array(some, float).T)[0, 1] for some in (came[True], came[False]))
    assert abs(best) < PASSES / len(came[False]) ** 0.5 and behind > WRONG / len(came[True]) ** 0.5


def test_deeplob_forgets_the_scale_of_a_column():
    torch.manual_seed(0)
    model, x = DeepLOB(4, 6, 3, 0.0).double(), torch.randn(8, 20, 40, dtype=torch.float64)
    scales = torch.rand(40, dtype=torch.float64) + 1
    before = model(x)
    assert (model(x * scales + 3) - before).abs().max() < 1e-4 < 1e-2 < (model(x.flip(2)) - before).abs().max()


def test_deeplob_reads_all_snapshots_and_levels():
    model = DeepLOB(4, 6, 3, 0.0).double().eval()
    x = torch.randn(1, 20, 40, dtype=torch.float64)
    before = model(x)
    for t, column in ((0, 0), (19, 39), (8, 21)):
        moved = x.clone()
        moved[0, t, column] += 1
        assert (model(moved) != before).any()


def test_a_window_is_a_row_of_four_numbers_a_column():
    x = np.random.default_rng(0).standard_normal((12, 40))
    row = _row(Sample("a", "g", "test", torch.from_numpy(x)))
    assert is_close(row, np.concatenate((x[-1], x.mean(0), x.std(0), x[-1] - x[0])), DEEP)


def test_classifiers_without_a_network_learn_what_is_there_and_no_more():
    task = OrderBook(**{**TINY, "samples_judged": 60})
    rng = np.random.default_rng(0)

    def windows(n, part, told):
        labels = rng.integers(0, 3, n)
        inputs = torch.from_numpy(rng.standard_normal((n, 12, 40))).float()
        inputs[:, -1, 5] += 5.0 * told * torch.from_numpy(labels).float()
        return [
            Sample(f"{part} {i}", part, part, x, task.classes[k])
            for i, (x, k) in enumerate(zip(inputs, labels, strict=True))
        ]

    for model in ("logistic", "boosting"):
        found = []
        for told in (1, 0):
            seen, judged = windows(600, "train", told), windows(300, "test", told)
            said = TabularClasses(model=model).said(task, judged, seen, 0)
            found.append(np.mean([row["balanced_accuracy"] for row in task.scores(judged, said)]))
        few = TabularClasses(model=model).said(task, judged, [one for one in seen if one.target != "flat"], 0)
        assert all(int(one.log_probs[0].argmax()) != 1 for one in few)  # a class that was never seen
        assert {int(one.log_probs[0].argmax()) for one in few} == {0, 2}
        assert found[0] > 0.8 and abs(found[1] - 1 / 3) < 2 * (2 / 9 / 300) ** 0.5 + 0.02
