# SPDX-License-Identifier: Apache-2.0
"""What claim and benchmark of PAB rest on: counts, costs and distances by hand, and diffusers' own beside ours."""

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.claims import _broadcast, pab
from manyheads.claims._broadcast import apart, computed, diffusers_pab, flops, psnr, ssim
from manyheads.models.scenes import build
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
    assert counts == dict.fromkeys(_broadcast.KINDS, STEPS * TOKENS)
    with computed(pipe.transformer) as counts, ours(pipe):
        run(pipe)
    inside = [i for i, t in enumerate(pipe.scheduler.timesteps.tolist()) if LOWER < t < UPPER]
    assert inside[0] == 6
    for kind, n in zip(_broadcast.KINDS, (2, 3, 6), strict=True):
        assert counts[kind] == TOKENS * (STEPS - sum(step % n != 0 for step in inside))
    found, tokens, width = flops(pipe, pipe.noise(1)), 8 * 64, 16
    assert found["spatial"] == 2 * tokens * (4 * width**2 + 2 * 64 * width)
    assert found["temporal"] == 2 * tokens * (4 * width**2 + 2 * 8 * width)
    assert found["cross"] == 2 * (2 * tokens * width**2 + 2 * 8 * 3 * width**2 + 2 * tokens * 3 * width)
    assert found["model"] > sum(found[kind] for kind in _broadcast.KINDS)


def test_sets_of_equal_compute():
    costs = {"spatial": 5.0, "temporal": 4.0, "cross": 2.0}
    chosen = pab.equal_compute(costs)
    assert chosen[0] > chosen[1] > chosen[2]
    goal = pab.cost(pab.PYRAMID, costs)
    assert goal <= pab.cost(chosen, costs) < 1.1 * goal
    assert pab.cost(pab.REVERSED, costs) < goal  # the plain reversal is cheaper, so it would not be fair
    assert [pab.runs_of(n) for n in (1, 2, 3, 4, 6)] == [28, 14, 10, 8, 5]


def test_how_near_films_are():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 2, 8, 8, generator=generator)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    by_hand = -10 * math.log10(float(((a[1] - b[1]) ** 2).sum() / a[1].numel()))
    assert abs(float(psnr(a, b)[1]) - by_hand) < 1e-4 and math.isinf(float(psnr(a, a)[0]))
    values = []
    for channel in range(3):
        for frame in range(2):
            for top in (0, 1):
                for left in (0, 1):
                    x, y = (z[1, channel, frame, top : top + 7, left : left + 7].double().flatten() for z in (a, b))
                    both = torch.cov(torch.stack([x, y]))
                    top_part = (2 * x.mean() * y.mean() + 1e-4) * (2 * both[0, 1] + 9e-4)
                    under = (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (both[0, 0] + both[1, 1] + 9e-4)
                    values.append(float(top_part / under))
    assert abs(float(ssim(a, b)[1]) - sum(values) / len(values)) < 1e-5
    assert torch.equal(ssim(a, a), torch.ones(2)) and float(ssim(a, a.flip(-1)).max()) < 0.5


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
