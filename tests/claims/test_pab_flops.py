# SPDX-License-Identifier: Apache-2.0
"""What the claim of PAB says of FLOPs: counted, not computed by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads import claims
from manyheads.models.scenes import load_scenes


@pytest.mark.slow
def test_uniform_costs_no_more_than_the_pyramid_and_the_reversed_as_much():
    plan, pipe = claims.load("pab").experiment.at("quick"), load_scenes("moving")
    noise = pipe.noise(1, torch.Generator().manual_seed(0))

    def flops(arm):
        counter = FlopCounterMode(display=False)
        with counter, manyheads.use(pipe, *arm.strategies):
            pipe("ghost down frog", latents=noise, num_inference_steps=40, guidance_scale=3.0, output_type="pt")
        return counter.get_total_flops()

    spent = {arm.name: flops(arm) for arm in plan.arms if arm.spec}
    assert spent["uniform"] < spent["pyramid"] <= spent["reversed, equal FLOPs"] < 1.02 * spent["pyramid"]
    assert spent["reversed, equal modules"] < spent["pyramid"]  # which is why the other one is there
