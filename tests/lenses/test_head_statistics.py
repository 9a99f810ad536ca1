# SPDX-License-Identifier: Apache-2.0
"""What heads do step by step equals formulas over the whole text, whatever the cache; and looking on costs little."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import manyheads
from manyheads.lens import TokenSpans, base, waiting
from manyheads.lens.steps import Steps
from manyheads.lens.view import Memo
from manyheads.lens.waiting import Waiting
from oracles import models
from tolerance import FORMULA, SAME, is_close, is_far, nearly

NAMES = ("entropy", "logit", "first", "last", "top")
WRITTEN = 12


class Keep(manyheads.strategy.AttentionWatch):
    """Keeps every call, and where its keys stand in a cache of ours."""

    def watch(self, call, out):
        places = None if call.cache is None else call.cache.places
        call.state.setdefault("calls", []).append((call, places))


def formula(call, places=None, near=1):
    """The five of every row in float64: ``[B, H, T, 5]``. ``places [B, Hkv, S]`` of keys that do not stand in place."""
    heads, (batch, kv_heads, size, _), length = call.q.shape[1], call.k.shape, call.q.shape[2]
    x = call.q.double() @ call.k.double().repeat_interleave(heads // kv_heads, 1).mT * call.scale
    if call.softcap is not None:
        x = (x / call.softcap).tanh() * call.softcap
    allowed = call.allowed()
    x = x if allowed is None else x.masked_fill(~allowed, -torch.inf)
    sinks = x.new_zeros(heads, 0) if call.sinks is None else call.sinks.double()[:, None]
    whole = torch.cat([x, sinks[None, :, None].expand(batch, -1, length, -1)], -1)
    a = whole.softmax(-1)[..., :size].nan_to_num()
    own = int(call.step) + torch.arange(length)
    place = torch.arange(size)[None, None].expand(batch, kv_heads, -1) + int(call.step) + length - size
    place = (place if places is None else places).repeat_interleave(heads // kv_heads, 1)
    return a, x, place[:, :, None], own[:, None], near


def five(parts, first):
    a, x, place, own, near = parts
    newest = (place > own - near) & (place <= own)
    top = place.expand(x.shape).gather(3, x.argmax(-1, keepdim=True))[..., 0]
    at_first = place == first[:, None, None, None]
    found = [torch.special.entr(a).sum(-1), x.amax(-1), (a * at_first).sum(-1), (a * newest).sum(-1)]
    return torch.stack([*found, top - first[:, None, None]], -1)


def written(name, spec="head_statistics", near=1, **how):
    """What the lens found in a generation of two padded rows, and the formula over the whole text, by layer."""
    model, inputs = models.tiny(name), models.inputs(name)
    with manyheads.watch(model, spec) as seen, torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=WRITTEN, do_sample=False, disable_compile=True, **how)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, WRITTEN, dtype=torch.long)], 1)[:, :-1]
    places, keep = (mask.cumsum(1) - 1).clamp(min=0), Keep()
    with manyheads.use(model, keep) as port, torch.no_grad():
        model(input_ids=ids[:, :-1], attention_mask=mask, position_ids=places, use_cache=False)
    first, begin = mask.argmax(1), inputs["input_ids"].shape[1] - 1
    want = [five(formula(state["calls"][0][0], near=near), first)[:, :, begin:] for _, state in port.kept(keep)]
    kept = seen._port.kept(seen._bundle)
    got = [np.stack(memory["0"]["steps"].rows()) for _, memory in kept]
    return seen.compute(), [torch.from_numpy(x).transpose(1, 2) for x in got], want


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "llama4", "gpt2"])
def test_every_step_equals_the_formula_over_the_whole_text(name):
    """Grouped heads, left padding, windows, caps, learned sinks; the control is the step before."""
    found, got, want = written(name)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape and mine.shape[2] == WRITTEN
        for i, what in enumerate(NAMES):
            assert is_close(mine[..., i], theirs[..., i], SAME), what
            constant = what == "first" and not theirs[..., i].any()  # it has left the window
            assert constant or is_far(mine[:, :, 1:, i], theirs[:, :, :-1, i]), what
    assert (found.tables["logit"].values[:, 0] >= want[0][..., 1].amax(2).numpy() - 1e-4).all() and found.notes
    assert is_close(found.steps["entropy"][0], want[0][0, ..., 0], SAME)
    places = found.records["places that most heads attend to"]
    assert places[0]["share of heads and steps"] >= places[-1]["share of heads and steps"] > 0


def test_the_newest_tokens_may_be_several():
    _, got, want = written("llama", "head_statistics:near=3", near=3)
    assert is_close(got[1][..., 3], want[1][..., 3], SAME)
    assert is_far(got[1][..., 3], written("llama")[2][1][..., 3])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_waiting_changes_nothing(name, monkeypatch):
    """Blocks of any size, no waiting at all, and a cache that is written in place."""
    whole, got, _ = written(name)
    for block in (1, 5):
        monkeypatch.setattr(base, "BLOCK", block)
        again, other, _ = written(name)
        assert all(is_close(a, b, SAME) for a, b in zip(got, other, strict=True))
        assert is_close(again.tables["logit"].values, whole.tables["logit"].values, SAME)
    _, static, _ = written(name, cache_implementation="static")
    assert all(is_close(a, b, SAME) for a, b in zip(got, static, strict=True))


@pytest.mark.parametrize("spec", ["knorm:budget=0.5", "random:budget=0.3", "streaming_llm:budget=8,sinks=2", "full"])
def test_of_a_compressed_cache_the_keys_that_are_kept(spec):
    """Heads keep other keys; places are those in the text, and what was dropped has no weight."""
    model, ids, keep = models.tiny("llama"), models.tokens(1, 24), Keep()
    with manyheads.use(model, spec, keep) as port, manyheads.watch(model, "head_statistics") as seen:
        model.generate(ids, max_new_tokens=8, do_sample=False)
    first = torch.zeros(1, dtype=torch.long)
    for (_, mine), (_, memory) in zip(port.kept(keep), seen._port.kept(seen._bundle), strict=True):
        rows = [five(formula(*kept), first)[:, :, -1:] for kept in mine["calls"]]
        got = torch.from_numpy(memory["0"]["steps"].rows()[0]).transpose(0, 1)[None]
        assert is_close(got, torch.cat(rows, 2), SAME)
        wrong = [five(formula(call), first)[:, :, -1:] for call, _ in mine["calls"]]  # slots taken for places
        assert is_far(got[..., 4], torch.cat(wrong, 2)[..., 4]) or spec not in ("knorm:budget=0.5", "random:budget=0.3")


def test_lenses_go_through_caches_that_keep_all_and_refuse_others():
    model, ids = models.tiny("llama"), models.tokens(1, 24)
    found = []
    for specs in ((), ("full",)):
        with (
            manyheads.use(model, *specs),
            manyheads.watch(model, "active_dormant", "reasoning_rhythm:nearest=2") as seen,
        ):
            model.generate(ids, max_new_tokens=8, do_sample=False)
        found.append(seen.compute(0).tables["sink"].values)
    assert is_close(*found, SAME)
    with (
        pytest.raises(manyheads.errors.UserError, match="has dropped some"),
        manyheads.use(model, "knorm:budget=0.5"),
        manyheads.watch(model, "active_dormant"),
    ):
        model.generate(ids, max_new_tokens=3)


class Operators(TorchDispatchMode):
    """Counts what would be launched, and what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += str(operator) not in ("aten.slice.Tensor", "aten.detach.default")  # views, that launch nothing
        self.waits += any(x in str(operator) for x in ("_local_scalar_dense", "item", "nonzero", "masked_select"))
        return operator(*args, **(kwargs or {}))


