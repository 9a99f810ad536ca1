# SPDX-License-Identifier: Apache-2.0
"""A new object: errors by hand, an emoji for each seed, the better of the rates, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from manyheads import UserError
from manyheads.data import scenes
from manyheads.experiment import Arm, Experiment, Sizes, run
from manyheads.models.scenes import build
from manyheads.recipes.new_object import Pictures
from manyheads.tasks.training import new_object
from manyheads.tasks.training.new_object import NewObject, _errors
from tolerance import SAME, assert_close

BASE = Arm("as it is")
HERE = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")


def small(*_):
    torch.manual_seed(0)
    return build("unet", block_out_channels=(8, 8), norm_num_groups=4)


def test_errors_by_hand():
    """A model that predicts nothing errs by the noise, where the object covers."""
    pipe = small()
    pipe.unet.conv_out.weight.data.zero_()
    pipe.unet.conv_out.bias.data.zero_()
    alpha = torch.zeros(2, 1, 32, 32)
    alpha[0, :, 4:10, 6:8], alpha[1, :, 20:, 20:] = 1, 0.5
    given = Pictures(torch.rand(2, 3, 32, 32), torch.zeros(2, 3, dtype=torch.long), alpha)
    for inside in (True, False):
        got = _errors(pipe, given, torch.Generator().manual_seed(3), inside)
        source, want = torch.Generator().manual_seed(3), torch.zeros(2)
        for _ in range(5):
            noise = torch.nn.functional.pixel_shuffle(torch.randn(2, 12, 16, 16, generator=source), 2)
            cover = alpha.expand(-1, 3, -1, -1) if inside else torch.ones(2, 3, 32, 32)
            want += (cover * noise.square()).sum((1, 2, 3)) / cover.sum((1, 2, 3)) / 5
        assert_close(got, want, SAME)


@pytest.mark.slow
@HERE
def test_every_seed_learns_its_object_at_the_better_rate(tmp_path, monkeypatch):
    seen = []

    def train(pipe, strategy, shown, steps, rate, batch, seed):
        seen.append((strategy.spec, rate, seed, float(shown.images.sum())))
        return SimpleNamespace(rate=rate, parameters=lambda: [torch.zeros(5)]), None

    def errors(pipe, given, generator, inside):
        return torch.full((len(given.images),), pipe.rate if pipe.rate is not None else 9.0)

    class Opened:
        def __init__(self, denoiser, adaptor):
            self.rate = adaptor.rate

        def __enter__(self):
            pipe.rate = self.rate

        def __exit__(self, *_):
            pipe.rate = None

    pipe = small()
    object.__setattr__(pipe, "rate", None)
    for name, made in (("train", train), ("_errors", errors), ("adapted", Opened), ("load_scenes", lambda *_: pipe)):
        monkeypatch.setattr(new_object, name, made)
    task = NewObject(rates=(0.3, 0.1, 0.2), samples=4, shown=2)
    arms = (Arm("ours", "comcat.adaptor"), Arm("lora", "comcat.lora"))
    experiment = Experiment(subject="trainable", arms=arms, baseline=BASE, tasks=(task,), seeds=2, sizes=Sizes(cpu={}))
    rows = run(experiment.at("cpu"), tmp_path).rows
    assert len(seen) == 2 * 2 * 3
    shown = {(seed, total) for _, _, seed, total in seen}
    assert len(shown) == 2  # the same pictures for all arms, others for another seed
    found = {(row.metric, row.arm): row.value for row in rows}
    assert found["object_error", "ours"] == pytest.approx(0.1) and found["object_error", "as it is"] == 9
    assert found["trained", "lora"] == 5 and found["trained", "as it is"] == 0
    assert len(rows) == 2 * 3 * (1 + 2 * 4)


@HERE
def test_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(new_object, "load_scenes", small)
    task = NewObject(rates=(0.01,), samples=4, shown=2, steps=2, batch=2)
    arms = (Arm("ours", "comcat.adaptor"),)
    experiment = Experiment(subject="trainable", arms=arms, baseline=BASE, tasks=(task,), seeds=1, sizes=Sizes(cpu={}))
    rows = {(r.metric, r.arm, r.sample): r.value for r in run(experiment.at("cpu"), tmp_path).rows}
    assert rows["object_error", "ours", "0"] != rows["object_error", "as it is", "0"]
    assert rows["object_error", "ours", "0"] == pytest.approx(rows["object_error", "as it is", "0"], rel=0.2)


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="count from 1"):
        NewObject(shown=0)
    arms = (Arm("other", "softmax"),)
    experiment = Experiment(subject="trainable", arms=arms, baseline=BASE, tasks=(NewObject(),), sizes=Sizes(cpu={}))
    with pytest.raises(UserError, match="give comcat"):
        run(experiment.at("cpu"), tmp_path)
