# SPDX-License-Identifier: Apache-2.0
"""mLSTM against its formula and against transformers' xLSTM; convolution, Hedgehog features, the window beside it."""

import pytest
import torch
from torch import nn
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from manyheads.attention.recurrence import DecayState, decay_attention, mlstm_gates
from manyheads.errors import UserError
from manyheads.mixers.blalm_mlstm import MLSTM, BlalmMLSTM, ShortConv, hedgehog
from manyheads.models.decoder import Decoder, DecoderConfig
from oracles import mixers
from tolerance import DEEP, FORMULA, SAME, assert_close, conditioned, error, within

ALL = "blalm_mlstm:conv=3,hedgehog=true,window=3"


def layer(dtype=torch.float32, mode="single"):
    config = xLSTMConfig(
        hidden_size=32, num_heads=4, num_hidden_layers=1, qk_dim_factor=0.5, chunk_size=16, mode="inference",
        return_last_states=True, autocast_kernel_dtype="float32",
        norm_reduction_force_float32=dtype == torch.float32, weight_mode=mode,
    )  # fmt: skip
    for name in ("autocast_kernel_dtype", "inference_state_dtype"):  # the config takes no float64, the layer does
        object.__setattr__(config, name, str(dtype).removeprefix("torch."))
    module = mixers.scattered(xLSTMLayer(config))
    if mode == "single":
        with torch.no_grad():
            module.fgate_preact.bias.copy_(torch.linspace(0, 3, 4))
            module.igate_preact.bias.copy_(torch.linspace(-3, 2, 4))
    return module.to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, SAME), (torch.float64, DEEP)])
def test_equals_transformers(dtype, limit):
    theirs = layer(dtype)
    ours = MLSTM.from_transformers(theirs)
    x = torch.randn(2, 37, 32, dtype=dtype)
    want, last = theirs(x)
    got, state = ours(x)
    assert_close(got, want, limit)
    assert_close(state.decay.kv, last[0], limit)
    assert_close(state.decay.k, last[1], limit)
    more = torch.randn(2, 1, 32, dtype=dtype)  # one step on, each from its own state
    assert_close(ours(more, state=state)[0], theirs(more, last)[0], limit)
    ours.strategy = BlalmMLSTM(cap=1.0)  # control: another cap
    assert error(ours(x)[0], want) > 1e-4


def test_what_is_not_taken_from_transformers():
    with pytest.raises(UserError, match="single"):
        MLSTM.from_transformers(layer(mode="fused"))


def reference(q, k, v, i, f, floor=1.0, eps=1e-6):
    """Stabilised mLSTM token by token: ``[B, H, T, d]`` and gates ``[B, H, T]``."""
    memory = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    total, m, outs = q.new_zeros(*q.shape[:2], q.shape[3]), q.new_zeros(q.shape[:2]), []
    for t in range(q.shape[2]):
        kept = nn.functional.logsigmoid(f[:, :, t]) + m
        m = torch.maximum(kept, i[:, :, t])
        keep, take = (kept - m).exp()[..., None], (i[:, :, t] - m).exp()[..., None]
        memory = keep[..., None] * memory + (take * k[:, :, t])[..., None] * v[:, :, t, None]
        total = keep * total + take * k[:, :, t]
        below = torch.maximum((q[:, :, t] * total).sum(-1).abs(), floor * (-m).exp())
        outs.append((q[:, :, t, None] @ memory)[:, :, 0] / (below + eps)[..., None])
    return torch.stack(outs, 2)


def mlstm(q, k, v, i, f, state=None, **given):
    g, factor, floor, _ = mlstm_gates(i, f, state)
    return decay_attention(q, k * factor[..., None].to(k.dtype), v, g, norm="mlstm", floor=floor, **given)[0]


def drawn(length=75, dtype=torch.float64):
    q, k, v = (torch.randn(2, 3, length, d, dtype=dtype) for d in (4, 4, 6))
    i, f = torch.randn(2, 3, length, dtype=dtype) * 3, torch.randn(2, 3, length, dtype=dtype) + 2
    return q, k, v, i, f


@pytest.mark.parametrize("impl", ["torch", "quadratic"])
@pytest.mark.parametrize("length", [1, 75, 130])
def test_is_its_formula(length, impl):
    inputs = drawn(length)
    limit = within(torch.float64, length) * conditioned(reference, *inputs)
    if impl == "quadratic":  # decays between two tokens are differences of running sums, and err by the sums' last bit
        limit *= max(1.0, float(-nn.functional.logsigmoid(inputs[4]).sum(-1).min()))
    assert_close(mlstm(*inputs, impl=impl), reference(*inputs), limit)
    if length > 1:  # control: no floor
        assert error(reference(*inputs, floor=0.0), reference(*inputs)) > 1e-3


