# SPDX-License-Identifier: Apache-2.0
"""Spatial gating: the decoder written out with tokens dropped between its blocks, caches, padding, and the formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from manyheads import UserError
from manyheads.call import AttentionCall, Site
from manyheads.reducing import PromptLayout
from manyheads.tokens.spatial_gating import SpatialGating, idle, needed, received, schedule_of
from oracles import models, reducers
from oracles.fingerprint import assert_same, of_model
from tiny import vision
from tiny.image_encoders import build
from tolerance import CALL, DEEP, FORMULA, SAME, assert_close, is_far, within

SCHEDULE = "schedule=1+1+0.5+0.25,least=2"
SPECS = (
    "spatial_gating:eta=0.7,least=2", f"spatial_gating:{SCHEDULE}", f"spatial_gating:{SCHEDULE},by=last",
    f"spatial_gating:{SCHEDULE},by=random", f"spatial_gating:{SCHEDULE},by=pooled",
)  # fmt: skip
IMAGE = vision.IMAGE


def prompts(lengths=(6, 4), side="right", seed=0):
    """Texts with two images of 3 x 3 patches behind a word, questions of some lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        text = torch.randint(3, 30, (length + 2,), generator=generator)
        image = torch.full((9,), IMAGE)
        rows.append(torch.cat([text[:1], image, text[1:2], image, text[2:]]))
    most = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), most, dtype=torch.long), torch.zeros(len(rows), most, dtype=torch.long)
    for row, text in enumerate(rows):
        at = slice(most - len(text), most) if side == "left" else slice(0, len(text))
        ids[row, at], mask[row, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": vision.pixels(2 * len(rows), 3, 3)}


def reader():
    return vision.llava(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


def stream(model, inputs):
    """What goes into the first block, by a hook."""
    found = []
    first = model.model.language_model.layers[0]
    handle = first.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    model(**inputs)
    handle.remove()
    args, kwargs = found[0]
    return args[0] if args else kwargs["hidden_states"]


def literal(model, inputs, counts, by="question", eta=None):
    """Logits of one row without padding; ``counts`` tokens of images go into each block, or as many as have ``eta``."""
    decoder, x = model.model.language_model, stream(model, inputs)[0]
    ids = inputs["input_ids"][0]
    at = torch.arange(len(ids))
    last = int((ids == IMAGE).nonzero()[-1])
    whole, flow = x.clone(), None
    for number, block in enumerate(decoder.layers):
        image = ids[at] == IMAGE
        if number >= 2:
            score = flow[image]
            ranked = score.sort(descending=True).values.cumsum(0) / score.sum()
            keep = counts[number] if eta is None else max(2, int((ranked < eta).sum()) + 1)
            if keep <= 0.9 * int(image.sum()):
                chosen = at[image][score.topk(keep).indices]
                stays = ~image | torch.isin(at, chosen)
                whole[at], at, x = x, at[stays], x[stays]
        cos, sin = decoder.rotary_emb(x[None], at[None])
        mask = torch.where(at[None] <= at[:, None], 0.0, -math.inf).double()[None, None]
        flow = flow_of(block.self_attn, block.input_layernorm(x), at, (cos[0], sin[0]), last, by)
        x = block(x[None], attention_mask=mask, position_embeddings=(cos, sin))
        x = (x[0] if isinstance(x, tuple) else x)[0]
    whole[at] = x
    return model.lm_head(decoder.norm(whole)), at


def flow_of(attention, y, at, tables, last, by):
    """``[n]``, mean over heads and over text behind the last image of what it attends to each token with."""

    def turned(z):
        half = z.shape[-1] // 2
        return z * tables[0] + torch.cat([-z[..., half:], z[..., :half]], -1) * tables[1]

    width = attention.head_dim
    q, k = (turned(p(y).unflatten(1, (-1, width)).transpose(0, 1)) for p in (attention.q_proj, attention.k_proj))
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = (q @ k.mT * width**-0.5).masked_fill(at[None] > at[:, None], -math.inf)
    rows = torch.arange(len(at))[at > last]
    return logits.softmax(2)[:, rows if by == "question" else rows[-1:]].mean((0, 1))


@pytest.mark.parametrize(
    ("spec", "given"),
    [(SPECS[1], {"counts": (18, 18, 9, 4)}), (SPECS[2], {"counts": (18, 18, 9, 4), "by": "last"}),
     (SPECS[0], {"counts": None, "eta": 0.7})],
)  # fmt: skip
@torch.no_grad()
def test_the_decoder_is_its_blocks_by_hand(spec, given):
    model, inputs = reader(), prompts((6,))
    with manyheads.use(model, spec):
        got = model(**inputs).logits[0]
    want, left = literal(model, inputs, **given)
    assert_close(got, want, DEEP)
    assert len(left) < len(inputs["input_ids"][0]) - 4
    wrong = given | ({"by": "question" if given.get("by") else "last"} if given["counts"] else {"eta": 0.3})
    assert is_far(got, literal(model, inputs, **wrong)[0], DEEP)  # control: another choice of tokens


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_is_its_rows_and_padding_is_nothing(spec, side):
    model, inputs = reader(), prompts(side=side)
    if "eta" in spec:  # rows keep as many as the one that needs most, so that numbers are given here
        spec = SPECS[1]
    with manyheads.use(model, spec):
        got = model(**inputs).logits
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = {name: x[row : row + 1, real] for name, x in inputs.items() if name != "pixel_values"}
            alone["pixel_values"] = inputs["pixel_values"][2 * row : 2 * row + 2]
            if spec in SPECS[1:3]:  # what is drawn goes by columns
                assert_close(got[row, real], model(**alone).logits[0], SAME)  # rotary tables are of float32
        noise = inputs | {"input_ids": inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)}
        again = model(**noise).logits
    real = inputs["attention_mask"].bool()
    assert_close(again[real], got[real], DEEP)


@pytest.mark.parametrize("lengths", [(5,), (6, 4)])
@torch.no_grad()
def test_decoding_with_a_cache_is_one_forward(lengths):
    """Of a choice that asks nobody: the question of a whole text has more tokens than its prompt has."""
    model, inputs = reader(), prompts(lengths, side="left")
    length = inputs["input_ids"].shape[1] - 2
    for spec in SPECS[3:]:
        with manyheads.use(model, spec):
            first = {n: x if n == "pixel_values" else x[:, :length] for n, x in inputs.items()}
            whole = model(**inputs).logits
            out = model(**first, use_cache=True)
            held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
            assert held == [length, length, length - 9, length - 14]
            if "pooled" not in spec:  # a draw is by the number of tokens
                continue
            steps = [out.logits[:, -1]]
            for at in range(length, length + 2):
                mask = inputs["attention_mask"][:, : at + 1]
                out = model(
                    input_ids=inputs["input_ids"][:, at : at + 1], attention_mask=mask,
                    past_key_values=out.past_key_values, use_cache=True,
                )  # fmt: skip
                steps.append(out.logits[:, -1])
            assert_close(torch.stack(steps, 1), whole[:, length - 1 :], DEEP)


@torch.no_grad()
def test_off_on_and_restored():
    model, inputs = reader(), prompts()
    plain, watch = model(**inputs).logits, reducers.Counts()
    before = of_model(model)  # behind a forward, which puts hooks of transformers' own on
    real = inputs["attention_mask"].bool()
    for fields in (":eta=1", ":schedule=1+1+1+1", ":least=17", ".flow"):
        with manyheads.use(model, f"spatial_gating{fields}"):  # 18 tokens are too few for what stays in any case
            assert torch.equal(model(**inputs).logits[real], plain[real])
    for spec in SPECS:
        with manyheads.use(model, spec, watch) as port:
            assert is_far(model(**inputs).logits, plain, DEEP)
        counts = [state["counts"][0] for site, state in port.kept(watch) if site.causal]
        assert counts[:2] == [26, 26]
        assert counts[2:] == [17, 12] if "eta" not in spec else counts[2] < 26
        assert_same(of_model(model), before)
        assert torch.equal(model(**inputs).logits, plain)
    with manyheads.use(model, SPECS[1]):  # a text without images is read as it is
        text = {"input_ids": torch.arange(3, 9)[None]}
        short = model(**text).logits
    assert torch.equal(model(**text).logits, short)


@torch.no_grad()
def test_axes_of_positions_and_eager_attention():
    """Qwen2-VL has three positions a token; under eager attention every forward has a mask."""
    model, spec = vision.qwen(), "spatial_gating:schedule=1+0.5,start=1,least=1,by=random"
    ids = torch.cat([torch.tensor([5, 57]), torch.full((4,), IMAGE), torch.tensor([56, 9, 8, 7])])[None]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3 * vision.PATCH**2, generator=generator, dtype=torch.float64)
    given = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]),
             "mm_token_type_ids": (ids == IMAGE).int()}  # fmt: skip
    with manyheads.use(model, spec):
        whole = model(**given).logits
        first = {name: x[:, :-2] if name.endswith("ids") else x for name, x in given.items()}
        out = model(**first, use_cache=True)
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [8, 6]
        after = model(input_ids=ids[:, -2:], past_key_values=out.past_key_values, use_cache=True).logits
    assert is_far(whole, model(**given).logits, DEEP)
    assert_close(after, whole[:, -2:], SAME)
    model, inputs, found = reader(), prompts(), []
    real = inputs["attention_mask"].bool()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        with manyheads.use(model, SPECS[1]):
            found.append(model(**inputs).logits[real])
    assert_close(*found, SAME)  # an eager softmax is in float32


