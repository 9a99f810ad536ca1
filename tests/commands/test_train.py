# SPDX-License-Identifier: Apache-2.0
"""The verbs `train` and `predict` as they are typed, on a folder of one's own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import manyheads
from manyheads import catalog, comparison_field
from manyheads.cli import main
from manyheads.errors import UserError
from manyheads.tasks._field import FieldTask
from manyheads.tasks.vision._detection_task import Detections, DetectionTask
from tiny.recordings import digits, write

__all__ = ["digits"]
TASK = "digit_strings:dim=16,layers=1,heads=2,batch=2,digits=2,rates=0.003,samples_judged=4"
SPEC = "branchformer:merge=learned,kernel=3"


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_train_then_predict(cli, digits, tmp_path, monkeypatch):
    options = ("--task", TASK, "--data", str(digits), "--seeds", "2", "--budget", "4", "--out", "run")
    measure, done = FieldTask.measure, []

    def once(self, run, unit):
        if done:
            raise KeyboardInterrupt
        done.append(unit)
        return measure(self, run, unit)

    monkeypatch.setattr(FieldTask, "measure", once)
    code, _, err = cli("train", SPEC, *options)
    assert code == 130 and "interrupted" in err
    monkeypatch.setattr(FieldTask, "measure", measure)
    code, out, err = cli("train", "--resume", "run")
    assert code == 0 and "word error rate" in out and "parameters" in out and "models: run/models/" in out
    assert err.count("training") < 4  # the first unit was not done again
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Learning curves", "digits", "learned weights of the branches", "All figures"):
        assert f">{title}<" in page, title

    code, out, err = cli("train", "--resume", "run", "--json")
    found = json.loads(out)
    assert code == 0 and err == "" and found["finished"] and found["kind"] == "field"
    assert [arm["arm"] for arm in found["arms"]] == ["conformer", SPEC]
    sizes = [arm["figures"]["digit_strings.parameters"]["estimate"]["value"] for arm in found["arms"]]
    assert abs(sizes[1] / sizes[0] - 1) <= 0.02
    steps = found["experiment"]["tasks"]["digit_strings"]["steps"]
    assert steps == "2"  # four samples, two a step

    write(tmp_path / "mine.wav", rate=44100)
    model = next((tmp_path / "run" / "models").glob("branchformer*/seed-1"))
    code, out, _ = cli("predict", str(model), "mine.wav", str(digits / "0_ann_0.wav"), "--json")
    said = json.loads(out)
    assert code == 0 and [one["file"] for one in said] == ["mine.wav", str(digits / "0_ann_0.wav")]
    loaded = manyheads.load(model)
    assert [str(one) for one in loaded.predict([tmp_path / "mine.wav"])] == [said[0]["said"]]
    assert loaded.recipe.spec == SPEC and loaded.task.folder == str(digits)
    code, out, _ = cli("predict", "run/models/conformer/seed-0", "mine.wav")
    assert code == 0 and "reference on digit_strings" in " ".join(out.split())

    for wrong, hint in (
        (("predict", "run/models/conformer/seed-0", "mine.wav", "--pictures", "drawn"), "draws nothing"),
        (("predict", "run", "mine.wav"), "run/models/"),
        (("predict", str(model), "none.wav"), "none.wav does not exist"),
        (("predict", str(model), str(model / "training.json")), "no WAV file"),
        (("train", "--resume", "run", "--seeds", "3"), "leave --seeds away"),
        (("compare", "--resume", "run"), "no run of manyheads compare"),
    ):
        code, out, err = cli(*wrong)
        assert code == 2 and out == "" and hint in err and err.count("\n") == 1, err


def test_predictions_are_drawn_on_photographs(cli, tmp_path, monkeypatch):
    fields = "dataset=planted,dim=16,layers=1,heads=2,batch=2,steps=1,samples_judged=2,rates=0.003"
    assert (
        cli("train", "detimbalance:mosaic=0", "--task", f"object_detection:{fields}", "--seeds", "1", "--out", "run")[0]
        == 0
    )
    for i, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (80, 60), (0, 0, 90 * i)).save(tmp_path / folder / "same.png")
    (model,) = (tmp_path / "run" / "models").glob("detimbalance*/seed-0")
    said = Detections(torch.tensor([[5.0, 30, 40, 50]]), ("disc",), torch.tensor([0.9]))
    monkeypatch.setattr(DetectionTask, "predict", lambda self, model, batch: [said] * len(batch["images"]))
    code, out, _ = cli("predict", str(model), "one/same.png", "two/same.png", "--pictures", "drawn", "--json")
    assert code == 0 and [one["said"] for one in json.loads(out)] == ["1 disc: disc 0.90 (5, 30, 40, 50)"] * 2
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["same-2.png", "same.png"]
    first, second = (np.array(Image.open(tmp_path / "drawn" / name)) for name in ("same.png", "same-2.png"))
    assert first.shape == (60, 80, 3) and first[40, 5].any() and not first[40, 20].any()
    assert tuple(second[40, 20]) == (0, 0, 90) and tuple(second[40, 5]) == tuple(first[40, 5])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((), "say which papers"),
        (("snapkv",), "no recipe of a field"),
        (("branchfromer",), "did you mean branchformer"),
        (("branchformer", "--task", "perplexity"), "no task of a field"),
        (("branchformer", "--task", "digit_string"), "did you mean digit_strings"),
        (("branchformer", "--budget", "soon"), "a budget is"),
        (("branchformer", "--data", "nowhere"), "holds no recording"),
        (("branchformer", "--task", "digit_strings:digits=0"), "digits count"),
    ],
)  # fmt: skip
def test_errors_are_one_line(cli, arguments, hint):
    code, out, err = cli("train", *arguments, "--out", "run")
    assert code == 2 and out == "" and hint in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_a_budget_in_time_becomes_steps(digits):
    plan = comparison_field.plan_field([SPEC], TASK, digits, 1).at("cpu")
    steps = [comparison_field._affordable(plan, seconds, 0, "cpu") for seconds in (2, 2000)]
    assert 1 <= steps[0] < steps[1]


def test_load_tells_slugs_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gist").mkdir()
    assert manyheads.load("gist") is catalog.load("gist")
    with pytest.raises(UserError, match="no trained model"):
        manyheads.load(tmp_path)
    with pytest.raises(UserError, match="no trained model"):
        manyheads.load("./gist")


def test_tasks_say_what_their_data_are(cli, monkeypatch, tmp_path):
    code, out, _ = cli("tasks", "--field", "speech", "--json")
    row = next(row for row in json.loads(out) if row["task"] == "digit_strings")
    assert code == 0 and row["licence"] == "CC BY-SA 4.0" and "digit_speaker_number" in row["folder"]
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = cli("tasks", "--field", "speech", "--json")
    told = [row["absent"] for row in json.loads(out) if "licence" in row]
    assert len(told) > 1 and all("https://" in absent and "--data DIR" in absent for absent in told)
    code, out, _ = cli("tasks", "--field", "text", "--json")
    assert code == 0 and not any("licence" in row for row in json.loads(out))
