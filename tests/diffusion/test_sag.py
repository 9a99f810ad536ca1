# SPDX-License-Identifier: Apache-2.0
"""SAG: without blur or mask it vanishes, whatever the model predicts; its map is what a dense map says."""

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import AttentionCall, DenoiserCall, DiffusionStep, Layout, Site
from manyheads.diffusion._maps import blur
from manyheads.diffusion._prediction import Prediction
from manyheads.diffusion.sag import SAG
from manyheads.errors import UserError
from oracles import pipelines
from tolerance import FORMULA, MODEL, assert_close, error, within

LAYOUT = Layout(1, 4, 6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_predictions_come_apart_and_together(kind):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 5, 6, generator=generator).double() for _ in "xe")
    sigma = 0.6
    rule = Prediction(0.4 if kind == "flow" else 0.8, sigma, kind)
    noisy = rule.add_noise(x0, noise)
    out = {
        "epsilon": noise, "sample": x0, "v_prediction": 0.8 * noise - 0.6 * x0, "flow": noise - x0,
    }[kind]  # fmt: skip
    got = rule.to_x0_eps(noisy, out)
    assert_close(got[0], x0, FORMULA)
    assert_close(got[1], noise, FORMULA)
    assert error(Prediction(0.7, 0.71, kind).to_x0_eps(noisy, out)[0], x0) > 1e-3 or kind == "sample"


def test_blur():
    x = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(blur(x, 0, 9), x) and torch.equal(blur(x, 1, 1), x)
    flat = torch.full_like(x, 3.0)
    for sigma, size in ((1, 9), (3, 31)):  # the kernel may be wider than the image
        assert_close(blur(flat, sigma, size), flat, FORMULA)
        assert blur(x, sigma, size).std() < 0.6 * x.std()
    point = torch.zeros(1, 1, 21, 21).double()
    point[0, 0, 10, 10] = 1
    weight = torch.tensor([math.exp(-0.5 * i * i) for i in range(-4, 5)], dtype=torch.float64)
    weight = weight / weight.sum()
    assert_close(blur(point, 1, 9)[0, 0, 6:15, 6:15], weight[:, None] * weight, FORMULA)


class Bed:
    """A denoiser that is any function, with a scheduler that says the noise level."""

    class scheduler:
        class config:
            prediction_type = "epsilon"

        alphas_cumprod = torch.linspace(0.99, 0.01, 1000).double()

    def __init__(self, received=None, branches=("all",), guidance=None, rows=2):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 4, 8, 12, generator=generator).double()
        self.calls = []
        self.run_state = {}
        self.received = received
        step = DiffusionStep(1, 3, 10, 400.0, branches, LAYOUT, run_state=self.run_state)
        self.call = DenoiserCall(
            step, {"sample": self.x, "label": torch.arange(rows)}, self.scheduler, guidance, self.run
        )

    def run(self, branch="", **changes):
        given = {**self.call.given, **changes}
        self.calls.append((branch, given))
        if self.received is not None and branch == "":
            self.run_state["sag"] = self.received
        return torch.tanh(given["sample"] * 1.3) + 0.1 * given["label"][:, None, None, None]


def received(seed=0, rows=2):
    x = torch.rand(rows, 24, generator=torch.Generator().manual_seed(seed)).double()
    return x / x.mean(1, keepdim=True)


def test_it_vanishes_without_blur_or_mask_and_is_affine():
    bed = Bed(received())
    plain = bed.run()
    assert torch.equal(SAG(scale=0.0).denoise(bed.call), plain)
    for none in (SAG(sigma=0.0), SAG(threshold=99.0), SAG(kernel=1)):
        assert_close(none.denoise(bed.call), plain, FORMULA)
    even = Bed(torch.ones(2, 24).double())
    assert_close(SAG().denoise(even.call), plain, FORMULA)  # a uniform map receives exactly 1 everywhere
    made = [SAG(scale=s).denoise(bed.call) - plain for s in (0.5, 1.0)]
    assert_close(made[1], 2 * made[0], FORMULA)
    assert made[1].abs().max() > 1e-3
    clipped = SAG(clip=True, sigma=0.0).denoise(bed.call)
    assert error(clipped, plain) > 1e-3  # clipping alone moves the sample


