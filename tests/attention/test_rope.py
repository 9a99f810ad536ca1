# SPDX-License-Identifier: Apache-2.0
"""Rotary helpers against the model's own rotations, for every kind of rotary scaling, and against complex numbers."""

import importlib

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3 import modeling_phi3

from manyheads.attention import rope
from tolerance import CLOSE, FORMULA, HALF, SAME, assert_close, error, is_close, within

DIM, LENGTH = 16, 24
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(DIM // 2)],
        "long_factor": [2.0 + 0.5 * i for i in range(DIM // 2)],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
SCALED = ("yarn", "longrope")  # these lengthen what they rotate


def table(kind="default", positions=None, dtype=torch.float64):
    """The model's own cosines and sines ``[B, T, DIM]``, made in float32 and given in ``dtype``."""
    config = LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM, max_position_embeddings=64,
        rope_parameters={"rope_theta": 100.0, **SCALINGS[kind]},
    )  # fmt: skip
    positions = torch.arange(LENGTH)[None] if positions is None else positions
    return LlamaRotaryEmbedding(config)(torch.empty(1, dtype=dtype), positions)


def vectors(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def partial(dtype=torch.float64):
    """Cosines and sines of a model that rotates half of its channels, and that model's own rotation."""
    config = Phi3Config(
        hidden_size=4 * DIM, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        rope_parameters={"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    )  # fmt: skip
    rotary = modeling_phi3.Phi3RotaryEmbedding(config)(torch.empty(1, dtype=dtype), torch.arange(LENGTH)[None])
    assert rotary[0].shape[-1] == DIM // 2
    return rotary, modeling_phi3.apply_rotary_pos_emb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotate_is_the_models_own_bit_for_bit(kind, dtype):
    rotary = table(kind, dtype=dtype)
    q, k = vectors(2, 3, LENGTH, DIM, dtype=dtype), vectors(2, 3, LENGTH, DIM, seed=1, dtype=dtype)
    want_q, want_k = apply_rotary_pos_emb(q, k, *rotary)
    assert torch.equal(rope.rotate(q, rotary), want_q) and torch.equal(rope.rotate(k, rotary), want_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_rotary_is_the_models_own(dtype):
    rotary, apply = partial(dtype)
    q = vectors(2, 3, LENGTH, DIM, dtype=dtype)
    got = rope.rotate(q, rotary)
    assert torch.equal(got, apply(q, q, *rotary)[0])
    assert torch.equal(got[..., DIM // 2 :], q[..., DIM // 2 :]) and got.dtype == dtype


@pytest.mark.parametrize("kind", SCALINGS)
def test_unrotate_is_the_inverse_and_divides_by_the_factor_once(kind):
    rotary, x = table(kind), vectors(2, 3, LENGTH, DIM)
    assert_close(rope.unrotate(rope.rotate(x, rotary), rotary), x, FORMULA)
    assert_close(rope.rotate(rope.unrotate(x, rotary), rotary), x, FORMULA)
    backwards = rope.rotate(rope.rotate(x, rotary), (rotary[0], -rotary[1]))  # the factor of the model twice
    assert (error(backwards, x) > 0.01) == (kind in SCALED)


def test_unrotate_of_rounded_tables_and_of_partial_rotary():
    """bfloat16 cosines and sines are no rotation any more; the inverse is theirs all the same."""
    for rotary in (table("yarn", dtype=torch.bfloat16), partial(torch.bfloat16)[0]):
        wide, x = tuple(t.double() for t in rotary), vectors(2, 3, LENGTH, DIM)
        assert_close(rope.unrotate(rope.rotate(x, wide), wide), x, FORMULA)
        assert_close(rope.unrotate(rope.rotate(x.float(), rotary), rotary).double(), x, HALF[torch.bfloat16])


@pytest.mark.parametrize("kind", SCALINGS)
def test_scores_depend_on_the_distance_alone(kind):
    """q at i times k at j is q at i + 5 times k at j + 5: what the interleaved reading of the layout does not give."""
    rotary = table(kind)
    q, k = vectors(1, 1, 1, DIM), vectors(1, 1, 1, DIM, seed=1)
    shift = torch.arange(LENGTH - 5)
    turned_q, turned_k = (rope.rotate(x.expand(-1, -1, LENGTH, -1), rotary) for x in (q, k))
    scores = turned_q @ turned_k.transpose(-1, -2)
    assert_close(scores[..., shift[:, None] + 5, shift + 5], scores[..., shift[:, None], shift], CLOSE)
    first, second = q.unflatten(-1, (-1, 2)).unbind(-1)  # the same channels in interleaved order
    other = torch.cat([first, second], -1)
    scores = rope.rotate(other.expand(-1, -1, LENGTH, -1), rotary) @ turned_k.transpose(-1, -2)
    assert_close(scores[..., shift[:, None] + 5, shift + 5], scores[..., shift[:, None], shift], CLOSE)
    assert error(scores, turned_q @ turned_k.transpose(-1, -2)) > 0.1


LAYOUTS = {
    "llama": 1, "qwen2": 1, "qwen3": 1, "mistral": 1, "gemma2": 1, "gemma3n": 1, "phi3": 1, "gpt_neox": 1,
    "stablelm": 1, "gpt_oss": 2, "cohere": 0, "glm": 0, "glm4": 0, "ernie4_5": 0, "helium": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_a_models_own_rotation(name):
    """Tables whole, each angle once (gpt-oss), or interleaved channels, with tables in halves (GLM) or not (Cohere)."""
    apply = importlib.import_module(f"transformers.models.{name}.modeling_{name}").apply_rotary_pos_emb
    width = DIM // 2 if LAYOUTS[name] == 2 else DIM
    assert rope.copies(apply, width, DIM) == LAYOUTS[name]


def test_layout_of_what_is_no_rotation():
    assert rope.copies(lambda q, k, cos, sin: (q, k), DIM, DIM) == 0
    assert rope.copies(lambda q: q, DIM, DIM) == 0
    assert rope.copies(lambda x, cos, sin: rope.rotate(x, (cos, -sin)), DIM, DIM) == 0
    assert rope.copies(lambda x, cos, sin: rope.rotate(x, (cos, sin)), DIM, DIM) == 1
    assert rope.copies(lambda x, cos, sin: rope.rotate(x, (cos, sin)), 2 * DIM, DIM) == 0


@pytest.mark.parametrize("rotary_dim", [DIM, DIM // 2, 2, 0])
def test_partners(rotary_dim):
    half = rotary_dim // 2
    want = [*range(half, rotary_dim), *range(half), *range(rotary_dim, DIM)]
    got = rope.partners(DIM, rotary_dim)
    assert got.tolist() == want and torch.equal(got[got], torch.arange(DIM))


@pytest.mark.parametrize("kind", SCALINGS)
def test_pair_norms_do_not_turn(kind):
    rotary, x = table(kind), vectors(2, 3, LENGTH, DIM)
    norms = rope.pair_norms(x, DIM)
    factor = torch.hypot(rotary[0], rotary[1])[:, None]
    assert_close(rope.pair_norms(rope.rotate(x, rotary), DIM), norms * factor, FORMULA)
    assert torch.equal(norms[..., : DIM // 2], norms[..., DIM // 2 :])
    assert error(rope.rotate(x, rotary).abs(), x.abs() * factor) > 0.1  # channels by themselves do turn
    interleaved = x.unflatten(-1, (-1, 2)).norm(dim=-1)
    turned = rope.rotate(x, rotary).unflatten(-1, (-1, 2)).norm(dim=-1)
    assert error(turned, interleaved * factor[..., ::2]) > 0.1  # and so do wrong pairs


def test_pair_norms_of_partial_rotary():
    rotary, _ = partial()
    x = vectors(2, 3, LENGTH, DIM)
    norms = rope.pair_norms(x, DIM // 2)
    assert_close(rope.pair_norms(rope.rotate(x, rotary), DIM // 2), norms, within(torch.float32, 1))
    assert torch.equal(norms[..., DIM // 2 :], x[..., DIM // 2 :].abs())


def frequencies(kind, positions=None):
    """Angle per position of each pair as the model has it, from its own buffer."""
    config = LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM, max_position_embeddings=64,
        rope_parameters={"rope_theta": 100.0, **SCALINGS[kind]},
    )  # fmt: skip
    module = LlamaRotaryEmbedding(config)
    module(torch.empty(1), torch.arange(LENGTH)[None] if positions is None else positions)
    if kind == "longrope":
        return 1.0 / (torch.tensor(SCALINGS[kind]["long_factor"]) * 100.0 ** (torch.arange(0, DIM, 2) / DIM))
    return module.inv_freq


@pytest.mark.parametrize("kind", SCALINGS)
def test_angle_step_is_the_models_frequency(kind):
    step = rope.angle_step(table(kind))
    assert step.shape == (1, DIM // 2)
    assert_close(step[0], frequencies(kind), CLOSE)


def test_angle_step_of_rounded_tables():
    """512 positions on, the step read off bfloat16 tables of 1,024 positions is right; off two neighbours it is not."""
    positions = torch.arange(1024)[None]
    rotary, want = table("llama3", positions, torch.bfloat16), frequencies("llama3", positions)
    step = rope.angle_step(rotary)[0]
    two = rope.angle_step(tuple(x[:, -2:] for x in rotary))[0]
    assert float(((step - want) * 512).abs().max()) < 0.02
    assert float(((two - want) * 512).abs().max()) > 0.5


def test_angle_step_sees_through_padding():
    """Left padding at position 1, right padding at 0, each row by itself; a row of one token gets 0."""
    places = torch.tensor([[1] * 9 + list(range(15)), [*range(11), *[0] * 13], list(range(24)), [1] * 23 + [0]])
    rotary = table(positions=places)
    known = torch.where(
        torch.tensor([[0] * 9 + [1] * 15, [1] * 11 + [0] * 13, [1] * 24, [0] * 23 + [1]]) > 0, places, -1
    )
    step, want = rope.angle_step(rotary, known), frequencies("default")
    assert is_close(step[:3], want.expand(3, -1), CLOSE) and bool((step[3] == 0).all())
    for row in range(4):
        alone = rope.angle_step(tuple(x[row : row + 1] for x in rotary), known[row : row + 1])
        assert torch.equal(alone[0], step[row])
    assert float((rope.angle_step(rotary)[1] - want).abs().max()) > 0.1  # columns of padding taken for positions


def test_one_position_tells_no_step():
    with pytest.raises(ValueError, match="neighbouring"):
        rope.angle_step(table(positions=torch.tensor([[7]])))


@pytest.mark.parametrize("count", [1, 5, 32])
@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "dynamic"])  # that one turns with the length
def test_mean_rotation_is_the_mean_of_rotations(kind, count):
    positions = torch.arange(LENGTH + count)[None]
    whole = table(kind, positions)
    now, ahead = tuple(x[:, :LENGTH] for x in whole), tuple(x[:, LENGTH:] for x in whole)
    x = vectors(2, 3, 1, DIM)
    want = rope.rotate(x.expand(-1, -1, count, -1), ahead).mean(2, keepdim=True)
    mean = rope.mean_rotation(now, rope.angle_step(now), count)
    assert mean[0].shape == mean[1].shape == (1, 1, DIM)
    assert_close(rope.rotate(x, mean), want, CLOSE)
    assert error(rope.rotate(x, tuple(t[:, -1:] for t in now)), want) > 0.05  # where the last position stands
    if count > 1:
        late = rope.mean_rotation(now, rope.angle_step(now), count + 1)
        assert error(rope.rotate(x, late), want) > 0.01


def test_mean_rotation_starts_at_each_rows_own_end():
    places = torch.tensor([[*range(11), *[0] * 13], list(range(24))])
    known = places.masked_fill(torch.tensor([[1] * 11 + [0] * 13, [1] * 24]) == 0, -1)
    rotary = table(positions=places)
    step = rope.angle_step(rotary, known)
    cos, sin = rope.mean_rotation(rotary, step, 3, known)
    for row, length in enumerate((11, 24)):
        angles = (length + torch.arange(3))[:, None] * frequencies("default")
        for got, want in ((cos, angles.cos()), (sin, angles.sin())):
            assert_close(got[row, 0, : DIM // 2], want.mean(0), SAME)
            assert torch.equal(got[row, 0, : DIM // 2], got[row, 0, DIM // 2 :])


def test_mean_rotation_of_partial_rotary_leaves_the_rest():
    rotary, _ = partial()
    mean = rope.mean_rotation(rotary, rope.angle_step(rotary), 8)
    x = vectors(1, 2, 1, DIM)
    got = rope.rotate(x, mean)
    assert torch.equal(got[..., DIM // 2 :], x[..., DIM // 2 :])
    pair = torch.complex(x[..., :1], x[..., 4:5]) * torch.complex(mean[0][0, 0, 0], mean[1][0, 0, 0])
    assert_close(torch.cat([got[..., :1], got[..., 4:5]], -1), torch.cat([pair.real, pair.imag], -1), FORMULA)


def test_a_default_device_of_ones_own_does_not_matter():
    """The probe of a model's rotation is made on the CPU, whatever new tensors are made on."""
    with torch.device("meta"):
        assert rope.copies(lambda x, cos, sin: rope.rotate(x, (cos, sin)), 8, 8) == 1
