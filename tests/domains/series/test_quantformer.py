# SPDX-License-Identifier: Apache-2.0
"""Quantformer against its formulas in float64, and what its attention is over: a share's own periods."""

import math

import numpy as np
import pytest
import torch

from manyheads.domains.series.quantformer import Quantformer, QuantTransformer
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.training.matching import parameters_of
from tolerance import DEEP, PROJECTED, is_close, is_far

B, S, L, D, H, W, C = 2, 5, 7, 8, 2, 12, 3
MASK = torch.ones(B, S, dtype=torch.bool)


def made(attend="time", layers=2):
    torch.manual_seed(3)
    model = QuantTransformer(attend, C, D, layers, H, 0.0, W)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.double().eval()


def numbers(*shape):
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(7)).double()


def attended(module, queries, keys):
    """``[N, D]``: multi-head attention by its formula, one query and head at a time."""
    (w_q, w_k, w_v), (b_q, b_k, b_v) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    d, found = D // H, torch.zeros(len(queries), D).double()
    for t, query in enumerate(queries):
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            q = (w_q @ query + b_q)[part]
            weights = torch.stack([q @ (w_k @ key + b_k)[part] / math.sqrt(d) for key in keys]).softmax(0)
            found[t, part] = sum(a * (w_v @ key + b_v)[part] for a, key in zip(weights, keys, strict=True))
    return module.out_proj(found)


def by_formula(model, periods):
    """Logits of one share ``[L, 2]``."""
    e = periods @ model.embed.weight.T + model.embed.bias
    for layer in model.encoder:
        e = layer.norm1(e + attended(layer.self_attn, e, e))
        e = layer.norm2(e + layer.linear2(layer.linear1(e).relu()))
    d = e
    for layer in model.decoder:
        d = layer.norm1(d + attended(layer.self_attn, d, d))
        d = layer.norm2(d + attended(layer.multihead_attn, d, e))
        d = layer.norm3(d + layer.linear2(layer.linear1(d).relu()))
    return model.head(d[-1])


def released(model, x):
    """Logits ``[n, C]`` of shares ``[n, L, 2]`` in the layout of the notebook: periods first, taken for the batch."""
    return model.head(model.tokens(model.embed(x).transpose(0, 1))[-1])


@torch.no_grad()
def test_the_model_is_its_formula():
    model, x = made(), numbers(B, S, L)
    want = torch.stack([torch.stack([by_formula(model, share) for share in date]) for date in x])
    assert is_close(model(x, MASK), want, DEEP)
    assert is_far(released(model, x.flatten(0, 1)), want.flatten(0, 1), DEEP)


def test_it_has_as_many_parameters_as_the_notebooks():
    assert parameters_of(QuantTransformer("time", 3, 64, 6, 8, 0.0, 4 * 64)) == 700_803


@torch.no_grad()
def test_attention_is_over_a_shares_own_periods():
    """Other shares change nothing, each earlier period does; in the released layout it is the other way round."""
    model, x = made(), numbers(1, S, L)
    others, mask = x.clone(), MASK[:1]
    others[0, 1:] += 1
    before = model(x, mask)[0, 0]
    assert is_close(model(others, mask)[0, 0], before, DEEP)
    assert is_close(model(x[:, :1], mask[:, :1])[0, 0], before, DEEP)
    notebook = released(model, x[0])[0]
    assert is_far(released(model, others[0])[0], notebook, DEEP)
    assert is_far(released(model, x[0, :1])[0], notebook, DEEP)
    for t in range(L - 1):
        earlier = x.clone()
        earlier[0, 0, t] += 1
        assert is_far(model(earlier, mask)[0, 0], before, DEEP)
        assert is_close(released(model, earlier[0])[0], notebook, DEEP)


