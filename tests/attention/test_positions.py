# SPDX-License-Identifier: Apache-2.0
"""Rotary tables, dynamic NTK, ALiBi and T5's buckets against transformers and their formulas."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from manyheads.attention.positions import alibi_bias, alibi_slopes, dynamic_ntk, rope_tables, t5_buckets
from manyheads.attention.rope import rotate
from tolerance import assert_close, error

TRAINED = 32


def llama(length, **scaling):
    """Cosines and sines of transformers for a sequence of ``length`` tokens."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **scaling}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=TRAINED, rope_parameters=rope)
    return LlamaRotaryEmbedding(config)(torch.zeros(1, length, 64), torch.arange(length)[None])


def test_tables_are_the_models():
    for mine, theirs in zip(rope_tables(torch.arange(90)[None], 16), llama(90), strict=True):
        assert_close(mine, theirs)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind(0)

    def score(t, s, theta=10_000.0):
        return (
            rotate(q, rope_tables(torch.tensor([[t]]), 8, theta)) * rotate(k, rope_tables(torch.tensor([[s]]), 8))
        ).sum()

    assert abs(score(7, 3) - score(1007, 1003)) < 1e-5
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
    assert abs(score(7, 3, 100.0) - score(1007, 1003, 100.0)) > 1e-3  # control: q and k of two bases


def test_a_base_for_each_row():
    positions = torch.arange(9).expand(2, -1)
    both = rope_tables(positions, 8, torch.tensor([10_000.0, 500.0]))
    for row, theta in enumerate((10_000.0, 500.0)):
        alone = rope_tables(positions[:1], 8, theta)
        assert all(torch.equal(x[row], y[0]) for x, y in zip(both, alone, strict=True))


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_dynamic_ntk(factor):
    short = dynamic_ntk(10_000.0, 16, torch.arange(1, TRAINED + 1), TRAINED, factor)
    assert torch.equal(short, torch.full_like(short, 10_000.0))
    for length in (TRAINED, TRAINED + 1, 3 * TRAINED):
        theta = dynamic_ntk(10_000.0, 16, length, TRAINED, factor)
        mine = rope_tables(torch.arange(length)[None], 16, theta)
        for x, y in zip(mine, llama(length, rope_type="dynamic", factor=factor), strict=True):
            assert_close(x, y)
        if length > TRAINED:
            assert error(rope_tables(torch.arange(length)[None], 16)[0], mine[0]) > 1e-3


def test_alibi():
    assert_close(alibi_slopes(8), torch.tensor([2.0**-h for h in range(1, 9)]))
    bias = alibi_bias(torch.tensor([[4, 5]]), torch.tensor([[3, 4, 5]]), 8)
    assert bias.shape == (1, 8, 2, 3)
    assert_close(bias[0, 0], torch.tensor([[-0.5, 0.0, 0.5], [-1.0, -0.5, 0.0]]))
    moved = alibi_bias(torch.tensor([[104, 105]]), torch.tensor([[103, 104, 105]]), 8)
    assert_close(moved, bias)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 64), (32, 1000)])
def test_t5_buckets(causal, buckets, furthest):
    apart = torch.arange(-2000, 2001)[None]
    want = T5Attention._relative_position_bucket(apart, not causal, buckets, furthest)
    assert torch.equal(t5_buckets(apart, buckets, furthest, causal), want)
    assert not torch.equal(t5_buckets(apart - 1, buckets, furthest, causal), want)
    assert not torch.equal(t5_buckets(-apart, buckets, furthest, causal), want)
