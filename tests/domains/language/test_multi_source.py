# SPDX-License-Identifier: Apache-2.0
"""Four combinations of sources against their formulas in float64, and the cases in which they are one another."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from manyheads.attention.multihead import MultiHead
from manyheads.domains.language.multi_source import Combination, MultiSource
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.language._translator import OneSource
from tolerance import DEEP, FORMULA, PROJECTED, is_close, is_far

B, T, D, H, SIZES = 3, 4, 8, 2, (5, 7)
KINDS = ("serial", "parallel", "flat", "hierarchical")
each = pytest.mark.parametrize("kind", KINDS)


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double().eval()


def combination(kind, sources=2):
    torch.manual_seed(1)
    return randomised(Combination(D, H, 0.0, sources, kind))


@pytest.fixture
def given():
    """Words, states of two sources, and masks that end at other places."""
    torch.manual_seed(0)
    states = [torch.randn(B, size, D, dtype=torch.float64) for size in SIZES]
    ends = ([5, 3, 1], [2, 7, 4])
    masks = [torch.arange(size) < torch.tensor(end)[:, None] for size, end in zip(SIZES, ends, strict=True)]
    return torch.randn(B, T, D, dtype=torch.float64), states, masks


def normed(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def attended(layer, q, x, mask):
    """MHA(q, x), one query and one head at a time."""
    q, k, v = (y @ project.weight.T + project.bias for project, y in ((layer.q, q), (layer.k, x), (layer.v, x)))
    out, d = torch.zeros_like(q), D // H
    for n in range(len(q)):
        for t in range(q.shape[1]):
            for h in range(H):
                at = slice(h * d, h * d + d)
                seen = [s for s in range(x.shape[1]) if mask[n, s]]
                scores = [math.exp(float(q[n, t, at] @ k[n, s, at]) / math.sqrt(d)) for s in seen]
                out[n, t, at] = sum(w / sum(scores) * v[n, s, at] for w, s in zip(scores, seen, strict=True))
    return out @ layer.out.weight.T + layer.out.bias


def formula(kind, c, q, states, masks):
    if kind == "serial":
        for norm, attend, h, mask in zip(c.norms, c.attend, states, masks, strict=True):
            q = q + attended(attend, normed(q, norm), h, mask)
        return q
    asked = normed(q, c.norms[0])
    if kind == "flat":
        every = torch.cat([h @ p.weight.T + p.bias for p, h in zip(c.project, states, strict=True)], 1)
        return q + attended(c.attend[0], asked, every, torch.cat(masks, 1))
    contexts = [attended(a, asked, h, mask) for a, h, mask in zip(c.attend, states, masks, strict=True)]
    if kind == "parallel":
        return q + sum(contexts)
    out = torch.zeros_like(q)
    for t in range(T):
        both = torch.stack([context[:, t] for context in contexts], 1)
        out[:, t] = attended(c.choose, asked[:, t : t + 1], both, torch.ones(B, 2))[:, 0]
    return q + out


def _shared(one, other):
    """Parameters of one that another has too."""
    return {name: x for name, x in one.state_dict().items() if name in other.state_dict()}


@each
def test_the_formula(kind, given):
    c = combination(kind)
    got = c(*given)
    assert is_close(got, formula(kind, c, *given), DEEP)
    for other in set(KINDS) - {kind}:
        wrong = combination(other)
        wrong.load_state_dict(wrong.state_dict() | _shared(c, wrong))
        assert is_far(wrong(*given), got, DEEP), other
    q, states, masks = given
    assert is_far(c(q, states, [torch.ones_like(m) for m in masks]), got, DEEP)  # padding seen


@each
def test_of_one_source_all_are_the_usual_attention(kind, given):
    q, states, masks = given
    c, one = combination(kind, 1), randomised(OneSource(D, H, 0.0))
    one.norm, one.attend = c.norms[0], c.attend[0]
    got, usual = c(q, states[:1], masks[:1]), one(q, states[:1], masks[:1])
    if kind == "flat":
        usual = one(q, [c.project[0](states[0])], masks[:1])
    if kind == "hierarchical":  # the softmax of one is 1: a linear map of the context
        usual = q + c.choose.out(c.choose.v(usual - q))
    assert is_close(got, usual, DEEP) and is_far(got, q, DEEP)


@each
def test_only_serial_has_an_order(kind, given):
    q, states, masks = given
    c = combination(kind)
    turned = copy.deepcopy(c)
    for name in ("attend", "norms", "project"):
        if len(parts := getattr(c, name, ())) == 2:
            setattr(turned, name, torch.nn.ModuleList(list(parts)[::-1]))
    assert is_close(turned(q, states[::-1], masks[::-1]), c(q, states, masks), DEEP) == (kind != "serial")
    assert is_far(c(q, [states[0], states[1].flip(0)], masks), c(q, states, masks), DEEP)  # control


@each
def test_a_source_that_is_not_there_is_as_if_it_had_never_been(kind, given):
    """Whatever stands in its place, and where it is missing for some only."""
    q, states, masks = given
    c, alone = combination(kind), combination(kind, 1)
    alone.load_state_dict(_shared(c, alone))
    missing = torch.zeros_like(masks[1])
    want = alone(q, states[:1], masks[:1])
    assert is_close(c(q, states, [masks[0], missing]), want, DEEP)
    assert is_close(c(q, [states[0], 1e3 * states[1]], [masks[0], missing]), want, DEEP)
    assert is_far(c(q, states, masks), want, DEEP)
    some = masks[1].clone()
    some[0] = False
    got = c(q, states, [masks[0], some])
    assert is_close(got[0], want[0], DEEP) and is_close(got[1:], c(q, states, masks)[1:], DEEP)


def test_a_source_twice(given):
    """Flat attention is left as it was by a source that is there twice; parallel adds its context twice."""
    q, states, masks = given
    for kind, times in (("flat", 1), ("parallel", 2)):
        c, alone = combination(kind), combination(kind, 1)
        names = [name for name in ("attend", "project") if len(getattr(c, name, ())) == 2]
        for name in names:
            getattr(c, name)[1].load_state_dict(getattr(c, name)[0].state_dict())
        alone.load_state_dict(_shared(c, alone))
        got = c(q, [states[0]] * 2, [masks[0]] * 2) - q
        assert is_close(got, times * (alone(q, states[:1], masks[:1]) - q), DEEP)


@each
def test_shares_of_sources(kind, given):
    q, states, masks = given
    c = combination(kind)
    plain = c(q, states, masks)
    assert not c.shares.numel()
    c.show = True
    assert torch.equal(c(q, states, masks), plain)
    assert c.shares.shape == (B, T, 2) and is_close(c.shares.sum(-1), torch.ones(B, T), DEEP)
    both = c.shares
    c(q, states, [masks[0], torch.zeros_like(masks[1])])
    assert is_close(c.shares[..., 0], torch.ones(B, T), DEEP) and is_far(both[..., 0], torch.ones(B, T), DEEP)


def test_what_sees_nothing_gets_nothing():
    torch.manual_seed(0)
    layer, q, x = randomised(MultiHead(D, H, 0.0)), torch.randn(2, 3, D).double(), torch.randn(2, 4, D).double()
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 1] = False
    layer.show = True
    got = layer(q, x, mask)
    assert not got[0, 1].any() and not layer.shown[0, 1].any() and got[0, 0].any()
    assert is_close(layer.shown[1].sum(-1), torch.ones(3), FORMULA)
    rows = attended(layer, q[1:], x[1:], torch.ones(1, 4))
    assert is_close(got[1:], rows, PROJECTED) and is_far(got[:1], rows, PROJECTED)


class Told:
    """A task that draws what is given, and says what it is asked with."""

    def __init__(self, batch):
        self.batch = batch

    def draw(self, rng, samples):
        return samples

    def collate(self, samples):
        return self.batch

    def predict(self, model, batch):
        return batch


def batch_of(rows, there=None):
    numbers = torch.arange(rows * 3).reshape(rows, 3)
    made = {f"{name}_{i}": numbers + 100 * i for i in range(2) for name in ("source", "mask")}
    return {**made, "there": torch.ones(rows, 2, dtype=torch.bool) if there is None else there}


def test_sources_are_left_out_while_training_and_never_all():
    there = torch.ones(4000, 2, dtype=torch.bool)
    there[:100, 1] = False
    batch = batch_of(4000, there)
    kept = parse("multi_source:source_dropout=0.3").batches(Told(batch), np.random.default_rng(0), ())["there"]
    assert kept.any(1).all() and not kept[:100, 1].any() and kept[:100, 0].all()
    both = kept[100:].all(1).double().mean()
    assert abs(float(both) - (0.7**2 + 0.3**2)) < 2 * math.sqrt(0.25 / 3900)  # where both would go, both stay
    assert torch.equal(parse("multi_source").batches(Told(batch), np.random.default_rng(0), ())["there"], there)


def test_sources_are_shuffled_or_missing_when_judged():
    there = torch.tensor([[True, True], [True, False], [True, True]])
    batch = batch_of(3, there)
    found = parse("multi_source:shuffled=2").predict(Told(batch), None, batch)
    assert torch.equal(found["source_1"], batch["source_1"].roll(1, 0))
    assert torch.equal(found["source_0"], batch["source_0"])
    assert torch.equal(found["mask_1"], batch["mask_1"].roll(1, 0))
    assert found["there"].tolist() == [[True, True], [True, True], [True, False]]
    found = parse("multi_source:missing=1").predict(Told(batch), None, batch)
    assert not found["there"][:, 0].any() and torch.equal(found["there"][:, 1], there[:, 1])
    assert batch["there"] is there and there[:, 0].all()  # what was given is left as it was
    with pytest.raises(UserError, match="there are 2 sources"):
        parse("multi_source:missing=3").predict(Told(batch), None, batch)


def test_wrong_fields_are_refused():
    with pytest.raises(UserError, match="serial, parallel, flat or hierarchical"):
        MultiSource(combination="sum")
    for fields in ({"source_dropout": 1.0}, {"shuffled": -1}):
        with pytest.raises(UserError, match="number a source"):
            MultiSource(**fields)


def test_it_builds_what_it_says():
    asked = {}
    told = {"translator": lambda width, block: asked.update(made=block())}
    task = SimpleNamespace(dim=D, heads=H, dropout=0.0, sources=3, **told)
    MultiSource(combination="serial").build(task, 5)
    assert asked["made"].kind == "serial" and len(asked["made"].attend) == len(asked["made"].norms) == 3
