# SPDX-License-Identifier: Apache-2.0
"""Saliency maps and seconds of encoders of images: every value by hand on a tiny model, and what is left out."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

import manyheads
from manyheads import UserError
from manyheads.experiment import Arm, Experiment, Sizes, Vision, run
from manyheads.experiment.subjects import ConvertibleVision, subject
from manyheads.models.saliency import FILE, SaliencyDecoder, load_decoder, normalised
from manyheads.tasks.vision import saliency
from manyheads.tasks.vision.encoder_cost import EncoderCost
from manyheads.tasks.vision.saliency import Saliency
from tiny.image_encoders import build, images
from tolerance import SAME, assert_close

ARMS = (
    Arm("hq", "segformer_pp:refuse=never"), Arm("tome", "tome:share=0.3"), Arm("small", options={"downsampled": 0.5}),
    Arm("off", "segformer_pp:ratio=0"), Arm("refused", "segformer_pp"),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model with a decoder, and photographs that are drawn."""
    build("dinov2").float().save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    weights = {f"decoder.{k}": v for k, v in SaliencyDecoder((16, 8, 6, 4)).state_dict().items() if "num" not in k}
    weights["decoder.final_conv.weight"] *= 30  # far from the middle of the sigmoid
    save_file(weights, tmp_path / "model" / FILE)
    monkeypatch.setattr(saliency.street_photographs, "available", lambda: True)
    monkeypatch.setattr(
        saliency.street_photographs, "photographs", lambda side, count: images(count, side, side).float().sigmoid()
    )
    return tmp_path


def ran(folder, task, arms=ARMS, **sizes):
    experiment = Experiment(subject=str(folder / "model"), arms=arms, tasks=(task,), sizes=Sizes(cpu=sizes))
    results = run(experiment.at("cpu"), folder / "run")
    return {(r.metric, r.arm, r.sample): r for r in results.rows}


@torch.no_grad()
def test_maps_by_hand(folder):
    rows = ran(folder, Saliency(samples=3, side=16, batch=2), ARMS[:4])
    assert len(rows) == 3 * (3 * 5 - 1)  # a smaller image has other patches
    model, decoder = Vision(str(folder / "model")), load_decoder(folder / "model")
    model.load("cpu")
    photos = images(3, 16, 16).float().sigmoid()

    def mapped(spec, given=photos, grid=8):
        with manyheads.use(model.model, *([spec] if spec else [])):
            hidden = model.model(pixel_values=normalised(given)).last_hidden_state[:, 1:]
        return decoder(hidden, (grid, grid), (16, 16)), hidden

    plain, patches = mapped("")
    small = torch.nn.functional.avg_pool2d(photos, 2)
    for arm, (found, made) in {
        "full": (plain, patches), "hq": mapped(ARMS[0].spec), "tome": mapped(ARMS[1].spec),
        "small": mapped("", small, 4), "off": (plain, patches),
    }.items():  # fmt: skip
        for i in range(3):
            one, other = found[i], plain[i]
            overlap = torch.minimum(one, other).sum() / torch.maximum(one, other).sum()
            centred, plainly = one - one.mean(), other - other.mean()
            correlation = (centred * plainly).sum() / (centred.norm() * plainly.norm())
            assert_close(rows["overlap", arm, f"{i}"].value, overlap, SAME)
            assert_close(rows["correlation", arm, f"{i}"].value, correlation, 100 * SAME)
            if arm != "small":
                cosine = ((made[i] * patches[i]).sum(1) / made[i].norm(dim=1) / patches[i].norm(dim=1)).mean()
                assert_close(rows["patches", arm, f"{i}"].value, cosine, SAME)
    assert all(rows["overlap", arm, f"{i}"].value == 1 for arm in ("full", "off") for i in range(3))
    assert all(rows["overlap", arm, f"{i}"].value < 0.999 for arm in ("hq", "small") for i in range(3))


