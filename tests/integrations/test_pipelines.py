# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines through the port: which step it is, which rows are which branch, and memory kept for each apart."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.strategy import AttentionWatch  # noqa: E402
from oracles.pipelines import dit, pixart, run_dit, run_pixart, run_wan, wan  # noqa: E402


class Note(AttentionWatch):
    """Writes down the facts of every call, and how often this branch of this site was called before."""

    def watch(self, call, out):
        kept = call.state.setdefault("seen", [])
        kept.append((call.diffusion, call.q.shape[0]))


def test_branches_in_one_batch():
    pipe = dit()
    plain, note = run_dit(pipe), Note()
    with manyheads.use(pipe, note) as port:
        assert (run_dit(pipe) == plain).all() and (run_dit(pipe) == plain).all()
    for kept in port.state(note).values():
        assert list(kept) == ["cond+uncond"]
        facts = [step for step, _ in kept["cond+uncond"]["seen"]]
        assert [step.index for step in facts] == [0, 1, 2, 3] * 2 and {step.total for step in facts} == {4}
        assert [step.run for step in facts] == [1] * 4 + [2] * 4 and facts[1].progress == 0.25
        assert facts[0].rows("cond", 4) == slice(0, 2) and facts[0].rows("uncond", 4) == slice(2, 4)
        assert facts[0].rows("perturbed", 4) == slice(0, 0)


def test_branches_one_after_the_other():
    pipe = wan()
    plain, note = run_wan(pipe), Note()
    before = dict(vars(pipe.transformer))
    with manyheads.use(pipe, note) as port:
        assert torch.equal(run_wan(pipe), plain)
    assert dict(vars(pipe.transformer)) == before and torch.equal(run_wan(pipe), plain)
    for kept in port.state(note).values():
        assert set(kept) == {"cond", "uncond"}
        for branch in kept.values():
            assert [step.index for step, _ in branch["seen"]] == [0, 1, 2, 3]
            assert all(
                len(step.branches) == 1 and step.rows(step.branches[0], 1) == slice(0, 1) for step, _ in branch["seen"]
            )


def test_without_guidance_there_is_one_branch():
    pipe = wan()
    note = Note()
    with manyheads.use(pipe, note) as port:
        run_wan(pipe, guidance=1.0)
    assert {branch for kept in port.state(note).values() for branch in kept} == {"cond"}
    unet = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        diffusers.DDPMScheduler(),
    )  # fmt: skip
    unet.set_progress_bar_config(disable=True)
    with manyheads.use(unet, note) as port:
        unet(num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0))
    kept = next(iter(port.state(note).values()))
    assert list(kept) == ["all"] and [step.index for step, _ in kept["all"]["seen"]] == [0, 1, 2]


def test_guidance_that_only_the_call_knows():
    """PixArt keeps its scale nowhere but in the call; the class of the pipeline comes back."""
    pipe, note, kind = pixart(), Note(), type(pixart())
    for scale, branches in ((4.0, "uncond+cond"), (1.0, "all")):
        with manyheads.use(pipe, note) as port:
            assert isinstance(pipe, kind)
            run_pixart(pipe, guidance=scale)
        assert type(pipe) is kind
        assert {branch for kept in port.state(note).values() for branch in kept} == {branches}