@torch.no_grad()
def test_it_writes():
    model, inputs = reader(), prompts((5,))
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with manyheads.use(model, "spatial_gating:eta=1"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), plain)
    with manyheads.use(model, SPECS[1]):
        written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        ids, cache, mask = inputs["input_ids"], None, inputs["attention_mask"]
        for _ in range(4):
            given = {"input_ids": ids} | ({} if cache else {"pixel_values": inputs["pixel_values"]})
            out = model(**given, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(2)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            assert ids[0, 0] == written[0, mask.shape[1] - 1]


@torch.no_grad()
def test_flow_is_what_blocks_by_hand_attend_with():
    model, inputs = reader(), prompts((6,))
    strategy = manyheads.parse("spatial_gating.flow")
    with manyheads.use(model, strategy) as port:
        for _ in range(2):
            model(**inputs)
    x, ids = stream(model, inputs)[0], inputs["input_ids"][0]
    at, last = torch.arange(len(ids)), int((ids == IMAGE).nonzero()[-1])
    decoder = model.model.language_model
    cos, sin = decoder.rotary_emb(x[None], at[None])
    block = decoder.layers[0]
    want = flow_of(block.self_attn, block.input_layernorm(x), at, (cos[0], sin[0]), last, "question")[ids == IMAGE]
    states = [state for _, state in port.kept(strategy)]
    assert len(states) == 4 and all(len(state["flows"]) == 2 for state in states)
    for flow in states[0]["flows"]:
        assert_close(flow[0], want, DEEP)


def test_received_with_a_mask_and_grouped_queries():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 4, generator=generator, dtype=torch.float64) for heads in (4, 2))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, ..., 1] = False
    call = AttentionCall(site=Site("a", 0, 0, "self", True), q=q, k=k, v=k, scale=0.7, mask=mask, is_causal=True)
    asking = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 1]], dtype=torch.bool)
    allowed = mask & torch.ones(5, 5, dtype=torch.bool).tril()
    weights = (0.7 * q @ k.repeat_interleave(2, 1).mT).masked_fill(~allowed, -math.inf).softmax(3)
    want = torch.stack([weights[row, :, asking[row]].mean((0, 1)) for row in range(2)])
    assert_close(received(call, asking), want, FORMULA)
    assert received(call, torch.zeros_like(asking)).abs().max() == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.sampled_from([0.3, 0.75, 0.95, 1.0]))
