# SPDX-License-Identifier: Apache-2.0
"""INT4 weights and FP8 activations: what is stored, how far it is from what it stands for, and what smoothing does."""

import pytest
import torch

from manyheads import UserError
from manyheads.attention import int4_fp8
from manyheads.attention.codec import FP8
from tolerance import CLOSE, assert_close, error, is_close, within

SCALES = [torch.float8_e4m3fn, torch.bfloat16]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", int4_fp8.GROUPS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", ["fp8", "exact"])
def test_a_weight_is_read_back_within_half_a_step(group, scale, table):
    weight = drawn(9, 200) * 0.01
    packed = int4_fp8.encode(weight, group=group, scale=scale, table=table)
    groups = -(-200 // group)
    assert packed.codes.shape == (9, groups * group // 2) and packed.scale.shape == (9, groups)
    assert packed.nbytes == 9 * groups * (group // 2 + scale.itemsize)
    step = (packed.scale.float() / packed.shift).repeat_interleave(group, 1)[:, :200]
    # Half a step, what a scale rounded down (e4m3 by 1/16 at most) cuts off a largest weight, and the table's rounding.
    cut = 0.5 if scale == torch.float8_e4m3fn else 0.02
    rounded = weight.abs() / 16 if table == "fp8" else 0.0
    assert ((int4_fp8.weight(packed) - weight).abs() <= (0.5 + cut) * step * 1.001 + rounded).all()
    if table == "fp8":
        numbers = int4_fp8.decode(packed)
        assert torch.equal(numbers, numbers.to(torch.float8_e4m3fn).float())


def test_the_power_of_two_keeps_small_scales():
    """Without it the scales of a layer with weights like these are below the least e4m3 number, 2^-9."""
    weight = drawn(16, 256) * 1e-4
    packed = int4_fp8.encode(weight)
    assert torch.tensor(packed.shift).log2().frac() == 0 and 32 < float(packed.scale.float().max()) <= 64
    assert error(int4_fp8.weight(packed), weight) < 0.15
    lost = torch.zeros(16, 256)  # a scale of 0: nothing is left
    assert error(lost, weight) == 1.0
    larger = int4_fp8.encode(weight * 2**13)
    assert torch.equal(larger.codes, packed.codes) and larger.shift == packed.shift / 2**13


def test_a_group_has_a_scale_of_its_own():
    weight = torch.cat([drawn(4, 64), 0.01 * drawn(4, 64, seed=1)], 1)
    apart = error(int4_fp8.weight(int4_fp8.encode(weight, group=64))[:, 64:], weight[:, 64:])
    together = error(int4_fp8.weight(int4_fp8.encode(weight, group=128))[:, 64:], weight[:, 64:])
    assert apart < 0.15 and together > 0.9


@pytest.mark.parametrize(("kind", "size"), [("absmax", lambda w: w.abs().amax(0)), ("mean", lambda w: w.abs().mean(0))])
def test_smoothed_channels_are_alike(kind, size):
    weight = drawn(30, 40) * torch.exp2(drawn(40, seed=1))
    factors = int4_fp8.smoothing_factors(weight, kind)
    smooth = size(weight * factors)
    assert is_close(smooth, smooth[:1].expand_as(smooth))
    assert int4_fp8.smoothing_factors(weight, "none") is None
    weight[:, 3] = 0
    factors = int4_fp8.smoothing_factors(weight, kind)
    assert factors.isfinite().all() and factors[3] <= 1001 * factors.min()
    assert torch.equal(int4_fp8.smoothing_factors(torch.zeros(3, 4), kind), torch.ones(4))


@pytest.mark.parametrize("kind", ["absmax", "mean"])
def test_smoothing_finds_the_outlying_channel(kind):
    """A channel with weights 32 times larger and inputs 32 times smaller: the function is the same, INT4 is not."""
    weight, x = drawn(64, 128) * 0.02, drawn(20, 128, seed=1)
    planted, fed = weight.clone(), x.clone()
    planted[:, 5] *= 32
    fed[:, 5] /= 32
    want = x @ weight.T

    def off(matrix, inputs, smoothing):
        return error(int4_fp8.linear(inputs, int4_fp8.encode(matrix, smoothing=smoothing)), want)

    plain = off(weight, x, "none")
    assert plain < 0.13
    assert off(planted, fed, "none") > 4 * plain
    assert off(planted, fed, kind) < 1.1 * plain


def test_activations_are_fp8_by_token():
    """Scales of a token are its own: a large neighbour changes no bit of it, and a power of two no code."""
    weight, x = drawn(32, 64) * 0.02, drawn(3, 64, seed=1)
    packed = int4_fp8.encode(weight, group=64)
    alone = int4_fp8.linear(x[:1], packed)
    crowded = int4_fp8.linear(torch.cat([x[:1], 1000 * x[1:]]), packed)
    assert error(crowded[:1], alone) < 1e-6
    assert torch.equal(FP8.encode(4 * x)[0].view(torch.uint8), FP8.encode(x)[0].view(torch.uint8))
    exact = x @ int4_fp8.weight(packed).T
    assert 1e-3 < error(int4_fp8.linear(x, packed), exact) < 0.05  # the rounding of the inputs alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_bias_and_dtypes(dtype):
    weight, bias = drawn(24, 70).to(dtype), drawn(24).to(dtype)
    x = drawn(2, 3, 70, seed=2).to(dtype)
    packed = int4_fp8.encode(weight, group=32, smoothing="mean")
    out = int4_fp8.linear(x, packed, bias)
    assert out.shape == (2, 3, 24) and out.dtype == dtype
    rows = [int4_fp8.linear(row, packed, bias) for row in x.flatten(0, 1)]
    assert_close(torch.stack(rows).view_as(out), out, within(dtype if dtype.itemsize == 2 else torch.float32, 1))
    assert error(out.double(), (x.double() @ weight.double().T) + bias.double()) < 0.2
    assert int4_fp8.linear(x[:0], packed).shape == (0, 3, 24)


def test_gradients_pass_the_rounding():
    weight, x = drawn(24, 64), drawn(5, 64, seed=1).requires_grad_()
    packed = int4_fp8.encode(weight, group=64, smoothing="mean")
    out = int4_fp8.linear(x, packed)
    with torch.no_grad():
        assert_close(out, int4_fp8.linear(x, packed), CLOSE)
    out.sum().backward()
    want = int4_fp8.weight(packed).sum(0).expand(5, -1)
    assert_close(x.grad, want, CLOSE)


def test_what_cannot_be_packed_is_refused():
    weight = drawn(8, 64)
    for wrong in ({"group": 48}, {"scale": torch.float32}, {"table": "int8"}, {"smoothing": "median"}):
        with pytest.raises(UserError):
            int4_fp8.encode(weight, **wrong)
    weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        int4_fp8.encode(weight)
    assert int4_fp8.weight(int4_fp8.encode(torch.zeros(8, 64), group=64)).eq(0).all()
