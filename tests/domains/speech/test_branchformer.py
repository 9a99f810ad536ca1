# SPDX-License-Identifier: Apache-2.0
"""Branchformer against its formulas in float64, written out over frames and taps."""

import math

import pytest
import torch

from manyheads.domains.speech.branchformer import (
    AdditiveAttention,
    Block,
    Branchformer,
    ConvGatingMLP,
    Merge,
    RelativeAttention,
)
from manyheads.errors import UserError
from manyheads.spec import parse
from tolerance import DEEP, FORMULA, PROJECTED, error, is_close, is_far


class Task:
    """As much of a task as a block asks for."""

    dim, layers, heads, dropout = 16, 2, 2, 0.0

    def around(self, blocks):
        return torch.nn.ModuleList(blocks)


B, T, D, H = 2, 9, 16, 2
MASK = torch.ones(B, T, dtype=torch.bool)
MASK[1, 6:] = False


def there(x):
    """What stands where speech is."""
    return x[MASK]


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


def randomised(module):
    """Every parameter drawn, so that none hides by starting at 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module.double().eval()


def relative_reference(a, x):
    """score (i, j) = ((q_i + u) k_j + (q_i + v) W_r r_{i-j}) / sqrt(d), one query and one key at a time."""
    q, k, v = a.qkv(x).chunk(3, -1)
    d, out = D // H, torch.zeros_like(x)
    rates = [10_000 ** (-2 * c / D) for c in range(D // 2)]

    def position(distance):
        r = [f(distance * rate) for rate in rates for f in (math.sin, math.cos)]
        return a.position(torch.tensor(r, dtype=torch.float64))

    for b in range(B):
        keys = [j for j in range(T) if MASK[b, j]]
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            for i in range(T):
                scores = torch.stack([
                    (q[b, i, part] + a.u[h, 0]) @ k[b, j, part] + (q[b, i, part] + a.v[h, 0]) @ position(i - j)[part]
                    for j in keys
                ])  # fmt: skip
                weights = (scores / math.sqrt(d)).softmax(0)
                out[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, keys, strict=True))
    return a.out(out)


def test_relative_attention_is_its_formula_forward_and_backward(x):
    a = randomised(RelativeAttention(D, H))
    weights, grads = torch.randn(B, T, D, dtype=torch.float64), []
    for of in (lambda: a(x, MASK), lambda: relative_reference(a, x)):
        a.zero_grad()
        out = of()
        (there(out) * there(weights)).sum().backward()
        grads.append([there(out).detach(), *(p.grad.clone() for p in a.parameters())])
    for got, want in zip(*grads, strict=True):
        assert is_close(got, want, DEEP)
    turned = torch.flip(x, (1,))  # control: distances have a sign
    assert is_far(torch.flip(a(turned, torch.ones_like(MASK)), (1,)), a(x, torch.ones_like(MASK)), DEEP)


def test_additive_attention_is_its_formula(x):
    a = randomised(AdditiveAttention(D, H))
    q, k, v = a.qkv(x).chunk(3, -1)
    d, want = D // H, torch.zeros_like(x)
    for b in range(B):
        keys = [j for j in range(T) if MASK[b, j]]
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            alpha = torch.stack([a.of_query(q[b, j])[h] / math.sqrt(d) for j in keys]).softmax(0)
            query = sum(w * q[b, j, part] for w, j in zip(alpha, keys, strict=True))
            p = k.clone()
            for head in range(H):  # the key's score reads all heads' products
                whole = slice(head * d, (head + 1) * d)
                own = torch.stack([a.of_query(q[b, j])[head] / math.sqrt(d) for j in keys]).softmax(0)
                p[b, :, whole] = k[b, :, whole] * sum(w * q[b, j, whole] for w, j in zip(own, keys, strict=True))
            beta = torch.stack([a.of_key(p[b, j])[h] / math.sqrt(d) for j in keys]).softmax(0)
            key = sum(w * k[b, j, part] * query for w, j in zip(beta, keys, strict=True))
            want[b, :, part] = key * v[b, :, part]
    assert is_close(there(a(x, MASK)), there(a.out(want) + q), DEEP)
    assert is_far(there(a(x, MASK)), there(a.out(want)), DEEP)


def test_the_gating_mlp_is_its_formula_and_padding_does_not_reach_speech(x):
    kernel, width = 5, 6
    m = randomised(ConvGatingMLP(D, width, kernel, 0.0))
    held, gate = torch.nn.functional.gelu(m.up(x)).chunk(2, -1)
    gate = m.norm(gate)
    taps = torch.zeros_like(gate)
    for b in range(B):
        for t in range(T):
            for c in range(kernel):
                s = t + c - kernel // 2
                if 0 <= s < T and MASK[b, s]:
                    taps[b, t] += m.conv.weight[:, 0, c] * gate[b, s]
    assert is_close(there(m(x, MASK)), there(m.down(held * (taps + m.conv.bias))), PROJECTED)
    garbage = torch.where(MASK[..., None], x, 1e3)
    assert torch.equal(there(m(garbage, MASK)), there(m(x, MASK)))
    assert is_far(there(m(garbage, torch.ones_like(MASK))), there(m(x, MASK)), PROJECTED)  # as the released code would
    far = x.clone()
    far[0, 0] += 1
    changed = (m(far, MASK) != m(x, MASK)).any(-1)[0]
    assert changed[: kernel // 2 + 1].all() and not changed[kernel // 2 + 1 :].any()


def test_the_gate_starts_open(x):
    m = ConvGatingMLP(D, 6, 31, 0.0).double()
    held, _ = torch.nn.functional.gelu(m.up(x)).chunk(2, -1)
    assert error(m(x, MASK), m.down(held)) < 1e-3 < error(randomised(m)(x, MASK), m.down(held))


def test_merges_are_their_formulas(x):
    y = torch.randn_like(x)
    concat, fixed, learned = (randomised(Merge(D, kind, 0.3)) for kind in ("concat", "fixed", "learned"))
    assert is_close(concat(x, y, MASK)[0], torch.cat((x, y), -1) @ concat.out.weight.T + concat.out.bias, FORMULA)
    assert is_close(fixed(x, y, MASK)[0], fixed.out(0.7 * x + 0.3 * y), PROJECTED)
    for b in range(B):
        keys, scores = [j for j in range(T) if MASK[b, j]], []
        for branch, pool, weigh in zip((x, y), learned.pool, learned.weigh, strict=True):
            over = torch.stack([pool(branch[b, j])[0] / math.sqrt(D) for j in keys]).softmax(0)
            scores.append(weigh(sum(w * branch[b, j] for w, j in zip(over, keys, strict=True)))[0])
        w1, w2 = torch.stack(scores).softmax(0)
        out, weights = learned(x, y, MASK)
        assert is_close(out[b], learned.out(w1 * x[b] + w2 * y[b]), PROJECTED)
        assert is_close(weights[b], torch.stack((w1, w2)), PROJECTED)
        assert is_far(out[b], learned.out((x[b] + y[b]) / 2), PROJECTED)
    garbage = torch.where(MASK[..., None], x, 1e3)
    assert torch.equal(learned(garbage, y, MASK)[1], learned(x, y, MASK)[1])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_fixed_weight_of_0_or_1_is_one_branch_alone(x, share):
    block = randomised(Block(Branchformer(merge="fixed", share=share), Task(), 8, 0))
    branch, norm = (block.local, block.norms[1]) if share else (block.attention, block.norms[0])
    assert (block.attention is None, block.local is None) == (share == 1, share == 0)
    assert is_close(block(x, MASK), block.norms[2](x + block.merge.out(branch(norm(x), MASK))), PROJECTED)


def test_a_concatenation_that_ignores_the_mlp_is_attention(x):
    block = randomised(Block(Branchformer(), Task(), 8, 0))
    with torch.no_grad():
        block.merge.out.weight[:, D:] = 0
    alone = block.attention(block.norms[0](x), MASK) @ block.merge.out.weight[:, :D].T + block.merge.out.bias
    assert is_close(block(x, MASK), block.norms[2](x + alone), PROJECTED)


@pytest.mark.parametrize("fields", [{"drop": 1.0}, {"skip": (0,)}])
def test_attention_alone_is_never_left_out(x, fields):
    block = randomised(Block(Branchformer(merge="fixed", share=0.0, **fields), Task(), 8, 0)).train()
    assert is_close(block(x, MASK), block.norms[2](x + block.merge.out(block.attention(block.norms[0](x), MASK))), DEEP)
    assert block.shown.tolist() == [[1, 0], [1, 0]]


def test_all_that_a_layer_adds_is_dropped_out(x):
    class Dropping(Task):
        dropout = 1.0

    block = randomised(Block(Branchformer(), Dropping(), 8, 0)).train()
    assert is_close(block(x, MASK), block.norms[2](x), FORMULA) and is_far(
        block.eval()(x, MASK), block.norms[2](x), DEEP
    )
    m, branch = block.local.train(), block.attention.train()
    assert is_close(m(x, MASK), m.down.bias.expand_as(x), FORMULA) and is_far(
        branch(x, MASK), torch.zeros_like(x), DEEP
    )


@pytest.mark.parametrize("recipe", [Branchformer(merge="learned", drop=1.0), Branchformer(merge="fixed", drop=1.0)])
def test_branch_dropout_leaves_attention_out_of_training_alone(x, recipe):
    block = randomised(Block(recipe, Task(), 8, 0))
    without = block.norms[2](x + block.merge.out(block.local(block.norms[1](x), MASK)))
    assert is_far(block(x, MASK), without, PROJECTED)
    out = block.train()(x, MASK)
    assert is_close(out, without, PROJECTED)
    out.sum().backward()
    assert all(p.grad is None for p in block.attention.parameters()) and block.shown.tolist() == [[0, 1], [0, 1]]
    skipping = Block(Branchformer(merge="learned", skip=(1,)), Task(), 8, 1).double()
    if recipe.merge == "learned":
        skipping.load_state_dict(block.state_dict())
        assert torch.equal(skipping.eval()(x, MASK), out)


def test_a_block_has_as_many_parameters_as_published():
    """1,285,632 in a layer of 256 features, a gating MLP of 2,048 and a kernel of 31; 45.43 million in all with 24."""

    class Paper(Task):
        dim, heads = 256, 4

    block = Block(Branchformer(), Paper(), 1024, 0)
    assert sum(p.numel() for p in block.parameters()) == 1_285_632


def test_bfloat16_runs(x):
    block = Block(Branchformer(merge="learned"), Task(), 8, 0)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.float(), MASK)
    assert out.isfinite().all() and error(out, block(x.float(), MASK)) < 0.05


def test_learned_weights_are_shown():
    recipe = Branchformer(merge="learned")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = recipe.build(Task(), 8)

        def forward(self, x, mask):
            for block in self.blocks:
                x = block(x, mask)
            return x

    batch = {"inputs": torch.randn(B, T, D), "mask": MASK}
    (picture,) = recipe.pictures(Model().eval(), batch)
    assert picture.rows == ["0", "1"] and picture.columns == ["attention", "cgMLP"]
    assert all(abs(sum(row) - 1) < 1e-6 for row in picture.values)
    assert Branchformer().pictures(Model(), batch) == ()


@pytest.mark.parametrize("spec", ["branchformer:kernel=4", "branchformer:drop=0.1", "branchformer:skip=1",
                                  "branchformer:merge=sum", "branchformer:share=2"])  # fmt: skip
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="branchformer"):
        parse(spec)
    assert parse("branchformer:merge=learned,skip=0-2").skip == (0, 1, 2)