def test_it_is_the_formula():
    got = received()
    bed = Bed(got)
    eps = bed.run()
    alpha = float(Bed.scheduler.alphas_cumprod[400])
    x0 = (bed.x - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    mask = (got > 1).double().reshape(2, 1, 4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    for strategy, where in ((SAG(scale=0.7), mask), (SAG(scale=0.7, mask="inverted"), 1 - mask),
                            (SAG(scale=0.7, mask="all"), torch.ones_like(mask))):  # fmt: skip
        degraded = where * blur(x0, 1.0, 9) + (1 - where) * x0
        again = bed.run(sample=alpha**0.5 * degraded + (1 - alpha) ** 0.5 * eps)
        assert_close(strategy.denoise(bed.call), eps + 0.7 * (eps - again), FORMULA)
    assert error(SAG(scale=0.7, mask="random").denoise(bed.call), SAG(scale=0.7).denoise(bed.call)) > 1e-4


def test_beside_guidance_the_unconditional_rows_decide():
    """After ``u + g (c - u)`` the prediction is moved by scale (u - degraded), in one batch or two calls."""
    bed = Bed(received(rows=4), ("uncond", "cond"), 5.0, rows=4)
    plain = bed.run()
    made = SAG(scale=0.7).denoise(bed.call)
    last = bed.calls[-1]
    assert last[0] == "blurred" and last[1]["sample"].shape[0] == 2 and last[1]["label"].tolist() == [0, 1]

    def combined(x):
        return x[:2] + 5.0 * (x[2:] - x[:2])

    push = combined(made) - combined(plain)
    size = float(plain.square().mean().sqrt())  # of what is subtracted
    assert_close(push, (made - plain)[:2], FORMULA, unit=size)
    alone = Bed(received(rows=4)[:2], ("uncond",), 5.0, rows=4)
    alone.x = alone.x[:2]
    alone.call = DenoiserCall(
        alone.call.step, {"sample": alone.x, "label": torch.arange(2)}, Bed.scheduler, 5.0, alone.run
    )
    moved = SAG(scale=0.7).denoise(alone.call) - alone.run()
    assert_close(moved * (1 - 5.0), push, FORMULA, unit=size)
    cond = Bed(received(), ("cond",), 5.0)
    assert torch.equal(SAG().denoise(cond.call), cond.run())


def test_the_map_is_summed_over_queries():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 24 + 5, 4, generator=generator).double() for _ in "qkv")
    layout = Layout(1, 4, 6, text=5, text_first=True)
    for kind, at in (("joint", slice(5, 29)), ("self", slice(0, 24))):
        x = [t if kind == "joint" else t[:, :, :24] for t in (q, k, v)]
        step = DiffusionStep(1, 0, 10, 500.0, ("all",), layout if kind == "joint" else LAYOUT)
        call = AttentionCall(Site("x", 0, 0, kind, False), *x, scale=0.5, diffusion=step)
        SAG().watch(call, call.attend())
        want = (x[0][:, :, at] @ x[1][:, :, at].transpose(-1, -2) * 0.5).softmax(-1).mean(1).sum(1)
        assert_close(step.run_state["sag"], want, FORMULA)
        assert_close(step.run_state["sag"].sum(1), torch.full((2,), 24.0).double(), FORMULA)
    with pytest.raises(UserError, match="no image"):
        SAG().blur_mask(torch.ones(2, 23), torch.ones(2, 4, 8, 12), slice(0, 2), 2, LAYOUT)


def test_grids_of_odd_sizes():
    layout = Layout(1, 13, 5)
    assert layout.grid(65) == (13, 5) and layout.grid(7 * 3) == (7, 3) and layout.grid(4 * 2) == (4, 2)
    assert layout.grid(64) is None


@pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
def test_in_pipelines(name):
    make, go = pipelines.RUNS[name]
    pipe = make()
    plain = go(pipe)
    with manyheads.use(pipe, "sag:scale=0"):
        assert torch.equal(go(pipe), plain)
    with manyheads.use(pipe, "sag:sigma=0"):
        assert_close(go(pipe), plain, within(torch.float32, 16 * MODEL))  # a few steps of the sampler
    with manyheads.use(pipe, "sag:scale=2"):
        made = go(pipe)
        assert torch.equal(go(pipe), made)
    assert error(made, plain) > 1e-4 and torch.equal(go(pipe), plain)