def test_needed_is_the_least_number(flow, eta):
    flow = torch.tensor(flow, dtype=torch.float64) + (0 if any(flow) else 1)
    best = flow.sort(descending=True).values
    count = int(needed(flow, eta))
    assert float(best[:count].sum()) >= eta * float(flow.sum()) * (1 - 1e-12)
    assert count == 1 or float(best[: count - 1].sum()) < eta * float(flow.sum())


def test_idle_and_schedules_by_hand():
    assert idle(torch.tensor([0.01, 0.02, 0.02, 0.95])) == 0.75
    assert idle(torch.ones(10)) == 0
    flows = [torch.tensor([[4.0, 3, 2, 1], [9, 1, 0, 0], [9, 1, 0, 0]])] * 3 + [torch.ones(3, 4)]
    assert schedule_of([*flows, flows[3]], eta=0.9) == (1.0, 1.0, 0.25, 0.25, 0.25)  # never rises
    assert schedule_of(flows, eta=0.95, start=3) == (1.0, 1.0, 1.0, 0.5)
    assert_close(needed(torch.ones(3, 4), 0.5), torch.full((3,), 2), within(torch.float32, CALL))


def test_means_of_stretches():
    from manyheads.tokens.spatial_gating.spatial_gating import _pooled

    x = torch.arange(7.0)[None, :, None].expand(2, 7, 3).double()
    image = torch.tensor([False, True, True, True, False, True, False]).expand(2, 7)
    kept, fewer = _pooled(x, image, 2)
    assert kept.tolist() == [[0, 1, 3, 4, 6]] * 2
    assert fewer[0, :, 0].tolist() == [0, 1.5, 4, 4, 6]


