# SPDX-License-Identifier: Apache-2.0
"""TransNormerLLM's mixer against its formula, its two decay tables, its relative positions and its block."""

import pytest
import torch
from torch import nn

from manyheads.attention.decay import log_decay
from manyheads.attention.recurrence import DecayState
from manyheads.errors import UserError
from manyheads.mixers.tnl_lightning import SGLU, TNLLightning, TNLState
from oracles import mixers
from tolerance import FORMULA, assert_close, error, within

SPECS = ["tnl_lightning", "tnl_lightning:decay=alibi", "tnl_lightning:decay=none,lrpe=false,gate=false"]
T = 70


def formula(mixer, x, late=0):
    """The mixer written as a double sum over tokens; ``late`` shifts the decay (wrong unless 0)."""
    heads = mixer.config.num_heads

    def part(linear):
        return linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = nn.functional.silu(part(mixer.q_proj)), nn.functional.silu(part(mixer.k_proj)), part(mixer.v_proj)
    apart = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    products = q[:, :, :, None] * k[:, :, None]  # [B, H, T, T, d]
    if mixer.theta is not None:
        products = products * torch.cos(mixer.theta[:, :, None].double() * apart[..., None])
    rate = torch.zeros(heads) if mixer.decay is None else mixer.decay
    weights = products.sum(-1) * torch.exp(rate.double()[:, None, None] * (apart + late)) * (apart >= 0)
    out = (weights @ v).transpose(1, 2).flatten(2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return mixer.out_proj(out if mixer.gate is None else out * mixer.gate(x))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("spec", SPECS)
def test_is_its_formula(spec, layer):
    mixer = mixers.mixer(spec, layer)
    x = torch.randn(2, T, mixers.DIM, dtype=torch.float64)
    assert (mixer.theta is not None) == (layer == 0 and "lrpe=false" not in spec)
    assert_close(mixer(x)[0], formula(mixer, x))


def test_control_decay_off_by_one_and_the_other_table():
    mixer, other = (mixers.mixer(f"tnl_lightning:decay={table}") for table in ("paper", "alibi"))
    x = torch.randn(1, T, mixers.DIM, dtype=torch.float64)
    want = mixer(x)[0]
    mixer.decay[0] = -0.5  # the first head of the paper's table does not decay, and hides a shift
    assert error(formula(mixer, x, late=1), mixer(x)[0]) > 1e-3
    assert error(other(x)[0], want) > 1e-2


@pytest.mark.parametrize("spec", SPECS)
def test_gradients(spec):
    mixers.gradients_are_right(spec)


def test_control_gradients():
    class Detached(TNLLightning):
        def build(self, config):
            mixer = super().build(config)
            mixer.out_proj.register_forward_pre_hook(lambda _, x: (1.1 * x[0] - 0.1 * x[0].detach(),))
            return mixer

    with pytest.raises((AssertionError, RuntimeError)):
        mixers.gradients_are_right(Detached())


def test_decay_tables():
    rates = -log_decay("paper", 8, 0, 12)
    assert_close(rates, torch.arange(8.0))
    assert_close(-log_decay("paper", 8, 6, 12), torch.arange(8.0) / 2)
    assert_close(-log_decay("alibi", 8, 0, 12), 2.0 ** -torch.arange(1.0, 9) * (1 + 1e-5))
    assert (log_decay("alibi", 8, 11, 12) < 0).all() and (log_decay("alibi", 8, 11, 12) > -1.1e-5).all()
    assert torch.isfinite(log_decay("alibi", 4, 0, 1)).all() and log_decay("none", 4, 0, 1) is None
    for table in ("paper", "alibi"):  # later layers forget less
        assert (log_decay(table, 4, 2, 4) >= log_decay(table, 4, 1, 4)).all()


def test_endless_decay_leaves_the_token_itself():
    mixer = mixers.mixer("tnl_lightning:lrpe=false,gate=false")
    mixer.decay = torch.full_like(mixer.decay, -1e4)
    x = torch.randn(1, T, mixers.DIM, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (4, -1)) for y in (nn.functional.silu(mixer.q_proj(x)),
                                                  nn.functional.silu(mixer.k_proj(x)), mixer.v_proj(x)))  # fmt: skip
    alone = ((q * k).sum(-1, keepdim=True) * v).flatten(2)
    assert_close(mixer(x)[0], mixer.out_proj(mixer.out_norm(alone)))


def test_only_distances_count():
    """Relative positions: a sequence that starts at position 1000 gives the same; turning q alone does not."""
    mixer = mixers.mixer("tnl_lightning")
    x = torch.randn(2, T, mixers.DIM, dtype=torch.float64)
    want, state = mixer(x)
    empty = TNLState(DecayState(torch.zeros_like(state.decay.kv)), torch.full((2,), 1000))
    assert_close(mixer(x, state=empty)[0], want, 1000 * within(torch.float64, 1))  # angles of 1000 are rounded
    turned, calls = mixer._rotate, []

    def only_q(y, at):
        calls.append(at)
        return turned(y, at if len(calls) % 2 else at * 0)

    mixer._rotate = only_q
    assert error(mixer(x, state=empty)[0], mixer(x)[0]) > 1e-3


def test_the_state_is_float32_in_half_precision():
    mixer = mixers.mixer("tnl_lightning").bfloat16()
    y, state = mixer(torch.randn(1, 5, mixers.DIM, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.decay.kv.dtype == torch.float32


def test_the_block_is_transnormers():
    model = mixers.decoder("tnl_lightning")
    block = model.blocks[0]
    assert isinstance(block.ffn, SGLU) and not [*model.norm.parameters(), *block.mixer_norm.parameters()]
    x = torch.randn(1, 9, mixers.DIM, dtype=torch.float64)

    def norm(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    h = x + block.mixer(norm(x))[0]
    want = h + block.ffn.down(block.ffn.gate(norm(h)) * block.ffn.up(norm(h)))
    assert_close(block(x, None)[0], want)
    wrong = h + block.ffn.down(nn.functional.silu(block.ffn.gate(norm(h))) * block.ffn.up(norm(h)))
    assert error(block(x, None)[0], wrong) > FORMULA


def test_fields():
    with pytest.raises(UserError, match="paper, alibi or none"):
        TNLLightning(decay="learned")
