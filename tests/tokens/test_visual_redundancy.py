# SPDX-License-Identifier: Apache-2.0
"""Fewer image tokens for a decoder, and hidden ones: against models written out, and decoding as in one forward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manyheads
from manyheads import UserError
from manyheads.attention.merging import Grouping
from manyheads.data.visual_questions import INSTRUCTED_WORDS
from manyheads.models import joined_vlm
from manyheads.reducing import ImageTokens
from manyheads.tokens.fastv import FastV
from manyheads.tokens.visual_redundancy import CMAI, VMTC, cosine_clusters, focus, least_focused
from oracles.fingerprint import assert_same, of_model
from tolerance import DEEP, assert_close, is_far

SIDE, IMAGE = 4, 2
REDUCERS = (
    "visual_redundancy:primary=0.3,clusters=0.1", "visual_redundancy:choose=random",
    "visual_redundancy:merge=false", "feature_pool", "feature_pool:how=first", "feature_pool:how=random",
    "feature_pool:how=similar",
)  # fmt: skip
HIDERS = ("visual_redundancy.cmai", "fastv:start=1,keep=0.25")
BOTH = "visual_redundancy:primary=0.3,clusters=0.1", "visual_redundancy.cmai"


def build():
    torch.manual_seed(0)
    vlm = joined_vlm.small(patches=SIDE, size=2, dim=32, layers=3, heads=4, words=INSTRUCTED_WORDS)
    return vlm.model.double().eval()


def inputs(rows=2, images=1, words=6, padded=0):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, 30, (rows, words + 2), generator=generator)
    ids = torch.cat([text[:, :2], torch.full((rows, images * SIDE**2), IMAGE), text[:, 2:]], 1)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -padded:] = 0
        ids[0, -padded:] = 0
    pixels = torch.randn(rows * images, 3, 2 * SIDE, 2 * SIDE, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.no_grad()
def logits(model, *specs, **given):
    with manyheads.use(model, *specs):
        return model(**given).logits


@torch.no_grad()
def literal(model, given, grouping, weights):
    """The decoder on the columns that stay, by hand: means in place, positions of all tokens, outputs put back."""
    llava, ids = model.model, given["input_ids"]
    features = torch.stack(llava.get_image_features(given["pixel_values"]).pooler_output)
    made = grouping.reduce(features, weights)
    rows = []
    for b in range(len(ids)):
        embeds = llava.get_input_embeddings()(ids[b]).clone()
        at = (ids[b] == IMAGE).nonzero()[:, 0]
        members = [(grouping.into[b] == g).nonzero()[:, 0] for g in range(grouping.count)]
        stays = [int(m[weights[b, m].argmax()]) for m in members]
        embeds[at] = features[b]
        for g, place in enumerate(stays):
            embeds[at[place]] = made[b, g]
        keep = [i for i in range(ids.shape[1]) if ids[b, i] != IMAGE] + [int(at[place]) for place in stays]
        keep = torch.tensor(sorted(keep))
        hidden = llava.language_model(inputs_embeds=embeds[None, keep], position_ids=keep[None]).last_hidden_state[0]
        whole = torch.zeros(ids.shape[1], hidden.shape[1], dtype=hidden.dtype)
        whole[keep] = hidden
        for g, m in enumerate(members):
            whole[at[m]] = whole[at[stays[g]]].clone()
        rows.append(whole)
    return model.lm_head(torch.stack(rows))


def test_merged_tokens_are_those_of_a_decoder_by_hand():
    model, given = build(), inputs()
    strategy = VMTC(primary=0.3, clusters=0.1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.model.vision_tower(given["pixel_values"], output_attentions=True)
        weights = out.attentions[-1].mean(1)[:, 0, 1:]  # the tower has one layer
        features = torch.stack(model.model.get_image_features(given["pixel_values"]).pooler_output)
    model.set_attn_implementation("sdpa")
    top = weights.argsort(dim=1, descending=True, stable=True)
    into = torch.full(weights.shape, -1)
    for b in range(2):
        into[b, top[b, :5]] = torch.arange(5)
        rest = (into[b] < 0).nonzero()[:, 0]
        into[b, rest] = 5 + cosine_clusters(features[b, rest], 2)
    want = literal(model, given, Grouping(into, 7), weights)
    got = logits(model, strategy, **given)
    assert_close(got, want, DEEP)
    assert is_far(got, logits(model, VMTC(primary=0.3, clusters=0.1, choose="random"), **given), DEEP)
    assert is_far(got, model(**given).logits.detach(), DEEP)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_pooled_tokens_are_those_of_a_decoder_by_hand(how):
    model, given = build(), inputs()
    cells = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]).expand(2, -1)
    weights = torch.ones(2, 16, dtype=torch.float64)
    if how == "first":
        cells = torch.full((2, 16), 4).scatter(1, torch.tensor([[0, 2, 8, 10]] * 2), torch.arange(4).expand(2, -1))
    got = logits(model, f"feature_pool:how={how}", **given)
    kept = (given["input_ids"] != IMAGE) if how == "first" else torch.ones_like(given["input_ids"], dtype=torch.bool)
    assert_close(got[kept], literal(model, given, Grouping(cells, 4), weights)[kept], DEEP)


@pytest.mark.parametrize("spec", ["visual_redundancy:primary=1,clusters=0", "feature_pool:cell=1"])
def test_all_tokens_are_the_model(spec):
    model, given = build(), inputs(padded=2)
    assert torch.equal(logits(model, spec, **given)[1], model(**given).logits.detach()[1])


@pytest.mark.parametrize("specs", [(spec,) for spec in (*REDUCERS, *HIDERS)] + [BOTH])
def test_restored_rows_and_padding(specs):
    model, given = build(), inputs(padded=2)
    plain = model(**given).logits.detach()
    before = of_model(model)
    got = logits(model, *specs, **given)
    assert is_far(got[1], plain[1], DEEP) and got.shape == plain.shape
    assert_same(of_model(model), before)
    assert torch.equal(model(**given).logits.detach(), plain)
    for b, real in ((0, slice(0, -2)), (1, slice(None))):
        alone = {name: x[b : b + 1] for name, x in given.items()}
        alone = {name: x if name == "pixel_values" else x[:, real] for name, x in alone.items()}
        assert_close(logits(model, *specs, **alone)[0], got[b, real], DEEP)


@pytest.mark.parametrize("specs", [REDUCERS[:1], HIDERS[:1], HIDERS[1:], BOTH])
def test_decoding_is_one_forward(specs):
    model, given = build(), inputs()
    with torch.no_grad(), manyheads.use(model, *specs):
        written = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
        made = model(**given, use_cache=True)
        mask, steps = given["attention_mask"], []
        for i in range(3):
            mask = torch.cat([mask, mask[:, :1]], 1)
            token = written[:, given["input_ids"].shape[1] + i, None]
            made = model(input_ids=token, attention_mask=mask, past_key_values=made.past_key_values, use_cache=True)
            steps.append(made.logits[:, 0])
        ids = written[:, :-1]
        whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given["pixel_values"]).logits
    if specs != HIDERS[1:]:  # what fastv hides is chosen by the words of the prompt alone
        assert_close(torch.stack(steps, 1), whole[:, -3:], DEEP)
    assert torch.equal(torch.stack(steps, 1).argmax(-1), written[:, -3:])


def test_several_images_and_a_turn_without_any():
    model, given = build(), inputs(images=2)
    with torch.no_grad(), manyheads.use(model, REDUCERS[0]):
        whole = model(**given).logits
        cut = given["input_ids"].shape[1] - 3
        first = model(
            input_ids=given["input_ids"][:, :cut], pixel_values=given["pixel_values"], use_cache=True
        )  # fmt: skip
        rest = model(input_ids=given["input_ids"][:, cut:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(rest.logits, whole[:, cut:], DEEP)


def test_a_model_is_tuned_through_both():
    model, given = build(), inputs()
    with manyheads.use(model, *BOTH):
        model(**given).logits.square().mean().backward()
    for part in (model.model.multi_modal_projector, model.model.vision_tower.embeddings):
        assert all(bool(p.grad.abs().sum() > 0) for p in part.parameters() if p.grad is not None)
        assert any(p.grad is not None for p in part.parameters())


def test_hidden_tokens_by_the_formula():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 9, 9, generator=generator, dtype=torch.float64).tril()
    a = a / a.sum(-1, keepdim=True)
    columns = torch.tensor([[False, True, True, True, True, True, False, False, False]])
    got = focus(a, a, columns)
    words, image = [0, 6, 7, 8], [1, 2, 3, 4, 5]
    for t in range(9):
        total = sum(float(a[0, t, s]) for s in words)
        for i in image:
            want = sum(float(a[0, t, s]) / total * float(a[0, s, i]) for s in words) if total else 0.0
            assert float(got[0, t, i]) == pytest.approx(want, rel=1e-9)
    hide = least_focused(got, columns, 0.5, 1)
    for t in words[1:]:
        order = sorted(image, key=lambda i: float(got[0, t, i]))
        assert hide[0, t].nonzero()[:, 0].tolist() == sorted(order[:2])
    assert not least_focused(got, columns, 0.0, 1).any() and int(least_focused(got, columns, 1.0, 4)[0, 8].sum()) == 1
    alone = torch.eye(9, dtype=torch.float64)[None]  # words that look at themselves: their own focus
    mixed = alone + a.masked_fill(~columns[:, None], 0.0)
    assert_close(focus(mixed, mixed, columns)[0, 6:], mixed.masked_fill(~columns[:, None], 0.0)[0, 6:])


def test_words_alone_lose_sight():
    images = ImageTokens(columns=torch.tensor([[False, True, True, False]]))
    rows = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.2, 0.6, 0], [0.3, 0.1, 0.2, 0.4]]])
    hide = CMAI(least=1).hidden(rows, images, 0)[0]
    assert hide[3].tolist() == [False, True, False, False] and not hide[1:3].any()
    images.real = torch.ones(1, 4, dtype=torch.bool)
    assert FastV(start=1).hidden(rows, images, 0)[0].tolist() == [[False, True, False, False]] * 4
    assert FastV(start=1).hidden(rows, images, 1) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_clusters_are_none_empty(count, clusters, seed, equal):
    clusters = min(count, clusters)
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    x = x[:1].expand(count, -1) if equal else x
    labels = cosine_clusters(x, clusters, seed)
    assert sorted(set(labels.tolist())) == list(range(clusters))
    assert torch.equal(labels, cosine_clusters(2 * x, clusters, seed))


def test_clusters_find_what_lies_apart():
    x = torch.tensor([[1.0, 0.0], [9.0, 0.1], [0.0, 2.0], [0.1, 5.0], [2.0, 0.1]])
    labels = cosine_clusters(x, 2).tolist()
    assert labels[0] == labels[1] == labels[4] != labels[2] == labels[3]


def test_refused():
    model, given = build(), inputs()
    with pytest.raises(UserError, match="each reduces"), manyheads.use(model, "feature_pool", REDUCERS[0]):
        pass
    with pytest.raises(UserError, match="as LLaVA"), manyheads.use(model.model.vision_tower, "feature_pool"):
        pass
    for wrong in ("visual_redundancy:primary=1.5", "visual_redundancy.cmai:start=0", "fastv:keep=0",
                  "feature_pool:cell=0", "visual_redundancy.cmai:ratio=2"):  # fmt: skip
        with pytest.raises(UserError):
            manyheads.parse(wrong)
    with pytest.raises(UserError, match="leaves no token"):
        logits(model, "visual_redundancy:primary=0.01,clusters=0", **given)
    made = model(**given, use_cache=True)
    with pytest.raises(UserError, match="filled without it"):
        logits(model, REDUCERS[0], input_ids=given["input_ids"][:, :1], past_key_values=made.past_key_values)
    given["input_ids"][0, 2] = 5
    with pytest.raises((UserError, ValueError)):
        logits(model, REDUCERS[0], **given)


def test_importance_is_of_the_layer_before_the_last():
    """Of the class token, or of all patches; a tower of one layer has that one."""
    source = torch.Generator().manual_seed(0)
    layers = [tuple(torch.rand(2, 5, generator=source) for _ in range(2)) for _ in range(3)]
    seen = [{}, *({"received": pair} for pair in layers)]
    assert torch.equal(VMTC().importance(4, seen), layers[1][0][:, 1:])
    assert torch.equal(VMTC(source="patches").importance(4, seen), layers[1][1][:, 1:])
    assert torch.equal(VMTC().importance(5, seen), layers[1][1])  # no class token
    assert torch.equal(VMTC().importance(4, seen[:2]), layers[0][0][:, 1:])


def test_clusters_are_moved_until_each_token_is_where_it_fits_best():
    source = torch.Generator().manual_seed(3)
    for seed in range(8):
        x = torch.nn.functional.normalize(torch.randn(40, 2, generator=source), dim=1)
        labels = cosine_clusters(x, 4, seed)
        centres = torch.stack([x[labels == c].sum(0) for c in range(4)])
        likeness = x @ torch.nn.functional.normalize(centres, dim=1).T
        assert torch.equal(likeness.argmax(1), labels)
