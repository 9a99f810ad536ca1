# SPDX-License-Identifier: Apache-2.0
"""The softmax baseline against attention written from its formula."""

import pytest
import torch

from manyheads import UserError
from manyheads.attention import rope
from manyheads.attention.positions import alibi_bias, rope_tables, t5_buckets
from manyheads.attention.reference import attention
from manyheads.call import MixerConfig
from manyheads.mixers.softmax import Softmax
from tolerance import SAME, is_close, is_far

SHAPE = MixerConfig(dim=24, num_heads=4, num_kv_heads=2, head_dim=6, layer=0, num_layers=2, length=16)


def mixer(**fields):
    torch.manual_seed(0)
    made = Softmax(**fields).build(SHAPE).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return made


def formula(m, x, **fields):
    """Dense attention with explicit positions, mask and bias."""
    batch, length, _ = x.shape
    q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    at = torch.arange(length).expand(batch, -1)
    bias, position = None, fields.get("position", "rope")
    if position == "rope":
        q, k = (rope.rotate(y, tuple(z.double() for z in rope_tables(at, 6))) for y in (q, k))
    if position == "alibi":
        bias = alibi_bias(at, at, 4).double()
    if position == "t5":
        bias = m.buckets.weight[t5_buckets(at[0][None] - at[0][:, None])].permute(2, 0, 1)[None]
    apart = at[0][:, None] - at[0][None]
    allowed = (apart >= 0) & (apart < fields.get("window", length))
    out = attention(q, k, v, scale=6**-0.5, mask=allowed[None, None], bias=bias)
    return m.out_proj(out.flatten(2))


FIELDS = [{}, {"position": "alibi"}, {"position": "t5"}, {"position": "none"}, {"window": 5}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_is_its_formula(fields, length):
    m, x = mixer(**fields), torch.randn(2, length, 24, dtype=torch.float64)
    want = formula(m, x, **fields)
    assert is_close(m(x)[0], want)  # tables and biases are float32
    if length == 17 and fields != {"window": 5}:
        assert is_far(m(x)[0], formula(m, x, **fields | {"window": 5}))  # control


def test_a_window_bounds_the_state():
    m, x = mixer(window=5), torch.randn(2, 40, 24, dtype=torch.float64)
    whole, state = m(x)
    parts, kept = [], None
    for piece in x.split([13, 1, 1, 25], 1):
        y, kept = m(piece, state=kept)
        parts.append(y)
    assert is_close(torch.cat(parts, 1), whole)
    assert kept.nbytes == state.nbytes and kept.k.shape[2] == 5
    assert mixer()(x)[1].k.shape[2] == 40


def test_ntk_changes_nothing_up_to_the_trained_length():
    x = torch.randn(1, 33, 24, dtype=torch.float64)
    short, long = ([mixer(ntk=ntk)(x[:, :length])[0] for ntk in (0.0, 2.0)] for length in (16, 33))
    assert torch.equal(*short) and is_far(*long)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"window": 0}, "at least 1"), ({"ntk": 0.5}, "at least 1"), ({"ntk": 2.0, "position": "none"}, "rotary")],
)
def test_errors(fields, says):
    with pytest.raises(UserError, match=says):
        Softmax(**fields)


def test_learned_frequencies_begin_as_rotary_ones_and_turn_each_head():
    learned, plain, x = mixer(learned=True), mixer(), torch.randn(2, 17, 24, dtype=torch.float64)
    torch.nn.init.zeros_(learned.log_factor)
    learned.load_state_dict(plain.state_dict(), strict=False)
    assert is_close(learned(x)[0], plain(x)[0], SAME)  # tables are float32
    whole, _ = learned(x)
    first, state = learned(x[:, :9])
    assert is_close(torch.cat([first, learned(x[:, 9:], state=state)[0]], 1), whole)
    with torch.no_grad():
        learned.log_factor[: 6 // 2] += 0.5  # of the first key/value head
    assert is_far(learned(x)[0], plain(x)[0])
    learned(x)[0].square().sum().backward()
    assert bool(learned.log_factor.grad.abs().gt(0).all())
    for wrong in ({"position": "alibi"}, {"ntk": 2.0}):
        with pytest.raises(UserError, match="learned"):
            Softmax(learned=True, **wrong)
