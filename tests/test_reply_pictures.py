# SPDX-License-Identifier: Apache-2.0
"""A reply about a picture, from a tiny LLaVA with a processor of transformers."""

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

import manyheads
from manyheads import UserError
from manyheads.integrations.decoding import write
from manyheads.writing import Request
from tiny import vision

PROMPT = "w2 <image> w7 w8 w9"
PICTURE = Image.fromarray((np.random.default_rng(0).random((20, 30, 3)) * 255).astype("uint8"))
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}w9"
)


@pytest.fixture(scope="module")
def model():
    return vision.llava()


@pytest.fixture
def processor():
    words = {f"w{i}": i for i in range(vision.IMAGE)} | {"<image>": vision.IMAGE}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w1", pad_token="w0", bos_token="w2", additional_special_tokens=["<image>"]
    )
    size = {"height": 4 * vision.PATCH, "width": 4 * vision.PATCH}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size), tokenizer=tokenizer,
        patch_size=vision.PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["full", "conscious_gaze:gate=always,target=0.9", "vcd:alpha=3"])
def test_a_reply_is_what_the_strategy_writes(model, processor, spec):
    said = manyheads.reply(model, processor, PROMPT, spec, image=PICTURE, max_new_tokens=5, seed=2)
    read = processor(images=PICTURE, text=PROMPT, return_tensors="pt")
    assert int((read["input_ids"] == vision.IMAGE).sum()) == 16
    given = {"pixel_values": read["pixel_values"].double()}
    plain = manyheads.parse("conscious_gaze:gate=never")
    for strategy, same in ((plain if spec == "full" else manyheads.parse(spec), True), (plain, spec == "full")):
        request = Request(model, None, read["input_ids"], 5, frozenset({2}), 2, given=given)
        tokens = write(strategy, request).tokens
        assert (said == processor.tokenizer.decode(tokens, skip_special_tokens=True)) == same


def test_a_prompt_that_names_no_picture_follows_it_and_a_template_is_used(model, processor):
    ids = []
    hook = model.register_forward_pre_hook(lambda _, __, given: ids.append(given["input_ids"]), with_kwargs=True)
    try:
        manyheads.reply(model, processor, "w7 w8", "conscious_gaze:gate=never", image=PICTURE, max_new_tokens=1)
        processor.chat_template = TEMPLATE
        say = {"image": PICTURE, "max_new_tokens": 1}
        manyheads.reply(model, processor, "w7", "conscious_gaze:gate=never", system="w5", **say)
        manyheads.reply(model, processor, "w7", "conscious_gaze:gate=never", chat=False, **say)
    finally:
        hook.remove()
    read = [torch.cat(ids[i : i + 2], 1)[0].tolist() for i in (0, 2, 4)]
    image = [vision.IMAGE] * 16
    assert read == [[*image, 7, 8], [5, *image, 7, 9], [*image, 7]]


def test_what_does_not_fit_is_refused(model, processor):
    for wrong, why in (("snapkv:budget=0.5", "keeps the cache"), ("vcd + pai", "cannot hold together")):
        with pytest.raises(UserError, match=why):
            manyheads.reply(model, processor, PROMPT, wrong, image=PICTURE)
    with pytest.raises(UserError, match="reads no pictures"):
        manyheads.reply(model, processor.tokenizer, PROMPT, "vcd", image=PICTURE)
    with pytest.raises(UserError, match="no chat template"):
        manyheads.reply(model, processor, PROMPT, "vcd", image=PICTURE, chat=True)
