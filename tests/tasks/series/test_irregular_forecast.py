# SPDX-License-Identifier: Apache-2.0
"""Irregular forecasts: parts by time, no look ahead, scores by hand, the placebo, files of one's own."""

import dataclasses

import numpy as np
import pytest
import torch

from manyheads.data.irregular import SETS, irregular, read_record
from manyheads.errors import UserError
from manyheads.tasks.series._forecast import cut_times
from manyheads.tasks.series._forecasters import DLinear, PatchTST, carried_forward, interpolated
from manyheads.tasks.series._notes import embedded
from manyheads.tasks.series._windows import Forecast
from manyheads.tasks.series.irregular_forecast import IrregularForecast
from tiny.series import stations
from tolerance import CLOSE, SAME, error

__all__ = ["stations"]
EXACT = 1e-12  # of sums of some hundred numbers in float64

TINY = {
    "dim": 16,
    "layers": 1,
    "heads": 2,
    "width": 32,
    "batch": 4,
    "samples_judged": 12,
    "encoder": "words",
    "days": 4,
}


def task_of(folder, **fields):
    return IrregularForecast(folder=str(folder), **{**TINY, **fields})


def test_parts_come_one_after_another_and_windows_lie_in_one(stations):
    task = task_of(stations)
    bounds = {}
    for part in ("train", "validation", "test"):
        times = np.concatenate([s.inputs.times for s in task.samples(part)])
        bounds[part] = times.min(), times.max()
        for sample in (*task.judged(part), *(task.draw(np.random.default_rng(0), task.samples(part)))):
            window = sample.inputs
            assert bounds[part][0] <= window.record.times.min() and window.record.times.max() < window.origin
            assert window.origin <= window.queries.min() and window.queries.max() <= bounds[part][1]
            assert (window.record.note_times < window.origin).all() and len(window.record.notes)
            whole = next(s.inputs for s in task.samples(part) if s.inputs.name == window.record.name)
            assert whole.times[0] <= window.origin - 4 and window.origin + 4 <= whole.times[-1] + 1e-9
            later = (whole.times >= window.origin) & (whole.times < window.origin + 4)
            assert np.array_equal(window.queries, whole.times[later & np.isfinite(whole.values).any(1)])
    assert bounds["train"][1] < bounds["validation"][0] and bounds["validation"][1] < bounds["test"][0]


def test_windows_of_training_begin_anywhere(stations):
    task = task_of(stations)
    rng, samples = np.random.default_rng(0), task.samples("train")
    origins = [one.inputs.origin for _ in range(40) for one in task.draw(rng, samples)]
    assert len(set(origins)) == len(origins)
    first, last = min(s.inputs.times[0] for s in samples), max(s.inputs.times[-1] for s in samples)
    assert np.ptp(origins) > 0.9 * (last - first - 8)  # less a history and a horizon


def test_a_time_that_is_there_twice_has_what_is_known_later(tmp_path):
    rows = ["2024-01-01,1,5", "2024-01-01,2,", *(f"2024-01-{day:02},{day},{day}" for day in range(2, 12))]
    (tmp_path / "mine.csv").write_text("\n".join(["date,a,b", *rows]))
    assert read_record(tmp_path / "mine.csv").values[0].tolist() == [2, 5]


def test_horizons_that_are_judged_do_not_overlap(stations):
    task = task_of(stations)
    by_record = {}
    for sample in task.judged("test"):
        by_record.setdefault(sample.inputs.record.name, []).append(sample.inputs.origin)
    assert len(by_record) == 3
    assert all((np.diff(sorted(origins)) >= 4 - 1e-9).all() for origins in by_record.values())


def test_cuts_of_entities_that_share_no_time():
    shared = cut_times([np.arange(0.0, 100), np.arange(20.0, 120)])
    assert shared["train"][1] == pytest.approx(20 + 0.6 * 79) and shared["test"][0] == pytest.approx(20 + 0.8 * 79)
    apart = cut_times([np.arange(0.0, 100), np.arange(200.0, 300)])
    assert apart["train"][1] == pytest.approx(219.4, abs=1)  # of all observations


