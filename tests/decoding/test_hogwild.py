# SPDX-License-Identifier: Apache-2.0
"""Workers over shared blocks beside a serial reference in float64, and what they read, share, write and end with."""

import html
import io

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import manyheads
from manyheads import UserError, parse
from manyheads.attention.rope import rotate
from manyheads.attention.shared_block import Block
from manyheads.decoding import hogwild
from manyheads.experiment.arms import Arm
from manyheads.generate import texts
from manyheads.integrations import shared_blocks
from manyheads.integrations.decoding import write, write_each
from manyheads.integrations.shared_blocks import SharedBlocks
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.report import generate_texts
from manyheads.report.page import render
from manyheads.writing import Request
from tiny import chat
from tiny.compare import tiny
from tiny.serial import Serial, exact
from tolerance import DEEP, assert_close, is_far

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=4, head_dim=16, **SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=1, head_dim=16, **WINDOWS, **SIZES)),
}
LIMIT = 4 * DEEP  # softmax in parts that are merged, and queries turned twice
IDS = list(range(3, 60, 2)) + list(range(2, 60, 3))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(0)
    return exact(MODELS[request.param]())


def script(read, move, block):
    """Three workers over a prompt and a heading, with texts of unequal lengths, and a paragraph that moves."""
    prompt, past, heading, a, b, c = (block(name) for name in ("prompt", "past", "heading", "a", "b", "c"))
    out = [
        read([([prompt], IDS[:9])]),
        read([([prompt, past], IDS[9:12])]),
        read([([prompt, past, heading], IDS[12:14])]),
    ]
    views = [[prompt, past, *others, heading, own] for own, others in ((a, [b, c]), (b, [c, a]), (c, [a, b]))]
    fed = [[[4], [5, 6, 7], [8, 9]], [[10], [11], [12]], [[13], [14], [15]]]
    out += [read(list(zip(views, tokens, strict=True))) for tokens in fed]
    move(b, past)
    out += [read(list(zip(views, tokens, strict=True))) for tokens in ([[16], [17, 18], [19]], [[20], [21], [22]])]
    out.append(read([(views[1], [23]), (views[2], [24])]))  # the first one has ended
    return torch.cat(out)


def found(model, same_step=True):
    with SharedBlocks(model) as blocks, torch.no_grad():
        return script(lambda rows: blocks.read(rows, same_step=same_step), blocks.move, lambda _: Block())


def wanted(model, same_step=True, **wrong):
    serial = Serial(model, **wrong)
    with torch.no_grad():
        return script(lambda rows: serial.read(rows, same_step), serial.move, str)


@pytest.mark.parametrize("same_step", [True, False])
def test_every_worker_reads_what_one_sequence_of_its_view_would_hold(model, same_step):
    want = wanted(model, same_step)
    assert_close(found(model, same_step), want, LIMIT)
    assert is_far(wanted(model, not same_step), want, LIMIT)
    if hasattr(model.config, "query_pre_attn_scalar"):
        assert is_far(wanted(model, same_step, wrong_window=1), want, LIMIT)


def test_queries_that_are_not_turned_and_keys_that_move_unturned_are_caught(model, monkeypatch):
    want = wanted(model)
    with monkeypatch.context() as patch:
        patch.setattr(shared_blocks, "rotate", lambda x, turn: rotate(x, turn) if len(x) > 1 else x)
        assert is_far(found(model), want, LIMIT)  # what moves, and readers that are alone
    with monkeypatch.context() as patch:
        patch.setattr(shared_blocks, "softmax", lambda x, mask, sinks: x.softmax(-1))
        assert is_far(found(model), want, LIMIT)


def test_any_cut_of_a_text_into_blocks_predicts_what_the_model_does(model):
    with torch.no_grad():
        want = model(input_ids=torch.tensor([IDS[:24]])).logits[0, 20:]
    for cuts in ([20], [3, 20], [1, 2, 11, 20]):
        with SharedBlocks(model) as blocks, torch.no_grad():
            view = []
            for start, stop in zip([0, *cuts], cuts, strict=False):
                view.append(Block())
                blocks.read_long(view, IDS[start:stop])
            view.append(Block())
            got = torch.cat([blocks.read([(view, [token])]) for token in IDS[20:24]])
        assert_close(got, want, LIMIT)
        assert is_far(got.roll(1, 0), want, LIMIT)


