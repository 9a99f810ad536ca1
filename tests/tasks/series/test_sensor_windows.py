# SPDX-License-Identifier: Apache-2.0
"""Sensor windows: a folder of one's own, labels of windows, scores beside scikit-learn's, what a file is said."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from manyheads.attention.positions import sinusoids
from manyheads.data.sensors import _binned, read_csv
from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.series._window_classes import Judged, TemporalCNN, TemporalLSTM, WindowModel
from manyheads.tasks.series.sensor_windows import SensorWindows, _part
from tolerance import DEEP, is_close

TINY = {"dim": 8, "layers": 1, "heads": 2, "batch": 12, "frames": 10, "every": 5}


def write(path, labels, columns=3, pitch=0.1, head="label"):
    rows = [",".join([*"xyz"[:columns], head])]
    for i, label in enumerate(labels):
        rows.append(",".join([*(f"{np.sin(pitch * i * (c + 1)):.4f}" for c in range(columns)), label]))
    path.write_text("\n".join(rows))


@pytest.fixture
def folder(tmp_path):
    for i, person in enumerate(("ann", "bob", "cid", "dan", "eve")):
        for n in range(2):
            write(tmp_path / f"{person}_{n}.csv", ["rest"] * 14 + ["lift"] * 16, pitch=0.1 + 0.01 * i)
    return tmp_path


def task_of(folder, **fields):
    return SensorWindows(folder=str(folder), **{**TINY, **fields})


def test_a_folder_of_ones_own(folder):
    task = task_of(folder)
    assert task.classes == ("lift", "rest") and task.channels == ("x", "y", "z")
    people = [{s.group for s in task.samples(part)} for part in ("train", "validation", "test")]
    assert people == [{"ann", "bob", "cid"}, {"dan"}, {"eve"}]
    found = {s.name: s.target for s in task.samples("test")}
    assert len(found) == 10  # of 30 frames, every 5
    assert [found[f"eve_0 {a}"] for a in range(0, 25, 5)] == ["rest", "rest", "lift", "lift", "lift"]
    assert all(s.inputs.shape == (10, 3) for s in task.samples("train")) and task.context(task.samples("test")[0]) == ""
    drawn = task.draw(np.random.default_rng(0), task.samples("train"))
    many = [s.target for seed in range(40) for s in task.draw(np.random.default_rng(seed), task.samples("train"))]
    names = {s.name for seed in range(40) for s in task.draw(np.random.default_rng(seed), task.samples("train"))}
    assert names == {s.name for s in task.samples("train")}
    assert len(drawn) == 12 and abs(np.mean([t == "rest" for t in many]) - 0.5) < 2 * 0.5 / len(many) ** 0.5
    assert abs(np.mean([s.target == "rest" for s in task.samples("train")]) - 0.4) < 1e-9  # control: as they come


def test_intervals_count_people_where_several_are_tested(tmp_path):
    for i in range(10):
        write(tmp_path / f"p{i}_0.csv", ["a"] * 10 + ["b"] * 10)
    task = task_of(tmp_path)
    assert {task.context(s) for s in task.samples("test")} == {"p8", "p9"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: [p.unlink() for p in f.glob("*.csv")], "holds no recording"),
        (lambda f: [p.unlink() for p in f.glob("[abc]*.csv")], "three are needed"),
        (lambda f: write(f / "ann_3.csv", ["rest"] * 20, columns=2), "other columns"),
        (lambda f: write(f / "ann_3.csv", ["1"] * 20, head="extra"), "no column named label"),
        (lambda f: (f / "ann_3.csv").write_text("x,y,z,label\n1,2,?,rest"), "a number for each sensor"),
        (lambda f: (f / "ann_3.csv").write_text("x,y,z,label\n1,2,nan,rest"), "finite"),
        (lambda f: (f / "ann_3.csv").write_text("x,y,z,label"), "no rows"),
    ],
)
def test_a_folder_that_will_not_do(folder, change, words):
    change(folder)
    with pytest.raises(UserError, match=words):
        task_of(folder).samples("train")


def test_recordings_that_are_too_short(folder):
    with pytest.raises(UserError, match="has 31 frames"):
        task_of(folder, frames=31).samples("train")


def test_a_file_is_judged_window_by_window(folder, tmp_path):
    task, path = task_of(folder), tmp_path / "own" / "mine.csv"
    path.parent.mkdir()
    write(path, ["?"] * 30, head="other")
    with pytest.raises(UserError, match="a number for each sensor"):
        task.open(path)
    path.write_text("x,y,z\n" + "\n".join("1,2,3" for _ in range(30)))
    batch = task.collate([task.open(path), task.open(path)])
    assert batch["inputs"].shape == (10, 10, 3) and batch["starts"] == [(0, 5, 10, 15, 20)] * 2
    torch.manual_seed(0)
    model = task.reference(8).eval()
    said = task.predict(model, batch)
    assert len(said) == 2 and str(said[0]) == str(said[1]) and said[0].log_probs.shape == (5, 2)
    path.write_text("x,y,z\n1,2,3")
    with pytest.raises(UserError, match="fewer than the 10 frames"):
        task.collate([task.open(path)])
    path.write_text("x,y\n" + "1,2\n" * 30)
    with pytest.raises(UserError, match="other columns"):
        task.collate([task.open(path)])


def test_what_is_said_of_a_recording_is_written_as_spans():
    sure = torch.tensor([[0.0, -9], [0.0, -9], [-9, 0.0], [0.0, -9]])
    assert str(Judged(sure, ("lift", "rest"), (0, 5, 10, 15))) == "lift from 0, rest from 10, lift from 15"
    assert str(Judged(sure[2:3], ("lift", "rest"))) == "rest"


def test_scores_have_the_means_of_scikit_learn(folder):
    task, rng = SensorWindows(**TINY), np.random.default_rng(3)
    classes = task.classes
    true = rng.choice(5, 200, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    log_probs = torch.from_numpy(rng.standard_normal((200, 5))).log_softmax(1)
    log_probs[np.arange(200), true] += 1.0
    told = log_probs.argmax(1).numpy()
    samples = [Sample(str(i), "g", "test", None, classes[k]) for i, k in enumerate(true)]
    rows = task.scores(samples, [Judged(row[None], classes) for row in log_probs])
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    assert found["macro_f1"].mean() == pytest.approx(f1_score(true, told, average="macro"), rel=1e-12)
    assert found["balanced_accuracy"].mean() == pytest.approx(balanced_accuracy_score(true, told), rel=1e-12)
    assert abs(found["macro_f1"].mean() - np.mean(true == told)) > 0.02  # control: which is another number
    assert found["label_nll"].mean() == pytest.approx(-float(log_probs[np.arange(200), true].mean()))
    picked = [rng.integers(0, 200, 200) for _ in range(400)]  # the values' spread is the bootstrap's of the F1 itself
    for name, score in (
        ("macro_f1", partial(f1_score, average="macro")),
        ("balanced_accuracy", balanced_accuracy_score),
    ):
        spread = np.std([score(true[i], told[i]) for i in picked])
        assert found[name].std() / 200**0.5 == pytest.approx(spread, rel=0.15)


def test_a_windows_value_is_the_mean_and_what_it_adds_to_its_deviation():
    """The derivative of the score by how much the window counts, by differences."""
    task, rng, n, step = SensorWindows(**TINY), np.random.default_rng(4), 30, 1e-6
    true, told = rng.integers(0, 3, n), rng.integers(0, 3, n)
    samples = [Sample(str(i), "g", "test", None, task.classes[k]) for i, k in enumerate(true)]
    rows = task.scores(samples, [Judged(torch.eye(5)[k : k + 1], task.classes) for k in told])
    for name, score in (
        ("macro_f1", partial(f1_score, average="macro")),
        ("balanced_accuracy", balanced_accuracy_score),
    ):
        for i in range(n):
            more, less = (score(true, told, sample_weight=1 + d * np.eye(n)[i]) for d in (step, -step))
            slope = n * (more - less) / (2 * step)
            assert rows[i][name] - score(true, told) == pytest.approx(slope, abs=1e-6)


def test_the_reference_models_are_their_formulas():
    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, 4, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool)
    lstm, cnn = TemporalLSTM(4, 5, 0.0).double().eval(), TemporalCNN(4, 5, 0.0).double().eval()
    h = x + lstm.lstm(lstm.norm(x))[0]
    assert is_close(lstm(x, mask), h + lstm.mlp(h), DEEP)
    want = torch.zeros_like(x)
    for t in range(6):
        for s in range(max(0, t - 3), min(6, t + 4)):
            want[:, t] += cnn.conv.weight[:, 0, s - t + 3] * x[:, s]
    assert is_close(cnn(x, mask), x + cnn.mlp(want + cnn.conv.bias), DEEP)
    for positions in (True, False):
        model = WindowModel([lstm], 3, 4, 5, 0.0, positions).double().eval()
        frames = torch.randn(2, 6, 3, dtype=torch.float64)
        read = model.project(frames / (1 + model.scale.eps) ** 0.5) + positions * sinusoids(torch.arange(6), 4).double()
        assert is_close(model(frames), model.head(model.norm(lstm(read, mask)).mean(1)), DEEP)


def test_a_model_that_never_says_a_class_has_no_f1_of_it():
    task = SensorWindows(**TINY)
    samples = [Sample(str(i), "g", "test", None, task.classes[i % 2]) for i in range(6)]
    said = [Judged(torch.eye(5)[:1].log_softmax(1), task.classes)] * 6
    rows = task.scores(samples, said)
    assert np.mean([row["macro_f1"] for row in rows]) == pytest.approx((2 * 3 / 9) / 2)
    assert np.mean([row["balanced_accuracy"] for row in rows]) == pytest.approx(0.5)


def test_confusions_are_counted():
    task = SensorWindows(**TINY)
    samples = [Sample(str(i), "g", "test", None, task.classes[k]) for i, k in enumerate((0, 0, 1, 1))]
    said = [Judged(torch.eye(5)[k : k + 1], task.classes) for k in (0, 1, 1, 1)]
    confusion, scores = task.pictures(samples, said)
    assert confusion.values[0][:2] == [0.5, 0.5] and confusion.values[1][1] == 1
    assert scores.values[1] == pytest.approx([2 / 3, 1, 0.8]) and scores.values[4] == [0, 0, 0]


def test_frames_are_means_of_what_was_measured():
    times, values = np.array([0.0, 10, 19, 21, 70]), np.array([[1.0], [2], [3], [10], [5]])
    edges = np.array([0.0, 20, 40, 60, 80])
    assert _binned(times, values, edges)[:, 0].tolist() == [2, 10, 7.5, 5]


def test_people_of_the_public_set_are_parted_by_number():
    found = [_part(f"s{number:02}") for number in range(1, 24)]
    assert found == ["train"] * 11 + ["validation"] * 4 + ["test"] * 8


def test_a_recording_of_ones_own_is_read():
    found = read_csv("a", "p", "x,label,y\n1,up,2\n3,down,4\n")
    assert found.values.tolist() == [[1, 2], [3, 4]] and found.labels == ("up", "down") and found.channels == ("x", "y")