def test_the_running_maximum_does_not_matter():
    q, k, v, i, f = drawn()
    states = [DecayState(q.new_zeros(2, 3, 4, 6), m=q.new_full((2, 3), m)) for m in (0.0, -50.0, 3.0)]
    plain, *others = (mlstm(q, k, v, i, f, state) for state in states)
    for other in others:  # up to the 1e-6 that keeps from dividing by 0, which m scales
        assert_close(other, plain, 5e-7)


def test_open_gates_are_plain_sums():
    q, k, v, i, f = drawn()
    out = mlstm(q, k, v, i * 0, torch.full_like(f, torch.inf))
    weights = (q @ k.transpose(-1, -2)).tril()
    want = weights @ v / (weights.sum(-1).abs().clamp(min=1) + 1e-6)[..., None]
    assert_close(out, want, FORMULA)


def test_a_closed_input_gate_hides_a_token_and_a_huge_one_shows_only_it():
    q, k, v, i, f = drawn(20, torch.float32)
    shut = i.clone()
    shut[:, :, 4] = -torch.inf
    other = v.clone()
    other[:, :, 4] = 1e3
    assert torch.equal(mlstm(q, k, v, shut, f), mlstm(q, k, other, shut, f))
    assert error(mlstm(q, k, v, i, f), mlstm(q, k, other, i, f)) > 1e-3
    i[:, :, 4] = 80.0
    out = mlstm(q, k, v, i, torch.full_like(f, torch.inf))
    want = v[:, :, 4, None] * torch.sign((q * k[:, :, 4, None]).sum(-1))[:, :, 5:, None]
    sure = (q * k[:, :, 4, None]).sum(-1).abs()[:, :, 5:] > 0.1
    assert out.isfinite().all()
    assert_close(out[:, :, 5:][sure], want[sure], 5e-6)


@pytest.mark.parametrize("spec", ["blalm_mlstm", ALL, "blalm_mlstm:window=2,mix_by=scalar"])
def test_gradients(spec):
    mixers.gradients_are_right(spec)


def test_hedgehog_features():
    x = torch.randn(2, 3, 5, 4)
    y = hedgehog(x, torch.eye(4).expand(3, -1, -1))
    assert y.shape == (2, 3, 5, 8) and (y > 0).all()
    assert_close(y.sum(-1), torch.ones(2, 3, 5))
    assert_close(y, torch.softmax(torch.cat([x, -x], -1), -1))


def test_convolution_is_causal_sums():
    conv = mixers.scattered(ShortConv(5, 4))
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    y, state = conv(x, None, None)
    want = torch.zeros_like(x)
    for t in range(9):
        for j in range(4):
            if t >= 3 - j:
                want[:, t] += conv.weight[:, j] * x[:, t - 3 + j]
    assert_close(y, nn.functional.silu(want), FORMULA)
    assert torch.equal(state, x[:, -3:])
    assert error(y.roll(1, 1), nn.functional.silu(want)) > 1e-2


def branches(mix_by, bias):
    mixer = mixers.mixer(f"blalm_mlstm:window=64,mix_by={mix_by}")
    with torch.no_grad():
        if mix_by == "scalar":
            mixer.weigh.fill_(bias)
        else:
            mixer.weigh.weight.zero_()
            mixer.weigh.bias.fill_(bias)
    return mixer


@pytest.mark.parametrize("mix_by", ["token_head", "channel", "scalar"])
def test_either_branch_alone(mix_by):
    x = torch.randn(2, 20, mixers.DIM, dtype=torch.float64)
    near = branches(mix_by, -1e3)
    softmax = mixers.mixer("softmax")
    names = ("q_proj", "k_proj", "v_proj")
    softmax.load_state_dict(
        {f"{n}.weight": getattr(near.window, n).weight for n in names} | {"out_proj.weight": near.out_proj.weight}
    )
    assert_close(near(x)[0], softmax(x)[0], FORMULA)
    far, alone = branches(mix_by, 1e3), mixers.mixer("blalm_mlstm")
    alone.load_state_dict({k: v for k, v in far.state_dict().items() if not k.startswith(("window", "weigh"))})
    assert_close(far(x)[0], alone(x)[0], FORMULA)
    both = branches(mix_by, 0.0)
    assert_close(both(x)[0], (near(x)[0] + far(x)[0]) / 2, FORMULA)
    assert error(both(x)[0], alone(x)[0]) > 1e-2


def test_gates_start_as_xlstm_has_them():
    mixer = Decoder("blalm_mlstm", DecoderConfig(29, 32, 1, 4)).blocks[0].mixer
    assert torch.equal(mixer.i_gate.bias, torch.full((4,), -10.0)) and not mixer.i_gate.weight.any()
    assert torch.equal(mixer.f_gate.bias, torch.linspace(3, 6, 4)) and not mixer.f_gate.weight.any()


def test_fields():
    for wrong in ({"mix_by": "sum"}, {"conv": -1}, {"window": -1}, {"qk_factor": 0.0}, {"cap": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            BlalmMLSTM(**wrong)