def test_a_block_that_moves_changes_nothing_for_who_saw_it_there(model):
    with SharedBlocks(model) as blocks, torch.no_grad():

        def last(move):
            prompt, step, own = Block(), Block(), Block()
            blocks.read([([prompt], IDS[:8])])
            blocks.read([([prompt, step], IDS[8:13])])
            if move:
                blocks.move(step, prompt)
                assert step.length == 0 and prompt.length == 13
            return blocks.read([([prompt, step, own], IDS[13:15])])

        assert_close(last(True), last(False), LIMIT)


def room(model, ids, spec, most=10, tokenizer=None, ends=frozenset(), seed=0):
    with manyheads.use(model):
        cache = new_cache(model, parse("full"))
        prefill(model, ids, cache)
        return write(parse(spec), Request(model, tokenizer, ids, most, ends, seed, cache))


def test_one_worker_is_ordinary_generation_and_workers_that_see_none_are_rows_of_a_batch():
    model, ids = tiny(), torch.tensor([[5, 7, 9, 11, 3, 8, 2]])
    plain = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)[0, 7:].tolist()
    one = room(model, ids, "hogwild:workers=1")
    assert one.tokens == plain and one.forwards == 10
    apart = room(model, ids, "hogwild:workers=3,told=false,others=false")
    assert apart.tokens == plain and apart.forwards == 10
    together = room(model, ids, "hogwild:workers=3,told=false")
    assert together.tokens != plain and together.forwards == 10
    assert room(model, ids, "hogwild:workers=1", ends=frozenset(plain[4:5])).tokens == plain[: plain.index(plain[4])]
    drawn = [room(model, ids, "hogwild:workers=2,told=false,temperature=2", seed=seed).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_prompts_are_written_on_one_after_the_other_and_not_at_once():
    model, prompts = tiny(), torch.tensor([[5, 7, 9, 11], [3, 8, 2, 6]])

    def fresh(ids):
        cache = new_cache(model, parse("full"))
        prefill(model, ids, cache)
        return cache

    strategy = parse("hogwild:told=false")
    alone = [room(model, ids[None], strategy.spec, 5).tokens for ids in prompts]
    with manyheads.use(model):
        found = write_each(strategy, Request(model, None, prompts, 5), 2, fresh)
        assert [[one.tokens for one in texts] for texts in found] == [[tokens] * 2 for tokens in alone]
        with pytest.raises(UserError, match="one prompt at a time"):
            write(strategy, Request(model, None, prompts, 5, cache=fresh(prompts)))
    assert alone[0] != alone[1]


def test_the_prompt_is_held_once_and_its_tensors_are_those_of_its_cache():
    model, ids = tiny(), torch.arange(2, 502)[None]
    with manyheads.use(model):
        cache = new_cache(model, parse("full"))
        prefill(model, ids, cache)
        head = SharedBlocks(model).of(cache, 400)
        for i, layer in enumerate(cache.layers):
            keys, values, first = head.held(i)
            assert first == 0 and keys.shape[2] == 400
            assert keys.untyped_storage().data_ptr() == layer.store.keys.untyped_storage().data_ptr()
            assert torch.equal(values, layer.store.values[:, :, :400])
        stored = sum(
            x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.store.keys, layer.store.values)
        )
        request = Request(model, None, ids, 4, cache=cache)
        held = {n: write(parse(f"hogwild:workers={n},told=false"), request).held for n in (1, 8)}
    token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    assert stored >= 499 * token
    assert held[1] == stored + 16 * token and held[8] == stored + 8 * 16 * token


STEP = "Some of it is done. \n\n"


