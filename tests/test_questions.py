# SPDX-License-Identifier: Apache-2.0
"""One context, many questions: each is answered from the same compressed cache, in any order."""

import json

import pytest
import torch

import manyheads
from manyheads import questions
from manyheads.errors import UserError
from manyheads.integrations.cache import SlotCache
from tiny import inspect as tiny

ASKED = ["who wrote it?", "import os", "what is returned by the function?"]
SPECS = [
    "full",
    "knorm:budget=0.5",
    "snapkv:budget=0.3,window_size=8",
    "streaming_llm:budget=0.3",
    "fireq:base=knorm,budget=0.5",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer(tiny.standard_library()[:12])


@pytest.fixture(scope="module")
def model():
    return tiny.make_model()


@pytest.fixture(scope="module")
def context():
    return tiny.standard_library()[0].content[:500]


def plain(model, tokenizer, context, question, new):
    """What the model alone says to the whole text."""
    message = [{"role": "user", "content": f"{context}\n\n{question}"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(question)
    ids = [*tokenizer.encode(before, add_special_tokens=False), *tokenizer.encode(question + after)]
    with torch.inference_mode():
        made = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip()


def test_with_the_full_cache_it_says_what_the_model_says(model, tokenizer, context):
    found = manyheads.ask(model, tokenizer, context, ASKED, max_new_tokens=8)
    assert found.answers == [plain(model, tokenizer, context, question, 8) for question in ASKED]
    assert len(set(found.answers)) == len(ASKED) and found.bytes == found.full_bytes


@pytest.mark.parametrize("spec", SPECS)
def test_the_order_does_not_matter(model, tokenizer, context, spec):
    there = manyheads.ask(model, tokenizer, context, ASKED, strategy=spec, max_new_tokens=8)
    back = manyheads.ask(model, tokenizer, context, ASKED[::-1], strategy=spec, max_new_tokens=8)
    alone = [manyheads.ask(model, tokenizer, context, [q], strategy=spec, max_new_tokens=8).answers[0] for q in ASKED]
    assert there.answers == back.answers[::-1] == alone
    assert there.bytes == back.bytes and (there.bytes < there.full_bytes) == (spec != "full")


def test_a_cache_that_is_shared_instead_of_copied_would_be_seen(model, tokenizer, context, monkeypatch):
    """The control: with one cache for all questions, the second is not answered as if it came first."""
    right = manyheads.ask(model, tokenizer, context, ASKED, strategy=SPECS[1], max_new_tokens=8)
    monkeypatch.setattr(SlotCache, "__deepcopy__", lambda self, memo: self, raising=False)
    wrong = manyheads.ask(model, tokenizer, context, ASKED, strategy=SPECS[1], max_new_tokens=8).answers
    assert wrong[0] == right.answers[0] and wrong[1:] != right.answers[1:]


def test_it_is_compressed_before_the_question(model, tokenizer, context, monkeypatch):
    """What is kept is the same for every question: the cache that is copied has read the context alone."""
    seen = []
    monkeypatch.setattr(questions, "_answer", lambda m, t, cache, read, *rest: seen.append(cache) or "")
    found = manyheads.ask(model, tokenizer, context, ASKED, strategy="snapkv:budget=0.3,window_size=8")
    kept = [[layer.store.keys for layer in cache.layers] for cache in seen]
    assert all(torch.equal(a, b) for layers in kept[1:] for a, b in zip(kept[0], layers, strict=True))
    assert len({id(layers[0]) for layers in kept}) == len(ASKED)
    assert all(cache.get_seq_length() == found.tokens - 1 for cache in seen)


def test_other_strategies_act_too_and_the_cache_has_the_right_bytes(model, tokenizer, context):
    edited = manyheads.ask(model, tokenizer, context, ASKED, strategy="ablate:heads=0.0+0.1+0.2+0.3", max_new_tokens=8)
    both = manyheads.ask(model, tokenizer, context, ASKED, strategy="ablate:heads=0.0+0.1+0.2+0.3 + knorm:budget=0.5")
    whole = manyheads.ask(model, tokenizer, context, ASKED, max_new_tokens=8)
    assert edited.answers != whole.answers and both.bytes < whole.bytes == edited.bytes
    heads, size = 2 * 2, 8  # layers times key/value heads, channels
    assert whole.bytes == (whole.tokens - 1) * 2 * heads * size * 4


def test_without_a_template(model, tokenizer, context):
    raw = manyheads.ask(model, tokenizer, context, ASKED[:1], max_new_tokens=8, chat=False)
    ids = [*tokenizer.encode(f"{context}\n\n"), *tokenizer.encode(f"{ASKED[0]}\n", add_special_tokens=False)]
    with torch.inference_mode():
        made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert raw.answers == [tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip()]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"questions": []}, "at least one question"),
        ({"context": "  "}, "not empty"),
        ({"context": "word " * 600}, "512 positions"),
        ({"strategy": "knorm + snapkv"}, "each keeps the cache"),
        ({"strategy": "sag"}, "denoiser"),
    ],
)
def test_refusals(model, tokenizer, context, changes, says):
    given = {"context": context, "questions": ASKED, "strategy": "full"} | changes
    with pytest.raises(UserError, match=says):
        manyheads.ask(model, tokenizer, **given)


def test_command(model, tokenizer, context, tmp_path, capsys):
    from manyheads.cli import main

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "report.txt").write_text(context)
    common = ["ask", "--model", str(tmp_path), "--context", str(tmp_path / "report.txt"), *ASKED[:2]]
    common += ["--strategy", "knorm:budget=0.5", "--max-new-tokens", "8"]

    def run(*more):
        with pytest.raises(SystemExit) as stop:
            main([*common, *more])
        return stop.value.code, capsys.readouterr()

    code, shown = run("--json")
    found = json.loads(shown.out)
    expected = manyheads.ask(model, tokenizer, context, ASKED[:2], strategy="knorm:budget=0.5", max_new_tokens=8)
    assert code == 0 and [each["answer"] for each in found["answers"]] == expected.answers
    assert found["bytes"] == expected.bytes and found["full_bytes"] == expected.full_bytes
    code, shown = run()
    assert code == 0 and all(question in shown.out for question in ASKED[:2]) and "of the whole one's" in shown.out
    common[4] = str(tmp_path / "nothing.txt")
    code, shown = run()
    assert code == 2 and "cannot be read" in shown.err