def test_nothing_later_changes_what_is_read(stations):
    """Values and texts from the origin on are other ones; the batch is the same but for its targets."""
    task = task_of(stations)
    block = task.samples("test")[0]
    origin = float(block.inputs.times[0]) + 5

    def batch_of(sample):
        return task.collate([task._window(sample, origin, "w")])

    def changed(first):
        record = block.inputs
        later = record.times >= first
        values = np.where(later[:, None], record.values + 9, record.values)
        notes = tuple("other" if t >= first else n for t, n in zip(record.note_times, record.notes, strict=True))
        return dataclasses.replace(block, inputs=dataclasses.replace(record, values=values, notes=notes))

    read = ("values", "mask", "times", "there", "queries", "notes", "note_times", "note_mask")
    plain, later, earlier = batch_of(block), batch_of(changed(origin)), batch_of(changed(origin - 2))
    assert all(torch.equal(plain[name], later[name]) for name in read)
    assert not torch.equal(plain["targets"], later["targets"])
    assert not torch.equal(plain["values"], earlier["values"]) and not torch.equal(plain["notes"], earlier["notes"])


def test_scales_are_those_of_training(stations):
    task = task_of(stations)
    train, test = (next(s.inputs for s in task.samples(p) if s.inputs.name == "elm") for p in ("train", "test"))
    assert error(train.scale[0], np.nanmean(train.values, 0)) < EXACT
    assert error(train.scale[1], np.nanstd(train.values, 0)) < EXACT
    assert np.array_equal(train.scale, test.scale) and error(test.scale[0], np.nanmean(test.values, 0)) > 1e-4


def test_windows_without_a_text_are_left_out_where_there_are_texts(stations):
    task = task_of(stations)
    block = task.samples("test")[0]
    origin = float(block.inputs.times[0]) + 5
    late = block.inputs.note_times >= origin
    later = dataclasses.replace(block.inputs, note_times=block.inputs.note_times[late],
                                notes=tuple(np.array(block.inputs.notes)[late]))  # fmt: skip
    bare = dataclasses.replace(block.inputs, note_times=np.zeros(0), notes=())
    found = [task._window(dataclasses.replace(block, inputs=one), origin, "w") for one in (block.inputs, later, bare)]
    assert found[0] is not None and found[1] is None and found[2] is not None


