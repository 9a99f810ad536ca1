# SPDX-License-Identifier: Apache-2.0
"""LongT5's attention against transformers' modules with the same weights, and what follows from its formula."""

import pytest
import torch
from torch import nn
from transformers import LongT5Config, T5Config
from transformers.models.longt5 import modeling_longt5 as theirs
from transformers.models.t5.modeling_t5 import T5Attention

from manyheads import UserError, parse
from manyheads.call import MixerConfig
from manyheads.mixers.longt5_tglobal import TransientGlobal
from tolerance import FORMULA, assert_close, error

DIM, HEADS, WIDTH = 24, 4, 6


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Theirs in float64 throughout: softmax and the norm's variance go to float32 by name."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else x.to(torch.float32))
    monkeypatch.setattr(
        theirs.LongT5LayerNorm, "forward", lambda n, x: nn.functional.rms_norm(x, x.shape[-1:], n.weight, 1e-6)
    )


def pair(radius, block, local=False):
    """Their module and ours with its weights."""
    config = LongT5Config(
        d_model=DIM, d_kv=WIDTH, num_heads=HEADS, local_radius=radius, global_block_size=block, dropout_rate=0.0
    )
    kind = theirs.LongT5LocalAttention if local else theirs.LongT5TransientGlobalAttention
    torch.manual_seed(0)
    other = kind(config, has_relative_attention_bias=True).double().eval().requires_grad_(False)
    for p in other.parameters():
        nn.init.normal_(p, std=0.5)
    return other, loaded(other, radius, 0 if local else block)


def loaded(other, radius, block):
    mine = TransientGlobal(radius=radius, block=block).build(MixerConfig(DIM, HEADS, HEADS, WIDTH, 0, 1, 64, False))
    weights = {
        "q_proj": other.q.weight * WIDTH**0.5, "k_proj": other.k.weight, "v_proj": other.v.weight,
        "out_proj": other.o.weight, "buckets": other.relative_attention_bias.weight,
    }  # fmt: skip
    if block:
        weights["side_buckets"] = other.global_relative_attention_bias.weight
        weights["side_norm"] = other.global_input_layer_norm.weight
    mine = mine.double().eval().requires_grad_(False)
    mine.load_state_dict({f"{name}.weight": x for name, x in weights.items()})
    return mine


def theirs_of(other, x, mask):
    if isinstance(other, theirs.LongT5LocalAttention):
        mask = theirs._get_local_attention_mask(mask, other.block_len, x.device)  # as their encoder makes it
    return other(x, mask=mask)[0]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize(("radius", "block"), [(7, 4), (15, 16), (3, 8)])
@pytest.mark.parametrize("length", [2, 16, 17, 40, 131])
def test_is_transformers_module(length, radius, block, local):
    """Lengths that no block divides, shorter than a block and than the window; whole, and padded on the right.

    Blocks of a power of two: theirs are numbered by a running sum of 1 / k, which rounds where k is something else.
    """
    other, mine = pair(radius, block, local)
    x = torch.randn(3, length, DIM, dtype=torch.float64)
    assert_close(mine(x)[0], theirs_of(other, x, torch.ones(3, length, dtype=torch.float64)), FORMULA)
    lengths = torch.tensor([length, length // 2 + 1, max(1, length // 3)])
    mask = torch.arange(length) < lengths[:, None]
    want = theirs_of(other, x * mask[..., None], mask.double())
    assert_close(mine(x, mask=mask)[0][mask], want[mask], FORMULA)


def test_controls_other_readings_of_the_paper_are_not_it():
    other, mine = pair(7, 4)
    x = torch.randn(1, 41, DIM, dtype=torch.float64)
    want = theirs_of(other, x, torch.ones(1, 41, dtype=torch.float64))
    assert_close(mine(x)[0], want, FORMULA)
    for wrong in (loaded(other, 6, 4), loaded(other, 8, 4), loaded(other, 7, 0)):
        assert error(wrong(x)[0], want) > 1e-3
    wrong = loaded(other, 7, 4)
    wrong.side_buckets.weight.copy_(wrong.side_buckets.weight.roll(16, 0))  # block(t) - b for b - block(t)
    assert error(wrong(x)[0], want) > 1e-3
    wrong = loaded(other, 7, 4)
    wrong.q_proj.weight /= WIDTH**0.5  # T5's weights as they are
    assert error(wrong(x)[0], want) > 1e-3
    wrong = loaded(other, 7, 4)
    wrong.side_norm = nn.Identity()
    assert error(wrong(x)[0], want) > 1e-3


def test_a_window_over_all_and_no_summaries_is_t5s_full_attention():
    config = T5Config(d_model=DIM, d_kv=WIDTH, num_heads=HEADS, dropout_rate=0.0, is_decoder=False)
    other = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval().requires_grad_(False)
    for p in other.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 50, DIM, dtype=torch.float64)
    want = other(x)[0]
    for radius in (49, 127):
        assert_close(loaded(other, radius, 0)(x)[0], want, 1e-6)  # their scores are in float32
    assert error(loaded(other, 48, 0)(x)[0], want) > 1e-6  # control: one pair less


def test_a_far_block_is_known_by_its_sum_alone():
    _, mine = pair(7, 4)
    x = torch.randn(1, 80, DIM, dtype=torch.float64)
    want = mine(x)[0][:, :20]
    other = x.clone()
    other[:, 60:64] = x[:, [62, 60, 63, 61]]
    assert_close(mine(other)[0][:, :20], want, FORMULA)
    assert error(mine(other)[0][:, 58:60], mine(x)[0][:, 58:60]) > 1e-3  # the window knows their order
    other[:, 62:66] = x[:, [64, 65, 62, 63]]  # control: across a border
    assert error(mine(other)[0][:, :20], want) > 1e-6


def test_local_attention_knows_nothing_of_what_is_far():
    _, mine = pair(7, 4, local=True)
    x = torch.randn(1, 80, DIM, dtype=torch.float64)
    want, other = mine(x)[0], x.clone()
    other[:, 40] = 9.0
    changed = (mine(other)[0] - want).abs().amax(-1)[0] > 0
    assert changed.nonzero()[:, 0].tolist() == list(range(33, 48))


def test_tokens_behind_the_last_block_belong_to_it():
    _, mine = pair(3, 16)
    x = torch.randn(1, 47, DIM, dtype=torch.float64)
    other = x.clone()
    other[:, [16, 46]] = x[:, [46, 16]]  # both of the second block
    assert_close(mine(other)[0][:, :8], mine(x)[0][:, :8], FORMULA)
    other = torch.cat([x, torch.randn(1, 1, DIM, dtype=torch.float64)], 1)  # now there are three
    other[:, [16, 46]] = other[:, [46, 16]]
    assert error(mine(other)[0][:, :8], mine(torch.cat([x, other[:, -1:]], 1))[0][:, :8]) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    _, mine = pair(15, 16)
    x = torch.randn(2, 300, DIM, dtype=torch.float64)
    want = mine(x)[0]
    assert error(mine.to(dtype)(x.to(dtype))[0], want) < (1e-5 if dtype == torch.float32 else 0.05)


def test_errors():
    for spec in ("longt5_tglobal:radius=-1", "longt5_tglobal:block=-2"):
        with pytest.raises(UserError, match="count tokens"):
            parse(spec)
    with pytest.raises(UserError, match="no causal form"):
        TransientGlobal().build(MixerConfig(DIM, HEADS, HEADS, WIDTH, 0, 1, 64))
