# SPDX-License-Identifier: Apache-2.0
"""Adaptors of cross-attention: they begin as the model, compute what the formula says, and leave nothing behind."""

import pytest
import torch
from diffusers.models.attention_processor import Attention

from manyheads import UserError, parse
from manyheads.calls.low_rank import parameter_name
from manyheads.conditioning import AdaptedSite
from manyheads.data import scenes as data
from manyheads.integrations.adapted import adapted, adaptor_of, cross_attention
from manyheads.models.scenes import build
from manyheads.recipes import new_object
from tolerance import assert_close, is_far

ROUND = 1e-12
SPECS = ("comcat.adaptor", "comcat.lora", "comcat.lora:rank=0,parts=kv")
X, TEXT = torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(2, 3, 10, dtype=torch.float64)


class Small(torch.nn.Module):
    """A denoiser of one cross-attention of 3 heads, beside one that looks at itself."""

    def __init__(self):
        super().__init__()
        self.own = Attention(12, heads=3, dim_head=4)
        self.cross = Attention(12, cross_attention_dim=10, heads=3, dim_head=4)

    def forward(self, x, text):
        return self.cross(x, encoder_hidden_states=text)


def moved(adaptor):
    with torch.no_grad():
        for i, p in enumerate(adaptor.parameters()):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
    return adaptor


@pytest.fixture(scope="module")
def model():
    return Small().double().requires_grad_(False)


@pytest.mark.parametrize("spec", SPECS)
def test_it_begins_as_the_model_and_leaves_it_so(model, spec):
    before, processor = model(X, TEXT), model.cross.processor
    adaptor = adaptor_of(model, parse(spec))
    with adapted(model, adaptor):
        assert_close(model(X, TEXT), before, ROUND)
        moved(adaptor)
        assert is_far(model(X, TEXT).detach(), before, 0.01)
        model(X, TEXT).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adaptor.parameters())
    assert model.cross.processor is processor and torch.equal(model(X, TEXT), before)
    with pytest.raises(ZeroDivisionError), adapted(model, adaptor):
        raise ZeroDivisionError
    assert model.cross.processor is processor


def test_a_branch_adds_to_the_products_of_each_head(model):
    adaptor = moved(adaptor_of(model, parse("comcat.adaptor:rank=2"))).requires_grad_(False)
    own = adaptor[parameter_name("cross")]
    w = {name: getattr(model.cross, f"to_{name}").weight for name in "qkv"} | {"o": model.cross.to_out[0].weight}
    want = model.cross.to_out[0].bias.expand(2, 9, 12).clone()
    for h in range(3):
        rows, more = slice(4 * h, 4 * h + 4), slice(2 * h, 2 * h + 2)
        qk = w["q"][rows].mT @ w["k"][rows] + own.q.weight[more].mT @ own.k.weight[more]
        ov = w["o"][:, rows] @ w["v"][rows] + own.o.weight[:, more] @ own.v.weight[more]
        want += (X @ qk @ TEXT.mT / 4**0.5).softmax(-1) @ TEXT @ ov.mT
    with adapted(model, adaptor):
        assert_close(model(X, TEXT), want, ROUND)
    assert sum(p.numel() for p in adaptor.parameters()) == 2 * 3 * 2 * (12 + 10)


@pytest.mark.parametrize(("spec", "count"), [("rank=2", 2 * (24 + 22 + 22 + 24)), ("rank=0,parts=kv", 2 * 120)])
def test_a_change_is_added_to_each_projection(model, spec, count):
    adaptor = moved(adaptor_of(model, parse(f"comcat.lora:{spec}"))).requires_grad_(False)
    assert sum(p.numel() for p in adaptor.parameters()) == count
    changed = Small().double().requires_grad_(False)
    changed.load_state_dict(model.state_dict())
    for part, change in adaptor[parameter_name("cross")].changes.items():
        module = changed.cross.to_out[0] if part == "o" else getattr(changed.cross, f"to_{part}")
        module.weight += change[1].weight @ change[0].weight if len(list(change.children())) else change.weight
    with adapted(model, adaptor):
        assert_close(model(X, TEXT), changed(X, TEXT), ROUND)


def test_sites_are_those_that_look_at_the_caption(model):
    assert list(cross_attention(model)) == ["cross"]
    site = AdaptedSite(12, 10, 3, 4)
    assert parse("comcat.adaptor").branches({"cross": site})["cross"].q.weight.shape == (6, 12)
    with pytest.raises(UserError, match="no cross-attention"):
        cross_attention(model.own)
    odd = Small()
    odd.cross.residual_connection = True
    with pytest.raises(UserError, match="more than attention"):
        cross_attention(odd)
    with pytest.raises(UserError, match="other layers"), adapted(model, torch.nn.ModuleDict()):
        pass
    with adapted(model, adaptor_of(model, parse("comcat.adaptor"))), pytest.raises(UserError, match="without a mask"):
        model.cross(X, encoder_hidden_states=TEXT, attention_mask=torch.zeros(2, 1, 3))
    for spec, said in (("adaptor:rank=0", "at least 1"), ("lora:rank=-1", "0 or more"), ("lora:parts=x", "q, k, v")):
        with pytest.raises(UserError, match=said):
            parse(f"comcat.{spec}")


@pytest.mark.skipif(not data.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
def test_a_training_moves_the_adaptor_alone_and_is_kept(tmp_path):
    pipe = build("unet", block_out_channels=(8, 8), norm_num_groups=4)
    frozen = [p.clone() for p in pipe.denoiser.parameters()]
    strategy = new_object.adaptor_strategy("comcat.adaptor")
    sprite = data.new_object("1f680")
    shown = new_object.pictures(3, torch.Generator().manual_seed(0), sprite)
    assert bool((shown.captions[:, 0] == data.WORDS.index("down")).all()) and float(shown.alpha.max()) > 0.9
    assert new_object.caption("top left, over a frog").tolist() == [[*shown.captions[0, :1].tolist(), 9, 18]]
    made = [new_object.train(pipe, strategy, shown, 3, 0.1, 2, seed)[0] for seed in (0, 0, 1)]
    first, same, other = (torch.cat([p.flatten() for p in each.parameters()]) for each in made)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert all(torch.equal(a, b) for a, b in zip(frozen, pipe.denoiser.parameters(), strict=True))
    new_object.save(made[0], strategy, tmp_path)
    again = new_object.load(tmp_path, pipe.denoiser)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made[0].parameters(), strict=True))
    with pytest.raises(UserError, match="another denoiser"):
        new_object.load(tmp_path, build("unet", block_out_channels=(16, 16), norm_num_groups=4).unet)
    with pytest.raises(UserError, match="no adaptor that can be read"):
        new_object.load(tmp_path / "none", pipe.denoiser)
    with pytest.raises(UserError, match="adapts no cross-attention"):
        new_object.adaptor_strategy("tome")
    with pytest.raises(UserError, match="no emoji"):
        data.new_object("0")
