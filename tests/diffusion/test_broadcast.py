# SPDX-License-Identifier: Apache-2.0
"""What claim and benchmark of PAB rest on: counts, costs and distances by hand, and diffusers' own beside ours."""

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from benchmarks.pab_peers import apart, diffusers_pab, flops

import manyheads
from manyheads.claims.pab import SETS
from manyheads.models.scenes import build, load_scenes
from manyheads.tasks.diffusion.denoising_cost import KINDS, computed
from manyheads.tasks.diffusion.fidelity import psnr
from tolerance import error

CAPTIONS = torch.tensor([[1, 13, 17], [2, 14, 18]])
STEPS, UPPER, LOWER = 20, 720, 150  # the range begins at step 6
TOKENS = 2 * 2 * 8 * 64  # rows with and without captions, of all frames


def video_pipeline():
    torch.manual_seed(0)
    pipe = build("moving", num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe):
    noise = pipe.noise(2, torch.Generator().manual_seed(1))
    return pipe(CAPTIONS, num_inference_steps=STEPS, latents=noise, output_type="pt").frames


def ours(pipe, spatial=2, temporal=3, cross=6):
    return manyheads.use(pipe, f"pab:spatial={spatial},temporal={temporal},cross={cross},upper={UPPER},lower={LOWER}")


def test_what_is_run_is_counted_and_costs_what_its_products_cost():
    pipe = video_pipeline()
    with computed(pipe.transformer) as counts:
        run(pipe)
    assert counts == dict.fromkeys(KINDS, STEPS * TOKENS)
    with computed(pipe.transformer) as counts, ours(pipe):
        run(pipe)
    inside = [i for i, t in enumerate(pipe.scheduler.timesteps.tolist()) if LOWER < t < UPPER]
    assert inside[0] == 6
    for kind, n in zip(KINDS, (2, 3, 6), strict=True):
        assert counts[kind] == TOKENS * (STEPS - sum(step % n != 0 for step in inside))
    found, tokens, width = flops(pipe, pipe.noise(1)), 8 * 64, 16
    assert found["spatial"] == 2 * tokens * (4 * width**2 + 2 * 64 * width)
    assert found["temporal"] == 2 * tokens * (4 * width**2 + 2 * 8 * width)
    assert found["cross"] == 2 * (2 * tokens * width**2 + 2 * 8 * 3 * width**2 + 2 * tokens * 3 * width)
    assert found["model"] > sum(found[kind] for kind in KINDS)


def test_the_reversed_set_of_the_claim_costs_as_many_flops():
    """Of all reversed sets up to 6 it is the cheapest that computes at least the FLOPs of the pyramid."""
    pipe = load_scenes("moving")
    costs = flops(pipe, pipe.noise(1))

    def runs(n):  # of the 28 steps of the range, which begins at step 6 of 40
        return sum(step % n == 0 or step == 6 for step in range(6, 34))

    def cost(every):
        return sum(runs(n) * costs[kind] for n, kind in zip(every, KINDS, strict=True))

    sets = [(a, b, c) for a in range(3, 7) for b in range(2, a) for c in range(1, b)]
    fair = min((s for s in sets if cost(s) >= cost(SETS["pyramid"])), key=cost)
    assert SETS["reversed, equal FLOPs"] == fair
    assert [runs(n) for n in (1, 2, 3, 4, 6)] == [28, 14, 10, 8, 5]
    modules = {name: sum(map(runs, SETS[name])) for name in ("pyramid", "reversed, equal modules")}
    assert len(set(modules.values())) == 1
    assert cost(SETS["reversed, equal modules"]) < cost(SETS["pyramid"])  # so it alone would not be fair


def test_how_near_videos_are():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 2, 8, 8, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    by_hand = -10 * math.log10(float(((a[1] - b[1]) ** 2).sum() / a[1].numel()))
    assert abs(float(psnr(a, b)[1]) - by_hand) < 1e-4 and psnr(a, a).tolist() == [100.0, 100.0]


def test_two_calls_are_the_same_film():
    pipe = video_pipeline()
    assert error(run(apart(pipe)), run(pipe)) < 1e-6
    with ours(pipe) as port:
        run(pipe)
    with ours(apart(pipe)) as other:
        run(other.target)
    for kept, name in ((port, "uncond+cond"), (other, "uncond")):
        state = next(iter(kept.state(kept.strategies[0]).values()))
        assert name in state


def test_diffusers_own_is_the_same_with_one_batch_and_not_with_two_calls():
    pipe = video_pipeline()
    plain = run(pipe)
    with ours(pipe):
        want = run(pipe)
    assert error(want, plain) > 1e-5
    with diffusers_pab(pipe, (2, 3, 6), UPPER, LOWER):
        assert torch.equal(run(pipe), want)
    with computed(pipe.transformer) as counts, diffusers_pab(pipe, (2, 3, 6), UPPER, LOWER, named=False):
        run(pipe)
    if counts["temporal"] != counts["spatial"]:
        pytest.skip("this diffusers tells temporal blocks from spatial ones by itself")
    parted = apart(pipe)
    with ours(parted):
        assert error(run(parted), want) < 1e-6
    with diffusers_pab(parted, (2, 3, 6), UPPER, LOWER):
        leaked = run(parted)
    if error(leaked, want) < 1e-6:
        pytest.skip("this diffusers keeps branches apart")
    assert error(leaked, plain) > 2 * error(want, plain)