def test_arms_that_are_conversions(folder, monkeypatch):
    """Calibrated on photographs that are not judged; one of full rank changes nothing."""
    shown = []

    def photographs(split):
        shown.append(split)
        return [(images(4, 32, 32, seed=len(split)).float().sigmoid() * 255).to(torch.uint8) for _ in range(2)]

    monkeypatch.setattr(saliency.scenes, "available", lambda: True)
    monkeypatch.setattr(saliency.scenes, "photographs", photographs)
    arms = (Arm("same", "comcat:keep=1"), Arm("half", "comcat:keep=0.5"), Arm("svd", "low_rank:keep=0.5"))
    task = Saliency(samples=3, side=16, batch=2, photographs="objects", calibrating=4)
    subject = ConvertibleVision(str(folder / "model"))
    results = run(Experiment(subject=subject, arms=arms, tasks=(task,), sizes=Sizes(cpu={})).at("cpu"), folder / "run")
    rows = {(r.metric, r.arm, r.sample): r.value for r in results.rows}
    assert shown == ["test", "train", "train", "train"]
    assert all(rows["overlap", "same", f"{i}"] == pytest.approx(1, abs=1e-4) for i in range(3))
    assert all(rows["overlap", "half", f"{i}"] < 0.9999 for i in range(3))
    assert rows["parameters", "same", "model"] == 1 > rows["parameters", "half", "model"] > 0.5
    assert rows["parameters", "half", "model"] == pytest.approx(rows["parameters", "svd", "model"], abs=0.01)
    assert subject.unsupported_reason(manyheads.parse("tome"))


def test_seconds_of_every_size_and_nothing_of_what_is_refused(folder, caplog):
    rows = ran(folder, EncoderCost(sides=(16, 24), rounds=2))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("pixels has no seconds: segformer_pp: merging" in line for line in said)
    assert {(arm, row.at["side"]) for (_, arm, _), row in rows.items()} <= {
        (arm, side) for arm in ("full", "hq", "tome", "small", "off") for side in (16, 24)
    }
    assert len(rows) == 2 * 5 and all(row.value > 0 for row in rows.values())


def test_what_is_left_out(folder):
    with pytest.raises(UserError, match="seconds are compared on cuda alone"):
        ran(folder, EncoderCost(device="cuda"), ARMS[:1])
    (folder / "model" / FILE).unlink()
    with pytest.raises(UserError, match="by which patches become a map"):
        ran(folder, Saliency(samples=1, side=16), ARMS[:1])


def test_a_size_that_the_model_does_not_take(tmp_path):
    build("vit").float().save_pretrained(tmp_path)
    vision = Vision(str(tmp_path))
    vision.load("cpu")
    with pytest.raises(UserError, match="takes no images of 24 pixels"):
        vision.encode(images(1, 24, 24).float())
    assert torch.isfinite(vision.encode(images(1, 16, 16).float()).last_hidden_state).all()


def test_the_subject(folder):
    one = subject(str(folder / "model"))
    assert isinstance(one, Vision) and one.described() == {"kind": "vision", "name": str(folder / "model")}
    transformers.LlamaConfig().save_pretrained(folder / "text")
    assert [subject(name).kind for name in ("dinov2-small", "default", "gemma3-270m", str(folder / "text"))] == [
        "vision", "causal_lm", "causal_lm", "causal_lm",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="load the subject first"):
        _ = one.model
    assert one.__getstate__()["_model"] is None
    with pytest.raises(UserError, match="already loaded"):
        Vision("x", torch.nn.Linear(1, 1)).__getstate__()
    for spec, fits in (("tome", True), ("segformer_pp", True), ("snapkv", False), ("pab", False), ("softmax", False)):
        assert (one.unsupported_reason(manyheads.parse(spec)) is None) == fits


def test_compare_takes_it(folder):
    from manyheads.comparison import plan

    found = plan(subject(str(folder / "model")), ["segformer_pp:refuse=never", "tome"]).at("cpu")
    assert [task.key for task in found.tasks] == ["saliency", "encoder_cost"]
    assert [arm.key for arm in found.arms] == ["full", "segformer_pp:refuse=never", "tome"]
