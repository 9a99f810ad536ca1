# SPDX-License-Identifier: Apache-2.0
"""KV bias, target variance rescaling and DyT equal their formulas on real modules, train, and can be kept."""

import pytest
import torch
from torch import nn

import manyheads
from manyheads.calls.statistics import Columns, WeightedSum
from manyheads.calls.weights import measure
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.lens import Lens, LensResult
from manyheads.lenses.refined_massive_activations.dyt import DyT, ScaledEmbedding, with_dyt
from manyheads.lenses.refined_massive_activations.kv_bias import KVBias
from manyheads.lenses.refined_massive_activations.tvr import TargetVariance, blocks_of, divide_by_depth
from oracles import models
from tolerance import FORMULA, SAME, assert_close, error, nearly


def bias_of(model, **more):
    return KVBias.of((site for site, _ in find_sites(model)), **more)


class Watch(manyheads.strategy.AttentionWatch):
    """Keeps calls and outputs."""

    def watch(self, call, out):
        call.state.setdefault("seen", []).append((call, out))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert", "deepseek_v3"])
def test_kv_bias_is_one_more_column(name):
    model, inputs = models.tiny(name), models.inputs(name)
    bias, watch = bias_of(model, std=1.0), Watch()
    with manyheads.use(model, bias, watch) as port, torch.no_grad():
        model(**inputs)
    for site, memory in port.kept(watch):
        call, out = memory["seen"][0]
        k, v = (bias.weights[f"{site.name}.{kind}"].detach() for kind in "kv")
        assert k.shape == (call.k.shape[1], call.k.shape[3]) and call.k.shape[2] == 20 and call.prepended == 1
        groups = call.q.shape[1] // call.k.shape[1]
        keys, values = (x[:, :, 1:].repeat_interleave(groups, 1) for x in (call.k, call.v))
        logits = call.q @ keys.transpose(-1, -2) * call.scale
        mask = inputs["attention_mask"][:, None, None].bool()
        if site.causal:
            mask = mask & torch.ones(19, 19, dtype=torch.bool).tril()
        logits = logits.masked_fill(~mask, -torch.inf)
        extra = (call.q * k.repeat_interleave(groups, 0)[:, None]).sum(-1, keepdim=True) * call.scale
        weights = torch.cat([extra, logits], -1).softmax(-1)
        want = weights[..., 1:] @ values + weights[..., :1] * v.repeat_interleave(groups, 0)[:, None]
        assert_close(out, want.transpose(1, 2), SAME)
        first = measure(
            call, [Columns(torch.tensor([0])), WeightedSum(torch.ones(1, 20, 1) - torch.eye(20)[0, :, None])]
        )
        assert_close(first[0][..., 0], weights[..., 0])
        assert_close(first[1][..., 0], 1 - weights[..., 0])
        assert error(out, (logits.softmax(-1).nan_to_num() @ values).transpose(1, 2)) > 1e-2


def test_kv_bias_off_trains_and_is_kept(tmp_path):
    model, ids = models.build("llama"), models.tokens(2, 9)
    bias = bias_of(model, std=0.02)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([*model.parameters(), *bias.parameters()], lr=1e-2)
    before = {name: weight.clone() for name, weight in bias.weights.items()}
    losses = []
    for _ in range(5):
        with manyheads.use(model, bias):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], weight) for name, weight in bias.weights.items())
    bias.save(tmp_path / "bias.safetensors")
    again = KVBias.load(tmp_path / "bias.safetensors")
    with manyheads.use(model, bias), torch.no_grad():
        want = model(ids).logits
    with manyheads.use(model, again), torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    with torch.no_grad():
        assert error(model(ids).logits, want) > 1e-3
    assert set(model.state_dict()) == set(models.build("llama").state_dict())
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for name in ("bad", "none"):
        with pytest.raises(UserError, match="no KV bias"):
            KVBias.load(tmp_path / f"{name}.safetensors")


