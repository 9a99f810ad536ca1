# SPDX-License-Identifier: Apache-2.0
"""Attention over prices against its formulas in float64, one day at a time."""

import math

import pytest
import torch

from manyheads.domains.series.stock_attention import AttentiveLSTM, Block, StockAttention
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.series._returns import LastToken
from tolerance import DEEP, PROJECTED, is_close, is_far

B, L, D, H, W = 2, 7, 8, 2, 6
MASK = torch.ones(B, L, dtype=torch.bool)


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module.double().eval()


def test_a_block_is_its_formula_and_sees_nothing_later():
    block, x = randomised(Block(D, H, 12, 0.0)), torch.randn(B, L, D).double()
    w_q, w_k, w_v = block.attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = block.attention.in_proj_bias.chunk(3)
    h, d, want = block.norms[0](x), D // H, torch.zeros(B, L, D).double()
    for b in range(B):
        for t in range(L):
            for head in range(H):
                part = slice(head * d, (head + 1) * d)
                query = (w_q @ h[b, t] + b_q)[part]
                scores = torch.stack([query @ (w_k @ h[b, s] + b_k)[part] / math.sqrt(d) for s in range(t + 1)])
                values = [(w_v @ h[b, s] + b_v)[part] for s in range(t + 1)]
                want[b, t, part] = sum(a * v for a, v in zip(scores.softmax(0), values, strict=True))
    want = x + block.attention.out_proj(want)
    want = want + block.feedforward(block.norms[1](want))
    assert is_close(block(x, MASK), want, DEEP)
    later = x.clone()
    later[:, 4:] += 3
    assert is_close(block(later, MASK)[:, :4], want[:, :4], DEEP) and is_far(
        block(later, MASK)[:, 4:], want[:, 4:], DEEP
    )


def test_without_scores_attention_is_the_mean_of_the_window():
    block, x = randomised(Block(D, H, 12, 0.0)), torch.randn(B, L, D).double()
    with torch.no_grad():
        block.attention.in_proj_weight[:D] = 0
        block.attention.in_proj_bias[:D] = 0
    block(x, MASK)
    assert is_close(block.shown, torch.full((B, L), 1 / L, dtype=torch.float64), PROJECTED)


@pytest.mark.parametrize("kind", ["additive", "dot"])
def test_attention_to_the_states_is_its_formula(kind):
    model, x = randomised(AttentiveLSTM(kind, 4, D, W, 0.0)), torch.randn(B, L, 4).double()
    states = model.network(model.embed(x))[0]
    for b in range(B):
        last = states[b, -1]
        if kind == "additive":
            scores = [model.v(model.score(torch.cat((last, h))).tanh())[0] for h in states[b]]
        else:
            scores = [last @ model.score.weight @ h for h in states[b]]
        weights = torch.stack(scores).softmax(0)
        context = sum(w * h for w, h in zip(weights, states[b], strict=True))
        want = model.head(torch.cat((last, context)))[0]
        assert is_close(model(x)[b], want, DEEP) and is_close(model.shown[b], weights, DEEP)
        assert is_far(model(x)[b], model.head(torch.cat((last, states[b].mean(0))))[0], DEEP)


class Task:
    dim, layers, heads, dropout, features = D, 2, H, 0.0, 4

    def around(self, blocks):
        return LastToken(blocks, D, L)


def test_weights_are_shown_by_day():
    for model, rows in (("self", 2), ("dot", 1)):
        recipe = StockAttention(model=model)
        (picture,) = recipe.pictures(recipe.build(Task(), 12).eval(), {"inputs": torch.randn(B, L, 4)})
        assert len(picture.rows) == rows and picture.columns[-1] == "0"
        assert all(abs(sum(row) - 1) < 1e-5 for row in picture.values)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="stock_attention"):
        parse("stock_attention:model=gru")