def steps_of(model, ids, count, *lenses):
    """Operators of each of ``count`` decoded tokens, and all waits."""
    cache = read_into_a_cache(model, ids)
    counted, waits, token = [], 0, ids[:, -1:]
    with torch.no_grad():
        for _ in range(count):
            with Operators() as seen:
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            counted.append(seen.count)
            waits += seen.waits
    return counted, waits


def read_into_a_cache(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    return cache


class Forgetful:
    """The control of what layers share: a new memo for each."""

    def find(self, *_):
        return Memo()


LENSES = ("head_statistics", "active_dormant", "reasoning_rhythm:nearest=2")


def test_a_step_costs_no_operator_and_nothing_waits_for_a_device(monkeypatch):
    """But for one step in a block, decoding launches what it does without; a whole reading has no wait either."""
    monkeypatch.setattr(base, "BLOCK", 8)
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    plain, before = steps_of(model, ids, 20)
    with manyheads.watch(model, *LENSES):
        looked, waits = steps_of(model, ids, 20)
        with Operators() as reading, torch.no_grad():
            model(ids, use_cache=False)
    with Operators() as alone, torch.no_grad():
        model(ids, use_cache=False)
    assert waits == before and reading.waits == alone.waits
    assert [i for i, (a, b) in enumerate(zip(looked, plain, strict=True)) if a != b] == [8, 16]
    monkeypatch.setattr(base, "BLOCK", 1)
    with manyheads.watch(model, *LENSES):
        assert sum(a != b for a, b in zip(steps_of(model, ids, 20)[0], plain, strict=True)) > 15  # the control


def test_layers_share_what_is_the_same():
    """The second layer launches less than the first, which finds the parts of the tokens."""
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    with manyheads.watch(model, *LENSES) as seen, torch.no_grad(), Operators() as counted:
        model(ids, use_cache=False)
        all_layers = counted.count
    made = [len(memo.made) for *_, memo in seen._bundle.state["memos"]._made]
    assert len(made) == 1 and made[0] > 8
    monkey = base.Memos
    try:
        base.Memos = Forgetful
        with manyheads.watch(model, *LENSES), torch.no_grad(), Operators() as counted:
            model(ids, use_cache=False)
    finally:
        base.Memos = monkey
    assert counted.count > all_layers + 20


def test_no_keys_are_held_that_the_model_let_go():
    """While tokens wait, old keys of a growing cache are freed as without a lens."""
    model, ids, alive = models.tiny("llama"), models.tokens(1, 12), []

    class Storages(manyheads.strategy.AttentionWatch):
        def watch(self, call, out):
            if call.site.index == 0:
                alive.append((weakref.ref(call.k.untyped_storage()), sum(ref() is not None for ref, _ in alive)))

    with manyheads.use(model, Storages()), manyheads.watch(model, "head_statistics"):
        model.generate(ids, max_new_tokens=8, do_sample=False)
    assert [count for _, count in alive[1:]] == [0] * 7
    with manyheads.watch(model, "head_statistics") as seen:
        out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        held = weakref.ref(out.past_key_values.layers[0].keys.untyped_storage())
        del out
        assert held() is None and len(seen.compute().steps["entropy"][0, 0]) == 8


def test_tokens_wait_as_they_come_through_a_loop_of_ones_own():
    """Results can be asked for on the way, and a cache that is cut back is refused."""
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    cache = read_into_a_cache(model, ids)
    with (
        pytest.raises(manyheads.errors.UserError, match="cut back"),
        manyheads.watch(model, "head_statistics") as seen,
        torch.no_grad(),
    ):
        for i in range(3):
            model(ids[:, i : i + 1], past_key_values=cache)
            assert seen.compute().steps["logit"].shape[2] == i + 1
        model(ids[:, :1], past_key_values=cache)
        cache.crop(-2)
        model(ids[:, :1], past_key_values=cache)


def test_a_text_with_its_response_has_the_same_steps():
    """Read at once as written token by token; the control is a response that begins elsewhere.

    In float64, as figures are kept with six decimals: what differs by a rounding of float32 can differ in the last one.
    """
    model, ids = models.tiny("llama", torch.float64), models.tokens(1, 12)
    with manyheads.watch(model, "head_statistics") as seen:
        text = model.generate(ids, max_new_tokens=8, do_sample=False)
    found = []
    for start in (12, 11):
        with manyheads.watch(model, "head_statistics", roles=TokenSpans({"response": [[(start, 20)]]})) as read:
            model(text, use_cache=False)
        found.append(read.compute())
    for name in NAMES:
        assert is_close(found[0].steps[name], seen.compute().steps[name], SAME), name
        assert found[1].steps[name].shape[2] == 9
    means = [each.tables["prompt entropy"].values for each in (seen.compute(), *found)]
    assert is_close(means[0], means[1], SAME) and is_far(means[0], means[2])


def test_steps_are_kept_up_to_a_number():
    steps = Steps(5)
    steps.add(torch.arange(3.0)[None], True)
    for i in range(3, 12):
        steps.add(torch.tensor([[float(i)]]), False)
    assert steps.rows()[0].tolist() == [7, 8, 9, 10, 11] and steps.forgotten == [7]
    assert sum(block.shape[1] for block in steps.parts[0]) == 5
    many = Steps(1000)
    for i in range(0, 600, 60):
        many.add(torch.arange(i, i + 60.0).expand(2, -1), i == 0)
    assert [row.tolist() for row in many.rows()] == [list(range(600))] * 2
    steps.add(torch.zeros(2, 1), True)
    assert [len(row) for row in steps.rows()] == [5, 1, 1]
    found, got, _ = written("llama", "head_statistics:keep=4")
    assert got[0].shape[2] == 4 and "no longer held" in found.notes[-1]
    assert is_close(got[0], written("llama")[1][0][:, :, -4:], FORMULA)


def test_roles_of_what_is_written_are_seen_late_too():
    """A lens that counts the response alone counts it the same when its tokens waited."""
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    spans = TokenSpans({"system": [[(2, 6)]]})
    found = []
    for block in (1, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "BLOCK", block)
            with manyheads.watch(model, "strategy_attention", roles=spans) as seen:
                model.generate(ids, max_new_tokens=8, do_sample=False)
        found.append(next(iter(seen.compute().tables.values())).values)
    assert is_close(*found, SAME) and found[0].shape[1] == 2 and nearly(1) == 1


def stepped(model, *texts, length=6):
    """Steps of the lens ``[heads, steps, 5]`` a layer, of sequences whose tokens come in turn into a cache each."""
    caches = [read_into_a_cache(model, text[:, : length + 1]) for text in texts]
    with manyheads.watch(model, "head_statistics") as seen, torch.no_grad():
        for i in range(length, texts[0].shape[1]):
            for text, cache in zip(texts, caches, strict=True):
                model(text[:, i : i + 1], past_key_values=cache)
        seen.compute()
        kept = seen._port.kept(seen._bundle)
    return [torch.from_numpy(memory["0"]["steps"].rows()[0]).transpose(0, 1) for _, memory in kept]


class Careless(Waiting):
    """Takes any token that comes without a mask."""

    def follow(self, past, qkv, mask, rest, out):
        if self.rows:
            self._held = qkv[1:]
            self.rows.append((qkv[0], mask, *rest, out))
        return bool(self.rows)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "llama4"])
def test_tokens_that_wait_without_a_call_are_those_of_the_text(name, monkeypatch):
    """No padding, so that a token needs no call, and windows are left on the way; two caches in turn are refused."""
    model, keep = models.tiny(name), Keep()
    text, other = (models.tokens(1, 30, seed=seed) for seed in (1, 2))
    with manyheads.use(model, keep) as port, torch.no_grad():
        model(text, use_cache=False)
    first = torch.zeros(1, dtype=torch.long)
    want = [five(formula(state["calls"][0][0]), first)[0, :, 6:] for _, state in port.kept(keep)]
    assert all(is_close(mine, theirs, SAME) for mine, theirs in zip(stepped(model, text), want, strict=True))
    with pytest.raises(manyheads.errors.UserError, match="go on by turns"):
        stepped(model, text, other)
    if name == "llama":
        monkeypatch.setattr(base, "Waiting", Careless)
        found = stepped(model, text, other)
        assert not all(a.shape == b.shape and is_close(a, b, SAME) for a, b in zip(found, want, strict=True))
    else:
        monkeypatch.setattr(waiting, "_keeps_all", lambda call: True)
        with pytest.raises(manyheads.errors.UserError, match="was changed while"):
            stepped(model, text)
