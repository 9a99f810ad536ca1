# SPDX-License-Identifier: Apache-2.0
"""A reply about a picture, from a tiny LLaVA with a processor of transformers."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

import manyheads
from manyheads import UserError
from manyheads.cli import main
from manyheads.generate import pictures
from manyheads.integrations.decoding import write
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.writing import Request
from tiny import vision
from tiny.compare import tiny

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
    read = [torch.cat(ids[i : i + 2], 1)[0].tolist() for i in (1, 4, 7)]  # behind a word or two that warm up
    image = [vision.IMAGE] * 16
    assert read == [[*image, 7, 8], [5, *image, 7, 9], [*image, 7]]


@pytest.mark.parametrize("spec", ["full", "streaming_llm:budget=0.5", "sampling:top_k=1", "lnd:top_k=1"])
def test_a_cache_reads_the_picture_with_the_prompt(model, processor, spec):
    read = processor(images=PICTURE, text=PROMPT, return_tensors="pt")
    given = {"input_ids": read["input_ids"], "pixel_values": read["pixel_values"].double()}
    cached = spec.startswith("streaming")

    def own(given):
        with manyheads.use(model, *([spec] if cached else [])):
            made = model.generate(**given, max_new_tokens=5, do_sample=False)
        return processor.tokenizer.decode(made[0, read["input_ids"].shape[1] :], skip_special_tokens=True)

    with pytest.warns() if cached else nullcontext():
        said = manyheads.reply(model, processor, PROMPT, spec, image=PICTURE, max_new_tokens=5)
        assert said == own(given) != own({"input_ids": given["input_ids"]})


def test_what_a_model_is_told_of_its_tokens_is_told_in_parts():
    """Qwen2-VL places images by the types of tokens: a prompt that is read without them stands elsewhere."""
    model, words = vision.qwen(), " ".join
    ids = torch.tensor([[5, 57, *[vision.IMAGE] * 4, 56, 7, 8, 9]])
    pixels = torch.randn(16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    types = {"mm_token_type_ids": (ids == vision.IMAGE).long()}

    class Processor:
        image_processor, image_token = True, "<image>"
        tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids, **_: words(map(str, ids)))

        def __call__(self, **asked):
            return given | types | {"attention_mask": torch.ones_like(ids)}

    model.generation_config.eos_token_id = None
    said = manyheads.reply(model, Processor(), "x", image=PICTURE, max_new_tokens=6)
    own, wrong = (model.generate(**given, **more, max_new_tokens=6, do_sample=False)[0, 10:] for more in (types, {}))
    assert said == words(map(str, own.tolist())) != words(map(str, wrong.tolist()))
    where, _ = model.model.get_rope_index(ids, types["mm_token_type_ids"], given["image_grid_thw"])
    del given["input_ids"]
    with manyheads.use(model), torch.no_grad():  # and so behind a cache that has dropped tokens
        caches = [new_cache(model, manyheads.parse("keydiff:budget=0.6")) for _ in range(3)]
        for cache in caches:
            prefill(model, ids, cache, given=given | types)
        last = {"input_ids": ids[:, -1:]}
        found = model(**last, past_key_values=caches[0]).logits
        right, off = (
            model(**last, past_key_values=cache, position_ids=where[..., -1:] + far).logits
            for cache, far in zip(caches[1:], (0, 1), strict=True)
        )
    assert torch.equal(found, right) and not torch.equal(found, off)


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    PICTURE.save(tmp_path / "photo.png")
    return tmp_path


def generate(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_the_command_replies_as_python_does(model, processor, folder, capsys):
    specs = ["full", "vcd:alpha=3", "sampling:temperature=2", "vcd:alpha=3 + ablate:heads=1.0"]
    code, out, err = generate(
        capsys, "--model", folder, PROMPT, "--image", folder / "photo.png", "--max-new-tokens", 5, "--seed", 2,
        "--json", "--strategies", ",".join(specs[1:3]), "--strategy", specs[3], "--out", folder / "page.html",
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)
    told = {reply["arm"]: reply["text"] for reply in facts["prompts"][0]["replies"]}
    say = {"image": PICTURE, "max_new_tokens": 5, "seed": 2}
    assert told == {spec: manyheads.reply(model, processor, PROMPT, spec, **say) for spec in specs}
    assert len(set(told.values())) > 2 and facts["prompts"][0]["prompt_tokens"] == 20
    assert facts["image"].endswith("photo.png") and "w7" in (folder / "page.html").read_text()


def test_the_command_refuses_what_does_not_fit(folder, capsys):
    tiny().save_pretrained(folder / "text")
    image = ("--image", folder / "photo.png")
    for arguments, why in (
        (("--model", folder / "text", *image), "reads text: leave --image away"),
        (("--model", folder, "--image", folder / "none.png"), "no image that can be read"),
        (("--model", folder, *image, "--lens", "heads"), "--lens counts words"),
        (("--model", folder, *image, "--strategy", "hogwild"), "reads blocks of words alone"),
        (("--model", folder, *image, "--strategy", "dpad"), "no masked diffusion language model"),
        (("--model", folder, *image, "--strategy", "vcd + streaming_llm:budget=0.5"), "writes without a cache"),
        (image, "makes images, and --image is of texts"),
    ):
        code, _, err = generate(capsys, PROMPT, *arguments)
        assert code and why in err.replace("\n", " ") and "Traceback" not in err, (arguments, err)


def test_what_does_not_fit_is_refused(model, processor):
    for wrong, why in (("hogwild", "reads blocks of words alone"), ("vcd + pai", "cannot hold together")):
        with pytest.raises(UserError, match=why):
            manyheads.reply(model, processor, PROMPT, wrong, image=PICTURE)
    with pytest.raises(UserError, match="reads no pictures"):
        manyheads.reply(model, processor.tokenizer, PROMPT, "vcd", image=PICTURE)
    with pytest.raises(UserError, match="no chat template"):
        manyheads.reply(model, processor, PROMPT, "vcd", image=PICTURE, chat=True)
    with pytest.raises(UserError, match="2 <image> tokens and 1 images"):
        manyheads.reply(model, processor, "<image> <image> w7", image=PICTURE)
    with pytest.raises(UserError, match="does not take"):
        manyheads.reply(model, processor, PROMPT, image="nowhere.png")
    with pytest.raises(UserError, match="LlamaForCausalLM reads no pictures"):  # nor does it say so itself
        manyheads.reply(tiny(), processor, PROMPT, image=PICTURE)
    with pytest.raises(UserError, match="prompt and reply have up to 10"):  # by what its decoder can read
        manyheads.reply(model, processor, PROMPT, image=PICTURE, max_new_tokens=1000)
    processor.chat_template = TEMPLATE
    with pytest.raises(UserError, match="a message in the chat template"):
        manyheads.reply(model, processor, "w7", image=PICTURE, chat=False, system="w5")


def test_a_template_that_begins_a_text_begins_it_once(model, processor):
    """Where the tokenizer would begin it too, as Gemma's."""
    begun = tokenizers.processors.TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    processor.tokenizer.backend_tokenizer.post_processor = begun
    for template in (TEMPLATE, "w2 " + TEMPLATE):
        processor.chat_template = template
        ids, _ = pictures.read(model, processor, "w7", PICTURE, None, "")
        assert ids == [2, *[vision.IMAGE] * 16, 7, 9]