def scripted(monkeypatch, lines, reader):
    """Workers that write what they are told to, token by token, and then go on with a word."""
    queues = [reader.encode(text, add_special_tokens=False) for text in lines]
    word = reader.encode(" river", add_special_tokens=False)[0]
    monkeypatch.setattr(hogwild._Room, "_chosen", lambda room, logits: [q.pop(0) if q else word for q in queues])
    kept = []
    wrap = hogwild._Room.__init__
    monkeypatch.setattr(hogwild._Room, "__init__", lambda room, *given: (wrap(room, *given), kept.append(room))[0])
    return kept


@pytest.fixture(scope="module")
def talking():
    reader = chat.tokenizer()
    text = "<user>\nWhat is 3 + 4?</user>\n<assistant>\n"
    return tiny(), reader, torch.tensor([reader.encode(text, add_special_tokens=False)])


@pytest.mark.parametrize("layout", ["contiguous", "interleaved", "combined"])
def test_what_workers_see_in_each_layout(talking, monkeypatch, layout):
    model, reader, ids = talking
    kept = scripted(monkeypatch, [STEP, "Now", "Now"], reader)
    made = room(model, ids, f"hogwild:workers=3,layout={layout},finish=2,remind=30", 40, reader)
    (there,) = kept
    alice, bob, carol = there.workers
    wrote = made.notes["texts"]
    assert wrote["Alice"].startswith(STEP) and "**Alice [2]:** Quick check" in wrote["Alice"] and alice.number == 2
    assert wrote["Bob"].startswith("Now river") and "[2]" not in wrote["Bob"] and len(made.tokens) == 2
    blocks = [block for block in there.view(bob) if block.length]
    titles = [there.titles[0], there.titles[1]]
    if layout == "contiguous":
        assert blocks == [there.head, there.common, alice.block, carol.block, bob.block] and not there.past
    elif layout == "interleaved":
        assert blocks == [there.head, there.common, bob.block]
    else:
        assert blocks == [there.head, there.common, titles[0], alice.block, carol.block, titles[1], bob.block]
    if layout != "contiguous":
        assert reader.decode(there.past) == "**Alice [1]:** I am Alice. We can divide the work like this: " + STEP
        assert there.common.length == len(there.rules) + len(there.past) - 1  # the last is read with what follows
        assert reader.decode(alice.step).startswith("**Alice [2]:** Quick check")
    assert made.held == there.blocks.nbytes(there.head, there.common, *titles, *(w.block for w in there.workers))


def test_rules_end_the_users_turn_and_are_told_to_nobody_alone(talking, monkeypatch):
    model, reader, ids = talking
    kept = scripted(monkeypatch, ["a", "b"], reader)
    room(model, ids, "hogwild:finish=2", 8, reader)
    whole = reader.decode([*ids[0, : kept[0].head.length].tolist(), *kept[0].rules])
    assert whole.startswith("<user>\nWhat is 3 + 4?\n\nSeveral assistants") and "Alice and Bob" in whole
    assert whole.endswith("\\boxed{answer}.</user>\n<assistant>\n### Past steps\n\n")
    room(model, ids, "hogwild:finish=2,told=false", 8, reader)
    assert kept[1].rules == [] and kept[1].head.length == ids.shape[1] - 1
    room(model, ids, "hogwild:finish=2", 8, chat.tokenizer(chat=False))
    whole = reader.decode([*ids[0, : kept[2].head.length].tolist(), *kept[2].rules])
    assert whole.startswith(reader.decode(ids[0]) + "\n\nSeveral assistants") and whole.endswith("### Past steps\n\n")


