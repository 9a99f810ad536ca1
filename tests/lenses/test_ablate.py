# SPDX-License-Identifier: Apache-2.0
"""Ablation equals what it says, on real modules; edits carry gradients and refuse nonsense."""

import pytest
import torch
from transformers import DynamicCache

import manyheads
from manyheads.calls.edits import add_bias, append_kv, replace_channels, scale_heads
from manyheads.errors import UserError
from oracles import models
from tolerance import FORMULA, SAME, assert_close, error


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "bert"])
def test_zero_is_a_zeroed_slice_of_the_output_projection(name):
    model = models.build(name)
    inputs = models.inputs(name)
    with manyheads.use(model, "ablate:heads=1.2+0.0"), torch.no_grad():
        got = model(**inputs).logits
    plain = model(**inputs).logits
    sites = [site for site, _ in __import__("manyheads.integrations.transformers", fromlist=["x"]).find_sites(model)]
    for site, head in ((sites[1], 2), (sites[0], 0)):
        weight = site.output()
        width = weight.shape[1] // site.num_heads
        weight[:, head * width : (head + 1) * width] = 0  # parameters ask for no gradient here
    want = model(**inputs).logits
    assert_close(got, want, SAME)
    assert error(plain, want) > 1e-3


def test_the_other_ways():
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    seen = {}

    class Watch(manyheads.strategy.AttentionWatch):
        def watch(self, call, out):
            seen.setdefault(call.site.index, []).append((call, out))

    with manyheads.use(model, Watch(), "ablate:heads=0.3,by=mean", "ablate:heads=0.1,by=bos", Watch()), torch.no_grad():
        model(ids)
    (call, before), (_, after) = seen[0]
    assert torch.equal(after[:, :, [0, 2]], before[:, :, [0, 2]])
    assert_close(after[:, :, 3], before[:, :, 3].mean(1, keepdim=True).expand_as(before[:, :, 3]))
    assert_close(after[:, :, 1], call.v[:, 0, :1].expand_as(before[:, :, 1]))  # group 0 holds heads 0 and 1
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    seen.clear()
    with manyheads.use(model, "ablate:heads=0.1,by=bos", Watch()), torch.no_grad():
        model(ids, attention_mask=mask)
    call, after = seen[0][0]
    assert_close(after[0, 4:, 1], call.v[0, 0, 4].expand_as(after[0, 4:, 1]))
    with manyheads.use(model, "ablate:heads=0.1,by=scale,factor=1"), torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_refusals():
    model, ids = models.tiny("llama"), models.tokens(1, 4)
    with pytest.raises(UserError, match=r"layer\.head"):
        manyheads.parse("ablate:heads=3")
    with pytest.raises(UserError, match="heads 0 to 3"), manyheads.use(model, "ablate:heads=0.9"):
        model(ids)
    with pytest.raises(UserError, match="no attention to act on"), manyheads.use(model, "ablate:heads=7.0"):
        model(ids)
    assert manyheads.parse("ablate:heads=0.1+1.2").spec == "ablate:heads=0.1+1.2"


def test_edits_equal_the_formula_with_gradients():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 6, 4, generator=generator).double() for h in (4, 2, 2))
    call = manyheads.AttentionCall(manyheads.Site("x", 0, 0, "self", True), q, k, v, scale=0.5, is_causal=True)
    more = [torch.randn(2, 4, generator=generator).double() for _ in "kv"]

    def appended(key, value):
        return append_kv(call, key, value).attend()

    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.5
    logits = logits.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    extra = (q * more[0].repeat_interleave(2, 0)[:, None]).sum(-1, keepdim=True) * 0.5
    weights = torch.cat([extra, logits], -1).softmax(-1)
    values = torch.cat([more[1][None, :, None].expand(2, -1, 1, -1), v], 2).repeat_interleave(2, 1)
    assert_close(appended(*more), (weights @ values).transpose(1, 2), FORMULA)
    assert torch.autograd.gradcheck(appended, [x.requires_grad_() for x in more])
    off = appended(torch.zeros(2, 4).double(), torch.zeros(2, 4).double())  # softmax with one more in the denominator
    e = logits.exp()
    assert_close(off, ((e / (1 + e.sum(-1, keepdim=True))) @ v.repeat_interleave(2, 1)).transpose(1, 2), FORMULA)
    assert error(off, call.attend()) > 1e-2
    bias = torch.randn(1, 1, 6, 6, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: add_bias(call, b).attend(), [bias])
    channels = torch.tensor([[[0], [3]], [[1], [2]]])
    mean = k.gather(3, channels[:, :, None].expand(-1, -1, 6, -1)).mean((2, 3), keepdim=True)
    made = replace_channels(k, channels, mean)
    assert_close(made[1, 1, :, 2], k[1, 1, :, 2].mean().expand(6), FORMULA)
    assert torch.equal(replace_channels(made, channels, mean), made) and int((made != k).sum()) == 24
    factor = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: scale_heads(q.transpose(1, 2), f), [factor])


