# SPDX-License-Identifier: Apache-2.0
"""Tasks on images: the same noise for every arm, the plain image at no distance, and figures that see a difference."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.experiment import Arm, Experiment, Pipeline, RunContext, run
from manyheads.models.judge import frechet
from manyheads.models.scenes import load_scenes
from manyheads.tasks.diffusion.fidelity import Fidelity
from manyheads.tasks.diffusion.kept_background import KeptBackground, kept
from manyheads.tasks.diffusion.module_change import ModuleChange
from manyheads.tasks.diffusion.scene_quality import pseudo_values
from tolerance import is_close, is_far, nearly

PLAIN = Arm("plain")
PAB = Arm("pab", "pab:spatial=2,temporal=2,cross=2,upper=900,lower=100")


@pytest.fixture(scope="module")
def moving():
    return Pipeline("moving", load_scenes("moving"))


def measured(subject, task, arms, folder):
    experiment = Experiment(subject=subject, arms=arms, baseline=PLAIN, tasks=(task,), equal="steps", seeds=1)
    return run(experiment.at("cpu"), folder).rows


@pytest.mark.slow
def test_fidelity_is_of_the_same_noise(moving, tmp_path):
    task = Fidelity(samples=2, steps=8, batch=1)
    rows = measured(moving, task, (PAB, Arm("nothing", "pab:upper=1,lower=0")), tmp_path)
    by = {(row.arm, row.sample, row.metric): row.value for row in rows}
    for sample in ("0", "1"):
        assert by["plain", sample, "psnr"] == by["nothing", sample, "psnr"] == 100.0  # no step lies in the range
        assert by["nothing", sample, "largest"] == 0.0
        assert by["pab", sample, "psnr"] < 60 and by["pab", sample, "largest"] > 0.01  # control: reuse shows
    made = RunContext(moving, (PLAIN,))
    whole = task.images(made, PLAIN, 0, 0, 2)
    alone = task.images(made, PLAIN, 0, 1, 2)
    assert is_close(whole[1:], alone)  # an image does not depend on its batch
    assert is_far(whole[:1], whole[1:])
    assert is_far(whole, task.images(made, PLAIN, 1, 0, 2))  # another seed


def test_change_has_a_figure_of_every_kind_and_part(moving, tmp_path):
    rows = measured(moving, ModuleChange(samples=1, steps=12, batch=1), (), tmp_path)
    kinds = {(row.at["kind"], row.at["part"]) for row in rows}
    assert kinds == {(k, p) for k in ("spatial", "temporal", "cross") for p in ("first", "middle", "last")}
    assert all(row.value > 0 for row in rows)


def test_what_is_kept_is_looked_at_outside_both_quarters():
    source, places = torch.rand(1, 3, 8, 8), torch.tensor([[0, 3]])
    inside = source.clone()
    inside[..., :4, :4] += 1
    inside[..., 4:, 4:] += 1
    assert float(kept(source, inside, places)) == nearly(100.0)
    outside = source.clone()
    outside[..., :4, 4:] += 0.1
    assert float(kept(source, outside, places)) == pytest.approx(23.0, abs=0.1)  # half of what counts is 0.1 off


def test_pipelines_without_known_contents_are_refused(moving):
    assert "contents" in KeptBackground().unsupported_reason(RunContext(moving, (PLAIN,)))


def test_pseudo_values_are_of_the_distance():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, 3, generator=generator)
    near, far = torch.randn(60, 3, generator=generator), torch.randn(60, 3, generator=generator) + 1.0
    for features in (near, far):
        values = pseudo_values(features, truth)
        assert abs(float(values.mean()) - frechet(features, truth)) < 0.2
    assert pseudo_values(near, truth).mean() < frechet(near, truth)  # the bias of few is taken off
    gap = pseudo_values(far, truth) - pseudo_values(near, truth)
    assert float(gap.mean()) > 4 * float(gap.std()) / 60**0.5  # and the farther set is told apart
