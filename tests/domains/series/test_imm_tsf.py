# SPDX-License-Identifier: Apache-2.0
"""IMM-TSF against its formulas in float64, one text and one time at a time."""

import math
from types import SimpleNamespace

import pytest
import torch

from manyheads.domains.series.imm_tsf import (
    CrossAttentionFusion,
    Fused,
    GatedResidualFusion,
    ImmTsf,
    RecencyPool,
    TextAttention,
    Time2Vec,
)
from manyheads.errors import UserError
from manyheads.spec import parse
from tolerance import DEEP, FORMULA, PROJECTED, error, is_close, is_far

B, N, Q, D, C = 3, 5, 4, 8, 3
MASK = torch.ones(B, N, dtype=torch.bool)
MASK[1, 3:], MASK[2] = False, False  # the last window has no text
ASKED = torch.ones(B, Q, dtype=torch.bool)
ASKED[1, 3:] = False
NOTED = MASK.any(1)


@pytest.fixture
def given():
    texts, times = torch.randn(B, N, D).double(), -torch.rand(B, N).double().sort(-1).values
    return texts, times, MASK, torch.rand(B, Q).double().sort(-1).values


@pytest.fixture
def y():
    return torch.randn(B, Q, C).double()


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.4)
    return module.double().eval()


def test_recency_is_its_formula(given):
    texts, times, mask, queries = given
    times = times + 0.5  # some are later than times that are asked for
    assert (times[:, None] > queries[..., None]).any()
    pool = randomised(RecencyPool(D, 0.0)).requires_grad_(False)
    want = torch.zeros(B, Q, D).double()
    for b in range(B):
        for q in range(Q):
            total = 0.0
            for n in range(N):
                if mask[b, n]:
                    ago = max(float(queries[b, q] - times[b, n]), 0.0)
                    weight = math.exp(-((ago / math.exp(float(pool.log_sigma))) ** 2))
                    want[b, q] += weight * texts[b, n]
                    total += weight
            want[b, q] /= max(total, 1e-6)
    assert is_close(pool.pooled(texts, times, mask, queries), want, FORMULA)
    assert is_close(pool(texts, times, mask, queries), pool.out(want), PROJECTED)
    assert is_far(
        pool.pooled(texts, times, torch.ones_like(mask), queries)[:2], want[:2], FORMULA
    )  # padding would count