def sliced(model, layer, heads, name="o_proj"):
    """The columns of the output projection that some heads write through."""
    attention = model.model.layers[layer].self_attn
    weight, width = getattr(attention, name).weight, attention.head_dim
    return [(weight, slice(head * width, (head + 1) * width)) for head in heads]


def generated(model, ids, *specs, **how):
    with manyheads.use(model, *specs):
        out = model.generate(
            ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **how
        )  # fmt: skip
    return torch.stack(out.logits), out.sequences


@pytest.mark.parametrize(("spec", "factor"), [("by=zero", 0.0), ("by=scale,factor=0.25", 0.25)])
@pytest.mark.parametrize("cache", [(), ("full",), ("streaming_llm:budget=0.5",)])
def test_heads_are_taken_out_of_what_is_generated_too(spec, factor, cache):
    """Against scaled slices of the output projection; the control scales the next head."""
    model, ids = models.build("llama"), models.tokens(2, 14)
    got, said = generated(model, ids, f"ablate:heads=1.2+0.0,{spec}", *cache)
    plain, _ = generated(model, ids, *cache)
    with torch.no_grad():
        for layer, head in ((1, 2), (0, 0)):
            for weight, cut in sliced(model, layer, [head]):
                weight[:, cut] *= factor
    want, same = generated(model, ids, *cache)
    assert_close(got, want, SAME)
    assert torch.equal(said, same) and error(plain, want) > 1e-3
    assert error(generated(models.build("llama"), ids, f"ablate:heads=1.3+0.0,{spec}", *cache)[0][:1], want[:1]) > 1e-3


@pytest.mark.parametrize("padded", [False, True])
def test_the_mean_goes_on_with_what_is_generated(padded):
    """Against a loop that keeps the sum of what the head wrote; left padding counts in none."""
    model, ids, heads = models.tiny("llama"), models.tokens(2, 10), [3]
    mask = torch.ones_like(ids)
    mask[0, : 4 * padded] = 0
    (weight, cut), sums, counts, tokens = sliced(model, 0, heads)[0], [], [], mask
    assert weight.shape[1] >= cut.stop

    def replaced(module, args):
        written = args[0].clone()
        now = tokens[:, -written.shape[1] :, None].float()
        sums.append((written[..., cut] * now).sum(1, keepdim=True))
        counts.append(now.sum(1, keepdim=True))
        written[..., cut] = sum(sums) / sum(counts)
        return (written,)

    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(replaced)
    cache, logits, fed = DynamicCache(config=model.config), [], ids
    with torch.no_grad():
        for _ in range(6):
            places = (tokens.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
            logits.append(
                model(fed, attention_mask=tokens, position_ids=places, past_key_values=cache).logits[:, -1]
            )  # fmt: skip
            fed, tokens = logits[-1].argmax(-1)[:, None], torch.cat([tokens, mask[:, -1:]], 1)
    handle.remove()
    got = generated(model, ids, "ablate:heads=0.3,by=mean", attention_mask=mask)[0][:6]
    assert_close(got, torch.stack(logits), SAME)
    assert error(generated(model, ids, attention_mask=mask)[0][:6], got) > 1e-3
    again = generated(model, ids, "ablate:heads=0.3,by=mean", attention_mask=mask)[0][:6]
    assert torch.equal(got, again)  # a new prompt starts anew


@pytest.mark.parametrize("cache", [(), ("full",), ("knorm:budget=0.5",)])
def test_the_temperature_of_single_heads(cache):
    """Against scaled rows of the query projection, with grouped heads; at 1 nothing changes."""
    model, ids = models.build("llama"), models.tokens(2, 14)
    spec = "head_temperature:heads=1.2+0.0,temperature=0.4"
    got, plain = (generated(model, ids, *specs, *cache)[0] for specs in ((spec,), ()))
    one = generated(model, ids, "head_temperature:heads=1.2,temperature=1", *cache)[0]
    assert_close(one, plain, SAME)
    with torch.no_grad():
        for layer, head in ((1, 2), (0, 0)):
            for weight, cut in sliced(model, layer, [head], "q_proj"):
                weight[cut] /= 0.4
    want = generated(model, ids, *cache)[0]
    assert_close(got, want, 4 * SAME)
    assert error(plain[:1], want[:1]) > 1e-3
    with pytest.raises(UserError, match="above 0"):
        manyheads.parse("head_temperature:heads=0.1,temperature=0")