def test_a_boxed_answer_ends_it_and_a_majority_answers(talking, monkeypatch):
    model, reader, ids = talking
    scripted(monkeypatch, ["So it is \\boxed{7}. \n\n", "hm"], reader)
    made = room(model, ids, "hogwild:finish=2", 60, reader)
    assert reader.decode(made.tokens) == "7" and "answers" not in made.notes and made.notes["steps"] < 58
    scripted(monkeypatch, ["x", "So it is \\boxed{7} and", "y"], reader)
    unended = room(model, ids, "hogwild:workers=3,finish=2,answer=vote", 30, reader)
    assert unended.notes["steps"] == 28 and len(unended.notes["answers"]) == 3 and len(unended.tokens) == 2
    answers = iter([[1], [2], [2]])
    monkeypatch.setattr(hogwild, "_continued", lambda *_: list(answers))
    voted = room(model, ids, "hogwild:workers=3,finish=2,answer=vote", 30, reader)
    assert voted.tokens == [2]


def test_told_workers_do_not_end_and_others_do(talking):
    model, reader, ids = talking
    sharp = {reader.encode(text)[0] for text in ("#", "##", "###")}
    every = frozenset(range(1500)) - {7} - sharp
    told = room(model, ids, "hogwild:finish=2", 8, reader, ends=every)
    assert told.notes["steps"] == 6 and set(told.notes["texts"].values()) == {reader.decode([7] * 6)}  # and no headings
    assert room(model, ids, "hogwild:finish=2,told=false", 8, reader, ends=every).notes["steps"] == 1


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
REFUSED = {
    "no rotary positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0)
    ),
    "by the length": lambda: LlamaForCausalLM(LlamaConfig(**DYNAMIC, **SIZES)),
    "no plain rotary": lambda: SmolLM3ForCausalLM(SmolLM3Config(**{**SIZES, "num_hidden_layers": 4})),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_models_whose_positions_cannot_be_turned_are_refused(why):
    with pytest.raises(UserError, match=why):
        room(REFUSED[why]().eval(), torch.tensor([[5, 7, 9, 11, 3]]), "hogwild:told=false")


def test_what_cannot_hold_is_refused_in_a_line(talking):
    model, reader, ids = talking
    how = {"max_new_tokens": 24, "chat": True}
    with pytest.raises(UserError, match="keydiff drops or packs"):
        manyheads.reply(model, reader, "Who was it", "hogwild + keydiff:budget=0.5", **how)
    with pytest.raises(UserError, match="put together from blocks: leave it away"), manyheads.use(model, "dhsa"):
        SharedBlocks(model)
    with pytest.raises(UserError, match="give a tokenizer"):
        room(model, ids, "hogwild")
    with pytest.raises(UserError, match="positions, and the model has 2048: write less"):
        room(model, ids, "hogwild", 1000, reader)
    assert [len(room(model, ids, "hogwild:temperature=1", n, reader).tokens) for n in (1, 2, 6)] == [1, 1, 3]
    for wrong in ("workers=0", "workers=9", "temperature=-1", "finish=0", "layout=none", "answer=none"):
        with pytest.raises(UserError):
            parse(f"hogwild:{wrong}")
    assert manyheads.reply(model, reader, "Who was it", "hogwild", **how)


def test_generate_shows_what_every_worker_wrote(talking):
    from rich.console import Console

    model, reader, _ = talking
    spec = "hogwild:workers=3,finish=2,told=false,temperature=1"
    found = texts.run(
        model, reader, [Arm("full"), Arm(spec, spec)], ["Who was it"], max_new_tokens=9, chat=None,
        progress=lambda *_: None,
    )  # fmt: skip
    more = {"command": "", "model": "tiny", "chat": True, "out": ""}
    facts = {**texts.facts(found, model), **more}
    full, ours = facts["prompts"][0]["replies"]
    assert full["notes"] == {} and list(ours["notes"]["texts"]) == ["Alice", "Bob", "Carol"]
    assert ours["end_bytes"] != full["end_bytes"] and ours["forwards"] > 7
    console = Console(record=True, width=200, file=io.StringIO())
    generate_texts.print_facts(facts, console)
    page = render(generate_texts.page(facts))
    said = console.export_text()
    for name, text in ours["notes"]["texts"].items():
        assert f"{name}: {text.strip()[:12]}" in said and name in page and html.escape(text.split()[0]) in page
    assert "steps 7" in said and "steps 7" in page and said.count("Alice") == 1