def test_recency_from_the_mean_to_the_last_text(given):
    texts, times, mask, queries = given
    pool = RecencyPool(D, 0.0).double().requires_grad_(False)
    with torch.no_grad():
        pool.log_sigma.fill_(20.0)
    mean = (texts * mask[..., None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]
    assert error(pool.pooled(*given), mean[:, None].expand(-1, Q, -1)) < 1e-12
    with torch.no_grad():
        pool.log_sigma.fill_(-2.0)
    near = torch.linspace(-3, -0.1, N, dtype=torch.float64).expand(B, N)  # the others are long ago
    last = torch.stack([texts[0, N - 1], texts[1, 2]])
    found = pool.pooled(texts, near, mask, torch.zeros(B, Q).double())
    assert error(found[:1], last[:1, None].expand(-1, Q, -1)) < 1e-3 < error(mean[:1], last[:1])
    moved = pool.pooled(texts, times + 7, mask, queries + 7)
    assert error(moved, pool.pooled(*given)) < 1e-10
    assert not found[2].any()  # without a text


def test_attention_to_texts_is_its_formula(given):
    texts, times, mask, queries = given
    a = randomised(TextAttention(D, 0.0))
    w_q, w_k, w_v = a.attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = a.attention.in_proj_bias.chunk(3)
    want = torch.zeros(B, Q, D).double()

    def code(t):
        raw = [(t * r + p).item() for r, p in zip(a.times.rates, a.times.phases, strict=True)]
        return torch.tensor([raw[0], *map(math.sin, raw[1:])], dtype=torch.float64)

    for b in range(2):
        known = [a.embed(torch.cat((texts[b, n], code(times[b, n])))) for n in range(N) if mask[b, n]]
        for q in range(Q):
            query = a.ask(torch.cat((a.query, code(queries[b, q]))))
            scores = torch.stack([(w_q @ query + b_q) @ (w_k @ k + b_k) / math.sqrt(D) for k in known]).softmax(0)
            mixed = sum(s * (w_v @ k + b_v) for s, k in zip(scores, known, strict=True))
            want[b, q] = a.out(a.attention.out_proj(mixed) + query)
    assert is_close(a(*given), want, DEEP)
    order = torch.tensor([2, 0, 1, 3, 4])
    assert is_close(a(texts[:, order], times[:, order], mask, queries), want, DEEP)  # texts are a set with times
    assert is_far(a(texts[:, order], times, mask, queries)[:2], want[:2], DEEP)
    garbage = torch.where(mask[..., None], texts, 1e3)
    assert torch.equal(a(garbage, times, mask, queries), a(*given))


def test_texts_say_other_things_of_other_times_and_the_released_form_does_not(given):
    spread = [a(*given)[:2].std(1).max() for a in (randomised(TextAttention(D, 0.0, by)) for by in (True, False))]
    assert spread[0] > 1e-3 and spread[1] < 1e-12


def test_hidden_texts_have_no_gradient(given):
    texts, times, mask, queries = given
    for timed in (randomised(TextAttention(D, 0.0)), randomised(RecencyPool(D, 0.0))):
        own = texts.clone().requires_grad_()
        timed(own, times, mask, queries).square().sum().backward()
        assert not own.grad[~mask].any() and own.grad[mask].any()


def test_the_gated_residual_is_its_formula(y):
    texts = torch.randn(B, Q, D).double()
    f = randomised(GatedResidualFusion(C, D, 0.0))
    r = f.recurrent
    want = torch.zeros_like(y)
    for b in range(B):
        h = torch.zeros(C).double()
        for q in range(Q):
            u = torch.cat((y[b, q], texts[b, q]))
            i, o = r.weight_ih_l0 @ u + r.bias_ih_l0, r.weight_hh_l0 @ h + r.bias_hh_l0
            reset, update = (i[:C] + o[:C]).sigmoid(), (i[C : 2 * C] + o[C : 2 * C]).sigmoid()
            h = (1 - update) * (i[2 * C :] + reset * o[2 * C :]).tanh() + update * h
            change = f.residual[1](f.residual[0](h))
            gate = (f.gate.weight @ u + f.gate.bias).sigmoid() if NOTED[b] else torch.ones(C)
            want[b, q] = gate * y[b, q] + (1 - gate) * (y[b, q] + change)
    assert is_close(f(y, texts, ASKED, NOTED), want, DEEP)
    assert torch.equal(f(y, texts, ASKED, NOTED)[2], y[2])
    assert is_far(f(y, texts, ASKED, torch.ones_like(NOTED))[2], y[2], DEEP)


def test_the_cross_attention_is_its_formula(y):
    texts, kappa = torch.randn(B, Q, D).double(), 0.7
    f = randomised(CrossAttentionFusion(C, D, 0.0, kappa))
    w_q, w_k, w_v = f.attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = f.attention.in_proj_bias.chunk(3)
    want = y.clone()
    for b in range(2):
        keys = [n for n in range(Q) if ASKED[b, n]]
        for q in range(Q):
            query = w_q @ f.q(y[b, q]) + b_q
            scores = torch.stack([query @ (w_k @ f.k(texts[b, n]) + b_k) / math.sqrt(D) for n in keys]).softmax(0)
            mixed = sum(s * (w_v @ f.v(texts[b, n]) + b_v) for s, n in zip(scores, keys, strict=True))
            change = f.residual[1](f.residual[0](f.attention.out_proj(mixed)))
            want[b, q] = (y[b, q] + kappa * change) / (1 + kappa)
    assert is_close(f(y, texts, ASKED, NOTED)[ASKED], want[ASKED], DEEP)
    assert torch.equal(f(y, texts, ASKED, NOTED)[2], y[2])  # as released it would be y / (1 + kappa)
    f.kappa = 0.0
    assert torch.equal(f(y, texts, ASKED, NOTED), y)
    f.kappa = 1e9
    assert error(f(y, texts, ASKED, NOTED)[0], (want[0] * (1 + kappa) - y[0]) / kappa) < 1e-6


def test_one_variable_keeps_its_residual():
    f = randomised(GatedResidualFusion(1, D, 0.0))
    y, texts = torch.randn(1, Q, 1).double(), torch.randn(1, Q, D).double()
    change = (f(y, texts, ASKED[:1], NOTED[:1]) - y)[0, :, 0]
    assert change.std() > 1e-3  # a LayerNorm over one number leaves a constant


class Task:
    dim, dropout, channels, text_width = D, 0.0, C, 6

    def reference(self, width, kind):
        return Same(kind)


class Same(torch.nn.Module):
    def __init__(self, kind=""):
        super().__init__()
        self.kind = kind

    def forward(self, batch):
        return batch["y"]


@pytest.mark.parametrize("spec", ["imm_tsf", "imm_tsf:ttf=attention", "imm_tsf:mmf=cross",
                                  "imm_tsf:ttf=attention,mmf=cross,query=constant"])  # fmt: skip
def test_own_texts_and_the_placebo(spec, y, given):
    recipe = parse(spec)
    _, times, mask, queries = given
    notes, placebo = (torch.randn(B, N, 6).double() for _ in range(2))
    batch = {"y": y, "notes": notes, "placebo": placebo, "note_times": times, "note_mask": mask, "queries": queries,
             "asked": ASKED, "mask": None}  # fmt: skip
    model = randomised(Fused(recipe, Task(), Same()))
    other = Fused(parse(f"{spec},notes=shuffled" if ":" in spec else f"{spec}:notes=shuffled"), Task(), Same())
    other.double().eval().load_state_dict(model.state_dict())
    assert is_far(model(batch)[:2], y[:2], DEEP) and torch.equal(model(batch)[2], y[2])
    assert is_far(other(batch)[:2], model(batch)[:2], DEEP)
    if recipe.query == "times":
        assert is_far(model({**batch, "queries": queries + 0.3})[:2], model(batch)[:2], DEEP)
    assert torch.equal(other({**batch, "placebo": notes}), model(batch))
    nothing = {**batch, "note_mask": torch.zeros(B, 0, dtype=torch.bool), "notes": notes[:, :0],
               "placebo": notes[:, :0], "note_times": times[:, :0]}  # fmt: skip
    assert torch.equal(model(nothing), y)


@pytest.mark.parametrize("ttf", ["recency", "attention"])
@torch.no_grad()
def test_weights_of_a_windows_texts_are_shown(ttf, y, given):
    """Of the window with most texts; and none where a batch has no text, though one before had some."""
    recipe = ImmTsf(ttf=ttf, backbone="dlinear")
    model = recipe.build(Task(), 16).double().eval()
    assert model.forecaster.kind == "dlinear"
    _, times, mask, queries = (one.flip(0) for one in given)  # the first window has no text
    batch = {"y": y, "notes": torch.randn(B, N, 6).double(), "note_times": times, "note_mask": mask,
             "queries": queries, "asked": ASKED, "windows": [SimpleNamespace(days=10)] * B}  # fmt: skip
    (picture,) = recipe.pictures(model, batch)
    assert picture.columns == [f"{10 * float(t):.1f}" for t in times[2]]
    assert picture.rows == [f"{10 * float(t):.1f}" for t in queries[2]]
    assert is_close(torch.tensor(picture.values), model.timed.shown[2].float(), PROJECTED)
    assert is_far(torch.tensor(picture.values).std(1), torch.zeros(Q), PROJECTED)
    nothing = {**batch, "note_mask": mask[:, :0], "notes": batch["notes"][:, :0], "note_times": times[:, :0]}
    assert recipe.pictures(model, nothing) == ()


def test_time2vec_has_one_linear_feature():
    code = Time2Vec(4).double()
    t = torch.linspace(-1, 1, 7, dtype=torch.float64)
    bend = code(t).diff(dim=0).diff(dim=0).abs().amax(0)
    assert bend[0] < 1e-12 < 1e-6 < bend[1:].min()


def test_what_cannot_be_is_refused():
    for spec in ("imm_tsf:kappa=-1", "imm_tsf:ttf=mean", "imm_tsf:backbone=gru"):
        with pytest.raises(UserError, match="imm_tsf"):
            parse(spec)
    assert parse("imm_tsf:kappa=2") == ImmTsf(kappa=2.0)
