# SPDX-License-Identifier: Apache-2.0
"""Tasks on sparse attention of videos: attention on what is read, and other ways to spend as few FLOPs."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, Pipeline, RunContext, run
from manyheads.integrations.diffusers_caches import KNOBS, diffusers_cache, magnitude_ratios
from manyheads.models.scenes import build
from manyheads.tasks.diffusion.attention_kept import AttentionKept
from manyheads.tasks.diffusion.equal_flops import FEWER, EqualFlops
from tolerance import nearly

PLAIN = Arm("plain")
SIZES = "block=32,samples=8,mass=1,from_tokens=0,most="
ARMS = (
    Arm("asa", f"video_blade:{SIZES}0.25"), Arm("all", f"video_blade:{SIZES}1"),
    Arm("window", f"video_blade.rival:{SIZES}0.25,by=window"),
    Arm("oracle", f"video_blade.rival:{SIZES}0.25,by=oracle"),
)  # fmt: skip


@pytest.fixture(scope="module")
def wan():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = build("moving3d", num_layers=3, num_attention_heads=1, attention_head_dim=16, ffn_dim=256)
        for name, weight in pipe.transformer.named_parameters():
            if "to_q" in name or "to_k" in name:
                weight.data *= 3  # attention that is not flat
    pipe.set_progress_bar_config(disable=True)
    return Pipeline("moving3d", pipe)


def measured(subject, task, arms, folder):
    experiment = Experiment(subject=subject, arms=arms, baseline=PLAIN, tasks=(task,), equal="none", seeds=1)
    rows = run(experiment.at("cpu"), folder).rows
    return {(row.arm, row.at.get("way", ""), row.metric): row.value for row in rows}


def test_attention_on_what_is_read(wan, tmp_path):
    found = measured(wan, AttentionKept(samples=1, steps=2, every=1), ARMS, tmp_path)
    assert found["all", "", "kept"] == nearly(1.0) and found["all", "", "read"] == 1.0
    for arm in ("asa", "window", "oracle"):
        assert found[arm, "", "read"] == 0.25
    assert 1 > found["oracle", "", "kept"] > max(found["asa", "", "kept"], found["window", "", "kept"]) > 0.2
    assert "no arm" in AttentionKept().unsupported_reason(RunContext(wan, (PLAIN,)))


@pytest.mark.slow
def test_ways_cost_no_more_than_the_arm(wan, tmp_path):
    found = measured(
        wan,
        EqualFlops(samples=1, steps=5, arm="asa", batch=1, caches=("first_block", "taylorseer")),
        ARMS[:2],
        tmp_path,
    )
    most = found["asa", "arm", "flops"]
    ways = {way for arm, way, _ in found if arm == "plain" and way != "arm"}
    assert ways == {FEWER, "first_block", "taylorseer"}
    for way in ways:
        assert (found["plain", way, "flops"] <= most) == (way != "taylorseer")  # which computes three steps of five
        assert found["plain", way, "flops"] < 1 and found["plain", way, "psnr"] < 100
    assert most < 1
    assert found["plain", "arm", "psnr"] == 100.0 and found["plain", "arm", "flops"] == 1.0
    assert found["all", "arm", "psnr"] > 80 and found["all", "arm", "flops"] > most
    assert "no arm" in EqualFlops(arm="other").unsupported_reason(RunContext(wan, (PLAIN,)))


def test_caches_act_and_leave_nothing_behind(wan):
    pipe, noise = wan.pipe, wan.pipe.noise(1, torch.Generator().manual_seed(0))

    def video():
        return pipe("fire, up, frog", latents=noise, num_inference_steps=6, output_type="pt").frames

    plain, ratios = video(), magnitude_ratios(pipe, video)
    assert len(ratios) == 6 and ratios[0] == 1.0 and all(0.5 < ratio < 2 for ratio in ratios)
    for name, knobs in KNOBS.items():
        with diffusers_cache(pipe, name, knobs[-1], 6, ratios):
            assert not torch.equal(video(), plain), name
        assert torch.equal(video(), plain), name
    with pytest.raises(UserError, match="takes no cache"), diffusers_cache(pipe, "another", 1, 6):
        pass


def test_on_the_model_that_ships():
    from manyheads.models.scenes import load_scenes

    pipe = load_scenes("moving3d")
    noise = pipe.noise(1, torch.Generator().manual_seed(0))
    made = []
    for spec in ("", "video_blade:block=16,samples=4,mass=1,most=1", "video_blade:block=16,samples=4"):
        with manyheads.use(pipe, spec) if spec else nullcontext():
            made.append(pipe("ghost, up", latents=noise, num_inference_steps=2, output_type="pt").frames)
    assert (made[1] - made[0]).abs().max() < 1e-4 < (made[2] - made[0]).abs().max()