def test_on_a_unet_it_is_the_middle_block():
    from oracles import diffusion as tiny

    model = tiny.build("unet")
    with pytest.raises(UserError, match="open the pipeline"), manyheads.use(model, "sag"):
        tiny.forward("unet", model)
    from manyheads.integrations.diffusers import find_sites

    chosen = [site.name for site, _ in find_sites(model) if SAG().selects(site)]
    assert chosen and all(name.startswith("mid_block") for name in chosen)
    with pytest.raises(UserError, match="odd"):
        manyheads.parse("sag:kernel=8")


@pytest.mark.parametrize(
    ("sigma", "size", "shape"), [(1.0, 9, (3, 4)), (0.7, 3, (5, 2)), (2.0, 7, (1, 6)), (1.5, 11, (2, 1))]
)
def test_blur_is_a_sum_over_a_reflected_image(sigma, size, shape):
    """Reflected as often as the kernel needs; an axis of one pixel is repeated."""
    x = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.exp(-0.5 * ((torch.arange(size).double() - size // 2) / sigma) ** 2)
    weight = weight / weight.sum()

    def place(i, n):
        while n > 1 and not 0 <= i < n:
            i = -i if i < 0 else 2 * (n - 1) - i
        return 0 if n == 1 else i

    want, half = torch.zeros_like(x), size // 2
    for r in range(shape[0]):
        for c in range(shape[1]):
            for i in range(-half, half + 1):
                for j in range(-half, half + 1):
                    there = x[..., place(r + i, shape[0]), place(c + j, shape[1])]
                    want[..., r, c] += weight[i + half] * weight[j + half] * there
    assert_close(blur(x, sigma, size), want, FORMULA)
    assert torch.equal(blur(x, -1.0, size), x)


def test_layers_that_are_looked_at():
    def site(name, layer, kind="self", peers=()):
        return Site(name, 0, layer, kind, False, peers=peers)

    assert SAG().selects(site("mid_block.attentions.0", 3)) and not SAG().selects(site("down_blocks.0", 1, peers=(1,)))
    assert not SAG().selects(site("up_blocks.0", 1, peers=(1,))) and not SAG().selects(site("mid_block.x", 3, "cross"))
    for peers, middle in (((2, 4, 6), 4), ((2, 4, 6, 8), 6), ((5,), 5)):
        chosen = [layer for layer in peers if SAG().selects(site("blocks", layer, "joint", peers))]
        assert chosen == [middle]
    assert not SAG().selects(site("blocks", 0))
    assert SAG(layers=(1,)).selects(site("up_blocks.0", 1)) and not SAG(layers=(1,)).selects(site("mid_block.x", 3))


def test_masks_by_hand():
    """Which tokens, on which grid, of which frames: turned around, everything, or as many at random."""
    got = received(rows=4)
    x0 = torch.zeros(2, 4, 8, 12)
    for rows in (slice(0, 2), slice(2, 4)):
        mask = SAG().blur_mask(got, x0, rows, 4, LAYOUT)
        assert mask.shape == (2, 1, 8, 12)
        for b in range(2):
            for r in range(8):
                for c in range(12):
                    assert mask[b, 0, r, c] == float(got[rows][b, (r // 2) * 6 + c // 2] > 1)
        assert torch.equal(SAG(mask="inverted").blur_mask(got, x0, rows, 4, LAYOUT), 1 - mask)
    high = SAG(threshold=1.5).blur_mask(got, x0, slice(0, 2), 4, LAYOUT)
    assert high.sum() < SAG().blur_mask(got, x0, slice(0, 2), 4, LAYOUT).sum()
    torch.manual_seed(0)
    random = SAG(mask="random").blur_mask(got, x0, slice(0, 2), 4, LAYOUT)
    want = (got[:2] > 1).sum(1) * 4
    assert torch.equal(random.sum((1, 2, 3)).long(), want) and not torch.equal(random, mask)
    assert torch.equal(SAG(mask="all").blur_mask(None, x0, slice(0, 2), 4, None), torch.ones(2, 1, 8, 12))
    for missing in ((None, LAYOUT), (got, None)):
        with pytest.raises(UserError, match="was not run"):
            SAG().blur_mask(missing[0], x0, slice(0, 2), 4, missing[1])


@pytest.mark.parametrize("apart", [False, True])
def test_masks_of_frames(apart):
    """Frames that attend to each other, or as rows of their own; each frame has its own mask."""
    layout = Layout(3, 2, 2)
    got = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) * 2
    given = got.view(6, 4) if apart else got
    mask = SAG().blur_mask(given, torch.zeros(1, 4, 3, 4, 4), slice(1, 2), 2, layout)
    assert mask.shape == (1, 1, 3, 4, 4)
    for f in range(3):
        for r in range(4):
            for c in range(4):
                assert mask[0, 0, f, r, c] == float(got[1, f * 4 + (r // 2) * 2 + c // 2] > 1)


def test_packed_latents_are_blurred_over_their_grid():
    bed = Bed(received())
    bed.x = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(1)).double()

    def run(branch="", **changes):
        given = {**bed.call.given, **changes}
        bed.run_state["sag"] = bed.received
        return torch.tanh(given["sample"])

    bed.call = DenoiserCall(bed.call.step, {"sample": bed.x}, Bed.scheduler, None, run)
    made = SAG(scale=0.5).denoise(bed.call)
    alpha, eps = float(Bed.scheduler.alphas_cumprod[400]), torch.tanh(bed.x)
    x0 = ((bed.x - (1 - alpha) ** 0.5 * eps) / alpha**0.5).transpose(1, 2).reshape(2, 5, 4, 6)
    mask = (bed.received > 1).double().reshape(2, 1, 4, 6)
    degraded = (mask * blur(x0, 1.0, 9) + (1 - mask) * x0).flatten(2).transpose(1, 2)
    again = torch.tanh(alpha**0.5 * degraded + (1 - alpha) ** 0.5 * eps)
    assert_close(made, eps + 0.5 * (eps - again), FORMULA)
    nowhere = DiffusionStep(1, 3, 10, 400.0, ("all",), None, run_state=bed.run_state)
    with pytest.raises(UserError, match="packed into tokens"):
        SAG().denoise(DenoiserCall(nowhere, {"sample": bed.x}, Bed.scheduler, None, run))


def test_clipping_and_a_learned_variance():
    """The clean sample alone is clipped; of a prediction with a variance behind it the first channels count."""
    bed = Bed(received())
    alpha = float(Bed.scheduler.alphas_cumprod[400])
    eps = bed.run()
    x0 = ((bed.x - (1 - alpha) ** 0.5 * eps) / alpha**0.5).clamp(-1, 1)
    again = bed.run(sample=alpha**0.5 * blur(x0, 1.0, 9) + (1 - alpha) ** 0.5 * eps)
    assert_close(SAG(scale=1, clip=True, mask="all").denoise(bed.call), 2 * eps - again, FORMULA)
    variance = bed.call
    wide = DenoiserCall(
        variance.step, variance.given, Bed.scheduler, None, lambda *a, **k: torch.cat([bed.run(*a, **k), bed.x + 7], 1)
    )
    plain = SAG(scale=1).denoise(bed.call)
    made = SAG(scale=1).denoise(wide)
    assert_close(made[:, :4], plain, FORMULA)
    assert torch.equal(made[:, 4:], bed.x + 7)


def test_what_was_received_is_of_this_step_and_of_no_blurred_call():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 24, 4, generator=generator) for _ in "qkv")
    for branches, mask in ((("blurred",), "attention"), (("all",), "all")):
        step = DiffusionStep(1, 0, 10, 500.0, branches, LAYOUT)
        SAG(mask=mask).watch(AttentionCall(Site("x", 0, 0, "self", False), q, k, v, scale=0.5, diffusion=step), v)
        assert not step.run_state
    with pytest.raises(UserError, match="layout of x is not known"):
        step = DiffusionStep(1, 0, 10, 500.0, ("all",), None)
        SAG().watch(AttentionCall(Site("x", 0, 0, "self", False), q, k, v, scale=0.5, diffusion=step), v)
    stale = Bed(None)
    stale.run_state["sag"] = received()
    with pytest.raises(UserError, match="was not run"):  # of an earlier step
        SAG().denoise(stale.call)
    assert SAG(kernel=1).kernel == 1
    for kernel in (0, -1, 4):
        with pytest.raises(UserError, match="odd width"):
            SAG(kernel=kernel)
    assert SAG() == SAG(scale=0.75, sigma=1.0, kernel=9, threshold=1.0, mask="attention", clip=False)
