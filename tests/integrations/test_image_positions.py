# SPDX-License-Identifier: Apache-2.0
"""Ports that place images: what they cannot place they refuse, in a line; caches and other strategies go with them."""

import copy

import pytest
import torch
import transformers

import manyheads
from tiny import vision
from tolerance import SAME, assert_close, is_far

SIZE, SPEC = (3, 3), "concentric_attention"
ROW = (2, SIZE, 3)


@pytest.fixture(scope="module")
def model():
    return vision.llava()


def given(*rows):
    count = sum(isinstance(part, tuple) for row in rows for part in row)
    return {**vision.padded([vision.prompt(*row) for row in rows]), "pixel_values": vision.pixels(count, *SIZE)}


def refused(model, words, spec=SPEC, **inputs):
    with pytest.raises(manyheads.UserError, match=words) as caught, torch.no_grad(), manyheads.use(model, spec):
        model(**inputs)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_placed_is_refused(model):
    good = given(ROW)
    ids = good["input_ids"]
    refused(model, "12 patches|9 tokens", **{**good, "pixel_values": vision.pixels(1, 3, 4)})
    refused(model, "9 tokens stand for", input_ids=ids)
    refused(model, "parted", **{**good, "input_ids": ids[:, [0, 2, 1, *range(3, 14)]]})
    refused(model, "input_ids", inputs_embeds=torch.randn(1, 4, 16, dtype=torch.float64))
    refused(model, "first token", **good, vision_feature_select_strategy="full")
    refused(model, "several sizes", **good, image_sizes=[(6, 6)])
    refused(model, "masks of its own", **{**good, "attention_mask": torch.ones(1, 1, 14, 14, dtype=torch.bool)})
    refused(model, "layers away", f"{SPEC}:layers=0", **good)
    with torch.no_grad():
        past = model(**good).past_key_values
    refused(model, "filled without it", input_ids=ids[:, -1:], past_key_values=past)
    with torch.no_grad(), manyheads.use(model, SPEC):
        past = model(**good).past_key_values
    past.batch_repeat_interleave(2)
    refused(model, "1 rows, not 2", input_ids=ids[:, -1:].expand(2, 1), past_key_values=past)
    with pytest.raises(manyheads.UserError, match="did not run"), manyheads.use(model, SPEC):
        pass
    with pytest.raises(manyheads.UserError, match="cannot hold together"), manyheads.use(model, SPEC, "tc_llava"):
        pass
    with torch.no_grad(), manyheads.use(model, SPEC):
        model(**good)
        with pytest.raises(manyheads.UserError, match="another strategy"), manyheads.use(model, "tc_llava"):
            pass


def test_models_that_it_does_not_know_are_refused(model):
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    refused(llama, "of a model that reads them", input_ids=torch.tensor([[1]]))
    config = copy.deepcopy(model.config)
    config.text_config = transformers.MistralConfig(**small, sliding_window=4)
    refused(transformers.LlavaForConditionalGeneration(config), "sliding window", input_ids=torch.tensor([[1]]))


def test_eager_attention_and_caches_of_fixed_size_give_the_same(model):
    good = given(ROW, (SIZE, 1, SIZE, 2))
    real = good["attention_mask"].bool()
    with torch.no_grad(), manyheads.use(model, SPEC):
        want = model(**good).logits
        made = model.generate(**good, max_new_tokens=3, do_sample=False)
        fixed = transformers.StaticCache(config=model.config.text_config, max_cache_len=40)
        first = model(**good, past_key_values=fixed).logits
        told = torch.cat([good["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        second = model(input_ids=made[:, 21:22], attention_mask=told, past_key_values=fixed).logits
        beams = model.generate(**good, max_new_tokens=3, num_beams=2, do_sample=False)
        alone = model.generate(**given(ROW), max_new_tokens=3, num_beams=2, do_sample=False)
    assert_close(first[real], want[real], SAME)
    assert torch.equal(second[:, -1].argmax(-1), made[:, 22])
    with pytest.raises(manyheads.UserError, match="fixed size"), manyheads.use(model, SPEC):
        model.generate(**good, max_new_tokens=3, cache_implementation="static")
    assert torch.equal(beams[0, -3:], alone[0, -3:])
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), manyheads.use(model, SPEC):
            assert_close(model(**good).logits[real], want[real], SAME)
        with torch.no_grad():
            assert is_far(model(**good).logits[real], want[real], SAME)
    finally:
        model.set_attn_implementation("sdpa")


def test_a_cache_strategy_that_keeps_all_goes_with_it(model):
    good = given(ROW)
    with torch.no_grad(), manyheads.use(model, SPEC):
        want = model.generate(**good, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), manyheads.use(model, SPEC, "full"):
        assert torch.equal(model.generate(**good, max_new_tokens=4, do_sample=False), want)
    with torch.no_grad(), manyheads.use(model, SPEC, "snapkv:budget=0.5"):
        assert model.generate(**good, max_new_tokens=4, do_sample=False).shape == want.shape


def test_padding_filled_with_anything_changes_nothing(model):
    good = given(ROW, (SIZE, 1, SIZE, 2))
    real = good["attention_mask"].bool()
    other = {**good, "input_ids": torch.where(real, good["input_ids"], 7)}
    with torch.no_grad(), manyheads.use(model, SPEC):
        before, after = model(**good).logits, model(**other).logits
        unmasked = model(**{**other, "attention_mask": None}).logits
        order = (~real).long().argsort(dim=1, stable=True)  # the same rows, padded behind
        behind = {name: good[name].gather(1, order) for name in ("input_ids", "attention_mask")}
        moved = model(**behind, pixel_values=good["pixel_values"]).logits
    assert torch.equal(before[real], after[real]) and before.isfinite().all()
    assert_close(moved[behind["attention_mask"].bool()], before[real], SAME)
    assert is_far(unmasked[real], before[real], SAME)  # control


def test_features_encoded_elsewhere_have_no_size(model):
    good = given(ROW)
    with torch.no_grad():
        features = model.get_image_features(good["pixel_values"])
    refused(model, "have no sizes", input_ids=good["input_ids"], mm_encoder_outputs={"image": features})


def test_frames_of_a_video_are_images():
    model = vision.qwen()
    grid = torch.tensor([[2, 6, 6]])
    ids = vision.prompt(1, (3, 3), (3, 3), 2)
    ids = torch.tensor([[vision.VIDEO if x == vision.IMAGE else x for x in ids]])
    video = torch.randn(72, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = {}
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.update(at=args[1]))
    with torch.no_grad(), manyheads.use(model, SPEC):
        model(input_ids=ids, pixel_values_videos=video, video_grid_thw=grid)
    hook.remove()
    assert seen["at"][0].tolist() == [[0, 1, 1, 1, 1, 2, 1, 1, 1, 1, 3, 3, 3, 3, 4, 3, 3, 3, 3, 5, 6]]