class Said(torch.nn.Module):
    """Says what it was made with, in deviations."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def forward(self, batch):
        return self.said


def test_the_loss_is_of_what_was_observed_and_forecasts_are_in_the_units_of_the_series(stations):
    task = task_of(stations)
    batch = task.collate(judged := task.judged("test")[:3])
    there, right = batch["target_mask"], batch["targets"]
    assert not there.all() and (right[~there] == 0).all()
    said = torch.where(there, right + 2, 50.0)
    assert float(task.loss(Said(said), batch)) == pytest.approx(4, rel=1e-5)
    for sample, one in zip(judged, task.predict(Said(said), batch), strict=True):
        known = np.isfinite(sample.target.values)
        off = (one.values - sample.target.values) / sample.inputs.record.scale[1]
        size = float(np.abs(sample.target.values / sample.inputs.record.scale[1])[known].max())
        assert error(off[known], 2.0, unit=max(size, 2.0)) <= SAME  # of values that were taken from each other
        assert error(one.times, sample.target.times) <= SAME
        assert task.score(sample, one)["mse"] == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("kind", ["time_attention", "patchtst", "dlinear"])
@torch.no_grad()
def test_what_fills_up_a_batch_changes_no_forecast(stations, kind):
    task = task_of(stations, dropout=0.0)
    torch.manual_seed(0)
    model, judged = task.reference(32, kind).eval(), task.judged("test")[:3]
    sizes = {len(sample.inputs.record.times) for sample in judged}
    together = task.predict(model, task.collate(judged))
    assert len(sizes) > 1
    for sample, one in zip(judged, together, strict=True):
        (alone,) = task.predict(model, task.collate([sample]))
        assert error(one.values, alone.values) < SAME


def test_a_season_before_is_what_was_nearest_a_horizon_before(stations):
    task = task_of(stations)
    for sample in task.judged("test")[:4]:
        table, record, row = task.table(sample), sample.inputs.record, 0
        for c, values in enumerate(record.values.T):
            seen = np.isfinite(values)
            for time in sample.target.times[np.isfinite(sample.target.values[:, c])]:
                nearest = np.abs(record.times[seen] - (time - 4)).argmin()
                want = (values[seen][nearest] - record.scale[0, c]) / record.scale[1, c]
                assert table.column("season")[row] == pytest.approx(want, rel=1e-5, abs=1e-5)
                row += 1
        assert row == len(table.targets)


def test_intervals_are_over_entities_where_there_are_many(stations):
    for task, many in ((IrregularForecast(**TINY, dataset="announced"), True), (task_of(stations), False)):
        judged = task.judged("test")
        assert {task.context(one) for one in judged} == {one.inputs.record.name if many else one.name for one in judged}


def test_scores_are_those_by_hand(stations):
    task = task_of(stations)
    sample = task.judged("test")[0]
    truth, scale = sample.target, sample.inputs.record.scale
    known = np.isfinite(truth.values)
    said = dataclasses.replace(truth, values=np.where(known, truth.values + scale[1] * 2, 1e9))
    assert task.score(sample, said) == {"mse": pytest.approx(4), "mae": pytest.approx(2)}  # what is missing is no error
    assert task.score(sample, truth) == {"mse": 0, "mae": 0}
    table = task.table(sample)
    assert len(table.targets) == known.sum() and np.isfinite(table.features).all()
    own = task.told(sample, table.targets)
    assert (
        task.score(sample, own)["mse"]
        < 1e-10
        < 1e-3
        < task.score(sample, task.told(sample, table.targets[::-1]))["mse"]
    )
    last = [row[np.isfinite(row)][-1] for row in sample.inputs.record.values.T]
    said = task.told(sample, table.column("last")).values[known]
    assert error(said, np.broadcast_to(last, known.shape)[known]) < SAME


def test_the_placebo_has_texts_of_other_times_of_the_same_part(stations):
    task = task_of(stations)
    for sample in task.judged("test"):
        own, placebo = sample.inputs.record.notes, sample.inputs.placebo
        whole = next(s.inputs.notes for s in task.samples("test") if s.name == sample.group)
        assert len(own) == len(placebo) and own != placebo and set(placebo) <= set(whole)
    batch = task.collate(task.judged("test"))
    assert batch["placebo"].shape == batch["notes"].shape and not torch.equal(batch["placebo"], batch["notes"])


def test_a_grid_carries_values_forward():
    values = torch.tensor([[[1.0], [2.0], [3.0]]])
    mask, times = torch.tensor([[[True], [False], [True]]]), torch.tensor([[-0.9, -0.6, -0.2]])
    there = torch.ones(1, 3, dtype=torch.bool)
    grid = carried_forward(values, mask, times, there, 4)  # ends at -0.75, -0.5, -0.25, 0
    assert grid[0, :, 0].tolist() == [1, 1, 1, 3]
    assert carried_forward(values, mask, times + 0.5, there, 4)[0, :, 0].tolist() == [0, 0, 1, 1]  # nothing before
    assert interpolated(grid, torch.tensor([[0.25, 0.875, 1.0, 2.0]]))[0, :, 0].tolist() == [1, 2, 3, 3]


@pytest.mark.parametrize("kind", ["time_attention", "patchtst", "dlinear"])
def test_a_level_that_is_added_is_forecast_too(stations, kind):
    task = task_of(stations, dropout=0.0)
    torch.manual_seed(0)
    model = task.reference(32, kind).eval()
    batch = task.collate(task.judged("test")[:2])
    seen = batch["mask"].float()
    moved = {**batch, "values": (batch["values"] + 3) * seen}
    assert error(model(moved), model(batch) + 3) < SAME
    assert error(model.backbone(moved["values"], batch["mask"], batch) + 3, model(moved)) > 1e-2


def test_grids_of_the_regular_forecasters():
    with torch.device("meta"):
        assert PatchTST(36, 2, 16, 1, 2, 32, 0.0).model.config.patch_length == 4
        assert DLinear(36, 8, 0.0).window % 2 == 1


def test_a_file_of_ones_own_is_forecast(stations, tmp_path):
    task = task_of(stations)
    sample = task.open(stations / "oak" / "time_series.csv")
    model = task.reference(32).eval()
    with torch.no_grad():
        (said,) = task.predict(model, task.collate([sample]))
    record = read_record(stations / "oak" / "time_series.csv")
    assert said.times.min() > record.times[-1] and said.times.max() <= record.times[-1] + 4.001
    text = str(said).splitlines()
    assert text[0] == "date_time,warm,wet" and len(text) == 1 + task.span.steps and text[1].startswith("2024-02-")
    bare = tmp_path / "mine.csv"  # no texts beside it
    bare.write_text((stations / "oak" / "time_series.csv").read_text())
    with torch.no_grad():
        assert task.predict(model, task.collate([task.open(bare)]))[0].variables == ("warm", "wet")
    bare.write_text("date_time,a\n" + "\n".join(f"2024-01-{d:02},{d}" for d in range(1, 20)))
    with pytest.raises(UserError, match="has 1 variables, the model forecasts 2"):
        task.collate([task.open(bare)])


@pytest.mark.parametrize(
    "text", ["", "when,a\n1,2\n", "date_time,a\n" + "2024-01-01,x\n" * 9, "date_time,a\n" + "soon,1\n" * 9]
)
def test_files_that_will_not_do(tmp_path, text):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=r"mine\.csv"):
        read_record(tmp_path / "mine.csv")
    with pytest.raises(UserError, match="no series that can be used"):
        task_of(tmp_path / "none").samples("train")


def test_observed_truth_and_forecast_are_drawn(stations):
    task = task_of(stations)
    judged = task.judged("test")
    pictures = task.pictures(judged, [task.truth(sample) for sample in judged])
    assert (
        len(pictures) == 2
        and pictures[0].kind == "lines"
        and list(pictures[0].rows) == ["observed", "truth", "forecast"]
    )
    observed, truth, forecast = np.array(pictures[0].values)
    assert np.isnan(truth[np.isfinite(observed)]).all() and np.isfinite(truth).any()
    assert np.array_equal(truth, forecast, equal_nan=True)  # what was said here is the truth
    x = np.array(pictures[0].columns, float)
    assert (x[np.isfinite(observed)] <= 0).all() and (x[np.isfinite(truth)] >= 0).all()


def test_embeddings_are_made_once():
    one, two = embedded(("rain tomorrow", "dry"), "words"), embedded(("dry", "rain tomorrow"), "words")
    assert torch.equal(one, two.flip(0)) and error(one.norm(dim=1), 1.0) < CLOSE
    assert float(one[0] @ embedded(("rain, tomorrow!",), "words")[0]) > 0.99 > 0.5 > float(one[0] @ one[1])


def test_shifts_of_the_made_set_are_announced():
    found = irregular("announced")
    assert len(found) == 12 and all(set(SETS) and len(one.notes) > 30 for one in found)
    right = []
    for one in found:
        for at, text in zip(one.note_times, one.notes, strict=True):
            before = np.nanmean(one.values[(one.times < at + 5) & (one.times > at), 0])
            after = np.nanmean(one.values[(one.times >= at + 5) & (one.times < at + 10), 0])
            if any(word in text for word in ("rise", "higher", "increase")):
                right.append(after > before)
            elif any(word in text for word in ("drop", "lower", "decrease")):
                right.append(after < before)
    assert np.mean(right) > 0.85  # of shifts that come close together some cancel


def test_forecasts_are_read_at_other_times():
    said = Forecast(("a",), np.array([1.0, 3.0]), np.array([[0.0], [4.0]]), 0.0)
    asked = Forecast(("a",), np.array([11.0, 12.0]), np.zeros((2, 1)), 10.0)
    assert said.at(asked)[:, 0].tolist() == [0, 2]


@pytest.mark.parametrize("fields", [{"dataset": "GDELT"}, {"days": -1.0}])
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(UserError):
        IrregularForecast(**fields)
