# SPDX-License-Identifier: Apache-2.0
"""Which attention a model has, as the port sees it, and what an AttentionCall says of one forward."""

from dataclasses import replace

import pytest
import torch

import manyheads
from manyheads.integrations import sites
from manyheads.integrations.transformers import architectures, find_sites, new_cache
from manyheads.strategy import AttentionWatch
from oracles import models
from oracles.strategies import Watch
from tolerance import CLOSE, assert_close

LAYERS = [("self", True, layer) for layer in (0, 1)]
ENCODER = [("self", False, 0), ("self", False, 1)]
CROSSED = [(kind, kind == "self", layer) for layer in (0, 1) for kind in ("self", "cross")]
SITES = {
    **dict.fromkeys(models.DECODERS, LAYERS),
    "bert": ENCODER,
    "t5": ENCODER + CROSSED,
    "bart": ENCODER + CROSSED,
    "whisper": [("self", False, None)] * 2 + CROSSED,
}
WINDOWS = {
    "mistral": [8, 8], "gemma2": [8, None], "gemma3_text": [8, None], "gpt_oss": [8, None], "llama4": [8, None],
}  # fmt: skip


@pytest.mark.parametrize("name", models.ALL)
def test_sites(name):
    model = models.tiny(name)
    found = find_sites(model)
    assert [(s.kind, s.causal, s.layer) for s, _ in found] == SITES[name]
    assert [s.index for s, _ in found] == list(range(len(found)))
    assert all(model.get_submodule(s.name) is module for s, module in found)
    grouped = name in models.ROTARY and name != "deepseek_v3"
    assert {(s.num_heads, s.num_kv_heads) for s, _ in found} == {(4, 2 if grouped else 4)}
    assert [s.window for s, _ in found] == WINDOWS.get(name, [None] * len(found))
    assert name.removesuffix("_text") in architectures()


class Note(AttentionWatch):
    """Writes down every call."""

    def watch(self, call, out):
        call.state.setdefault("calls", []).append((call, out))


def test_the_call_of_a_forward():
    """Shapes, positions and steps of a padded prefill and two more tokens; and where the notes are found afterwards."""
    model, note = models.tiny("llama"), Note()
    with manyheads.use(model, "full", note) as port:
        model.generate(**models.inputs("llama"), max_new_tokens=3, do_sample=False)
    state = port.state(note)
    assert list(state) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert port.state(Note()) == {}
    for site in state.values():
        (prompt, out), (first, _), (second, _) = site["calls"]
        assert prompt.q.shape == (2, 4, 19, 8) and prompt.k.shape == prompt.v.shape == (2, 2, 19, 8)
        assert out.shape == (2, 19, 4, 8) and prompt.scale == 8**-0.5
        assert [c.step for c in (prompt, first, second)] == [0, 19, 20]
        assert second.q.shape[2] == 1 and second.k.shape[2] == 21
        assert prompt.positions[1].tolist() == [0] * 5 + list(range(14)) and first.positions.tolist() == [[19], [14]]
        assert prompt.mask.dtype == torch.bool and not bool(prompt.mask[1, :, :, :5].any())
        assert first.cache.seen == 21


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5"])
def test_lse_gives_the_weights(name):
    """exp(logit - lse) of all keys sums to 1, or to 1 less what the sinks take; and the weights give the output."""
    from manyheads.attention import reference

    model, note = models.tiny(name), Note()
    with manyheads.use(model, note) as port:
        models.forward(name, model)
    for site in port.state(note).values():
        call, out = site["calls"][0]
        lse, lse_in_blocks = call.lse(), call.lse(block=4)
        assert torch.equal(lse.isfinite(), lse_in_blocks.isfinite())
        assert_close(lse_in_blocks[lse.isfinite()], lse[lse.isfinite()], CLOSE)
        x = reference.logits(call.q, call.k, scale=call.scale, bias=call.bias, softcap=call.softcap)
        allowed = call.allowed()
        weights = (x - lse[..., None]).exp()
        weights = weights if allowed is None else torch.where(allowed, weights, 0.0)
        seen = torch.ones_like(lse, dtype=torch.bool) if allowed is None else allowed.any(-1).expand(lse.shape)
        total = weights.sum(-1)[seen]
        assert bool((total < 1 - 1e-3).any()) if name == "gpt_oss" else bool(((total - 1).abs() < 1e-5).all())
        made = (weights @ reference.repeat_kv(call.v, 4)).transpose(1, 2)
        rows = seen.transpose(1, 2)
        assert_close(made[rows], out[rows], CLOSE)


def test_layers_select_sites():
    model, note = models.tiny("llama"), Note(layers=(1,))
    with manyheads.use(model, note) as port:
        models.forward("llama", model)
    assert list(port.state(note)) == ["model.layers.1.self_attn"]


def test_a_model_inside_another_module():
    """``use`` takes any module that contains a transformers model."""
    model, watch = models.build("llama"), Watch()
    wrapped = torch.nn.ModuleDict({"lm": model})
    with manyheads.use(wrapped, watch) as port:
        models.forward("llama", model)
    assert list(port.state(watch)) == ["lm.model.layers.0.self_attn", "lm.model.layers.1.self_attn"]


def test_tables_masks_and_layers_by_hand():
    """Rotary tables are two tensors ``[B, T, d]``; a mask's columns of keys that are allocated ahead are cut off."""
    cos, sin = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    assert sites._tables((cos, sin)) == (cos, sin)
    for other in (
        [cos, sin], (cos,), (cos, sin, cos), None, cos, (cos, None), (None, sin), (cos[0], sin), (cos, sin[0]),
        (cos[0], sin[0]), ("a", "b"), (cos[None], sin[None]),
    ):  # fmt: skip
        assert sites._tables(other) is None
    mask = torch.arange(12.0).view(1, 1, 2, 6)
    assert torch.equal(sites._first_columns(mask, 4), mask[..., :4]) and sites._first_columns(None, 4) is None
    one = mask[..., :1]
    assert sites._first_columns(one, 4) is one
    for dtype in (torch.float32, torch.bfloat16):
        made = sites._additive(torch.tensor([True, False]), dtype)
        assert made.tolist() == [0.0, torch.finfo(dtype).min] and made.dtype == dtype
    model = models.tiny("llama")
    (first, _), (second, _) = find_sites(model)
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse("full:layers=0"))
        assert sites._ours(cache, first) is cache.layers[0] and sites._ours(cache, second) is None
        for layer in (None, 9):
            assert sites._ours(cache, replace(first, layer=layer)) is None