def test_refused():
    for fields, match in (
        ("eta=0", "parts above 0"), ("start=0", "block 0"), ("schedule=1+0.5+0.7", "never rise"),
        ("by=random", "give a schedule"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            manyheads.parse(f"spatial_gating:{fields}")
    for other in (models.tiny("llama"), models.tiny("gpt2")):
        with pytest.raises(UserError, match="among text"), manyheads.use(other, "spatial_gating"):
            pass
    with pytest.raises(UserError, match="finds no attention"), manyheads.use(build("vit"), "spatial_gating"):
        pass
    model, inputs = reader(), prompts()
    with pytest.raises(UserError, match="cannot hold together"), manyheads.use(model, "spatial_gating", "snapkv"):
        pass
    with pytest.raises(UserError, match="3 parts, and the model 4"), manyheads.use(model, f"{SPECS[1][:-13]},least=2"):
        model(**inputs)
    embeds = torch.zeros(1, 5, 16, dtype=torch.float64)
    with pytest.raises(UserError, match="give input_ids"), manyheads.use(model, SPECS[1]):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    unequal = inputs["input_ids"].clone()
    unequal[0, 1], unequal[1, 20] = 5, IMAGE
    with pytest.raises(UserError, match="equally many"), manyheads.use(model, SPECS[1]):
        model(input_ids=unequal, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"])


def test_rows_of_a_batch_keep_as_many_as_the_one_that_needs_most():
    image = torch.tensor([[False, *[True] * 8, False]] * 2)
    flow = torch.zeros(2, 10)
    flow[0, 1:4] = 1.0  # three tokens have all of it
    flow[1, 1:7] = 1.0  # six
    layout = PromptLayout(image, ~image, 8, block=2, blocks=4, received=flow)
    kept, _ = SpatialGating(least=1, floor=0.0).reduce(torch.randn(2, 10, 3), layout)
    assert kept.shape == (2, 8)
    assert all(set(range(1, 1 + n)) <= set(row.tolist()) for n, row in zip((3, 6), kept, strict=True))