def test_kv_bias_out_of_sight_is_plain_attention():
    """k' with a logit of minus infinity: a query turned away from it, as far as float32 goes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.rand(1, h, 6, 4, generator=generator).double() for h in (4, 2, 2))
    site = manyheads.Site("x", 0, 0, "self", True)
    call = manyheads.AttentionCall(site, q, k, v, scale=0.5, is_causal=True)
    keys = {"x.k": nn.Parameter(torch.full((2, 4), -1e4).double()), "x.v": nn.Parameter(torch.ones(2, 4).double())}
    assert_close(KVBias(weights=keys).edit(call).attend(), call.attend(), FORMULA)
    keys["x.k"].data.fill_(1e4)
    assert_close(KVBias(weights=keys).edit(call).attend(), torch.ones(1, 6, 4, 4).double(), FORMULA)


class Sees(Lens):
    """The mass on the first token, and its place."""

    def statistics(self, view):
        return {"first": WeightedSum(view.columns("bos")[..., None].float())}

    def update(self, view, found):
        view.memory["first"] = (found["first"], view.key_positions, view.keys, view.valid)

    def compute(self, sites):
        return LensResult()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lenses_know_that_the_extra_key_is_no_token(name):
    model, inputs = models.tiny(name), models.inputs(name)
    bias, lens = bias_of(model, std=1.0), Sees()
    watch = Watch()
    with manyheads.use(model, bias, watch, lens) as port, torch.no_grad():
        for _ in range(2):
            model(**inputs)
    (_, memory), (_, mine) = port.kept(watch)[0], port.kept(lens)[0]
    call = memory["seen"][1][0]
    first, places, keys, valid = mine["first"]
    assert places.tolist() == list(range(-1, 19)) and not keys[:, 0].any()
    assert torch.equal(keys[:, 1:], inputs["attention_mask"].bool()) and torch.equal(valid, keys[:, 1:])
    for row, column in ((0, 1), (1, 6)):  # five tokens of padding stand before the second row
        want = measure(call, [Columns(torch.tensor([column]))])[0][row, ..., 0]
        assert_close(first[row, :, valid[row], 0], want[:, valid[row]])
    assert port.kept(lens)[1][1]["shared"]["valid"].shape == (2, 19)


def tower():
    """Two blocks with linear layers, an embedding before and a head after them."""
    made = nn.Module()
    made.embed = nn.Embedding(7, 8)
    made.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)) for _ in range(2))
    made.head = nn.Linear(8, 7)
    return made


def test_tvr_pulls_back_what_outgrew_the_target():
    model = tower()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.layers:
            for j in (0, 2):
                block[j].weight.copy_(torch.randn(block[j].weight.shape, generator=generator) * (0.5 if j else 0.1) + 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rescaling = TargetVariance(blocks_of(model), target=0.1, interval=2, limit=1.5)
    assert rescaling.step() == 0 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert rescaling.step() == 2
    for name, p in model.named_parameters():
        if name in ("layers.0.2.weight", "layers.1.2.weight"):
            assert p.std().item() == nearly(0.1, torch.float32)
            assert p.mean().item() == nearly(before[name].mean().item(), torch.float32)
            assert error((p - p.mean()) / p.std(), (before[name] - before[name].mean()) / before[name].std()) < SAME
        elif name in ("layers.0.2.bias", "layers.1.2.bias"):
            assert not p.any() and before[name].any()
        else:
            assert torch.equal(p, before[name])
    assert rescaling.rescale() == 0
    deep = TargetVariance(blocks_of(model), target=0.1, limit=1.2, scale_with_depth=True)
    assert deep.rescale() == 2  # of the second block, whose target is 0.0707 now
    assert model.layers[1][2].weight.std().item() == nearly(0.1 / 2**0.5, torch.float32)


def test_tvr_on_real_models_and_optimisers():
    for name, count in (("llama", 14), ("gpt2", 8), ("bart", 32)):
        model = models.build(name)
        assert TargetVariance(blocks_of(model), target=1e-3).rescale() == count
    model = models.build("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    embedding = model.model.embed_tokens.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = TargetVariance(blocks_of(model), target=0.01, interval=3).attach(optimizer)
    for step in range(3):
        assert (model.model.layers[0].self_attn.q_proj.weight.std() > 0.1) == (step < 3)
        optimizer.step()
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == nearly(0.01, torch.float32)
    assert torch.equal(embedding, model.model.embed_tokens.weight)
    handle.remove()
    fresh = models.build("llama")
    before = [block.mlp.up_proj.weight.clone() for block in fresh.model.layers]
    divide_by_depth(blocks_of(fresh))
    assert torch.equal(fresh.model.layers[0].mlp.up_proj.weight, before[0])
    assert_close(fresh.model.layers[1].mlp.up_proj.weight, before[1] / 2**0.5)


def test_dyt_is_the_formula():
    layer = DyT(6, 0.7)
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)) * 4
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
    assert_close(layer(x), layer.weight * torch.tanh(0.7 * x))
    assert torch.equal(layer(-x), -layer(x)) and (layer(1e6 * x).abs() <= layer.weight.abs()).all()
    assert torch.equal(layer(x)[1:2, 2:3], layer(x[1:2, 2:3]))
    small = torch.zeros(6, requires_grad=True)
    layer(small).sum().backward()
    assert_close(small.grad, 0.7 * layer.weight.detach())
    with torch.no_grad():
        layer.bias.fill_(0.3)
    assert error(layer(-x), -layer(x)) > 1e-2


@pytest.mark.parametrize(("name", "norms"), [("llama", 5), ("gpt2", 5), ("qwen3", 9), ("gemma2", 9), ("bert", 6)])
def test_dyt_in_a_model(name, norms):
    model = models.build(name, initializer_range=0.02)
    exchanged = with_dyt(model)
    assert len(exchanged) == norms == sum(isinstance(module, DyT) for module in model.modules())
    blocks = blocks_of(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    alphas = {id(module) in inside: float(module.alpha) for module in model.modules() if isinstance(module, DyT)}
    assert alphas == {True: 1.0, False: 0.5}
    table = model.get_input_embeddings()
    assert isinstance(table, ScaledEmbedding) and float(table.scale) == nearly(32**0.5, torch.float32)
    assert any(module is table for module in model.modules())
    inputs = models.inputs(name)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    labels = inputs["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is table.weight
    again = models.build(name, initializer_range=0.02)
    with_dyt(again)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        with manyheads.watch(model, "refined_massive_activations") as seen:
            watched = model(**inputs).logits
        assert torch.equal(watched, model(**inputs).logits) and seen.compute().notes


def test_dyt_refusals():
    with pytest.raises(UserError, match="no RMSNorm or LayerNorm"):
        with_dyt(nn.Linear(3, 3))
    with pytest.raises(UserError, match="scale_embedding=False"):
        with_dyt(nn.Sequential(nn.LayerNorm(3)))
    lone = nn.Sequential(nn.LayerNorm(3))
    assert with_dyt(lone, scale_embedding=False) == ["0"] and isinstance(lone[0], DyT)


def test_the_extra_slot_takes_its_share():
    """Mass on a key that is no token, over the rows after the first, is that of a learned sink."""
    model = models.build("llama")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()  # every key is attended to alike
    found = []
    for used in ((bias_of(model, std=0.0),), ()):
        with manyheads.use(model, *used), manyheads.watch(model, "active_dormant") as seen, torch.no_grad():
            model(models.tokens(2, 9))
        found.append(seen.compute().tables)
    share = torch.from_numpy(found[0]["learned"].values)
    assert_close(share, torch.full_like(share, sum(1 / (t + 2) for t in range(1, 9)) / 8), SAME)
    assert error(share, torch.full_like(share, sum(1 / (t + 2) for t in range(9)) / 9)) > 1e-2  # row 0 is no row
    assert "learned" not in found[1]