@torch.no_grad()
def test_over_shares_is_the_released_layout_of_a_date():
    model, x, mask = made("shares"), numbers(B, S, L), MASK.clone()
    mask[1, 3:] = False
    want = [released(model, date[there]) for date, there in zip(x, mask, strict=True)]
    found = model(x, mask)
    assert is_close(found[0], want[0], DEEP) and is_close(found[1, :3], want[1], DEEP)
    assert is_far(found[1, :3], released(model, x[1])[:3], DEEP)  # as if shares that are not there were
    garbage = x.clone()
    garbage[1, 3:] = 1e3
    assert is_close(model(garbage, mask), found, DEEP) and not found[1, 3:].any()


@torch.no_grad()
def test_the_order_of_earlier_periods_is_not_seen():
    model, x = made(), numbers(B, S, L)
    want = model(x, MASK)
    assert is_close(model(x[:, :, [3, 0, 5, 1, 4, 2, 6]], MASK), want, DEEP)
    assert is_far(model(x[:, :, [6, 1, 2, 3, 4, 5, 0]], MASK), want, DEEP)


class Given(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, inputs, mask):
        return self.logits


def test_the_loss_is_the_squared_error_of_probabilities():
    logits = torch.randn(1, 4, C, generator=torch.Generator().manual_seed(1))
    batch = {
        "inputs": None, "mask": torch.tensor([[True, True, True, False]]), "labels": torch.tensor([[0, -1, 2, -1]])
    }  # fmt: skip
    p = logits.softmax(-1)[0].double()
    eye = torch.eye(C).double()
    parts = [(p[0] - eye[0]).square(), (p[2] - eye[2]).square(), p[1].square()]
    out, zero = (float(Quantformer(between=k).loss(None, Given(logits), batch).detach()) for k in ("out", "zero"))
    assert out == pytest.approx(float(torch.stack(parts[:2]).mean()), rel=1e-6)
    assert zero == pytest.approx(float(torch.stack(parts).mean()), rel=1e-6)
    assert abs(zero - out) > 1e-3


def test_the_target_zero_pulls_to_equal_probabilities():
    batch = {"inputs": None, "mask": torch.ones(1, 1, dtype=torch.bool), "labels": torch.tensor([[-1]])}
    for start, away in ((torch.zeros(1, 1, C), False), (torch.tensor([[[1.0, 0.0, 0.0]]]), True)):
        model = Given(start)
        Quantformer(between="zero").loss(None, model, batch).backward()
        assert (float(model.logits.grad.abs().max()) > 1e-3) is away
        assert not away or int(model.logits.grad.argmax()) == 0  # the largest falls


class Task:
    dim, layers, heads, dropout, classes, top = D, 2, H, 0.0, C, 0.2


@torch.no_grad()
def test_weights_are_shown_by_period():
    batch = {"inputs": numbers(B, S, L).float(), "mask": MASK}
    torch.manual_seed(0)
    model = Quantformer().build(Task(), W).eval()
    (picture,) = Quantformer().pictures(model, batch)
    assert len(picture.rows) == 2 and picture.columns == [str(k) for k in reversed(range(L))]
    assert is_close(np.array(picture.values).sum(1), np.ones(2)) and np.std(picture.values) > 1e-4
    e = model.double().embed(batch["inputs"].double().flatten(0, 1))
    layer, d = model.encoder[0].self_attn, D // H
    q, k, _ = (e @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, -1)
    scores = torch.stack([(q[:, -1:, h * d : (h + 1) * d] * k[..., h * d : (h + 1) * d]).sum(-1) for h in range(H)])
    want = (scores / math.sqrt(d)).softmax(-1).mean((0, 1))
    assert is_close(np.array(picture.values[0]), want, PROJECTED * 2**29)  # it was computed in float32
    assert Quantformer(attend="shares").pictures(Quantformer(attend="shares").build(Task(), W), batch) == ()


def test_what_cannot_be_is_refused():
    for spec in ("quantformer:attend=batch", "quantformer:between=both"):
        with pytest.raises(UserError, match="quantformer"):
            parse(spec)
    fifths = Task()
    fifths.classes = 5
    with pytest.raises(UserError, match="leave none"):
        Quantformer(between="zero").build(fifths, W)
    assert isinstance(Quantformer(between="zero").build(Task(), W), QuantTransformer)
