# SPDX-License-Identifier: Apache-2.0
"""A comparison runs over every architecture, and what keeps everything gives what the plain model gives."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from manyheads import UserError
from manyheads.caches._store import PolicyStore
from manyheads.comparison import STRATEGIES, TASKS, compare
from manyheads.integrations import cache as port_cache
from manyheads.models import default_path, load_default
from manyheads.tasks.text import _text_task, perplexity, speed
from manyheads.tasks.text._contexts import Contexts
from manyheads.tasks.text._corpus import Corpus
from oracles import models
from tiny import compare as tiny

texts = tiny.texts

TARGET = 8
LENGTHS = (448,)  # windows of 8 have rolled, and the least that the task of several lines takes
KEEPS_ALL = "keydiff:budget=1.0"
HYBRID = {
    "qwen3_next": (
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "num_experts": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts_per_tok": 1,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "cohere2": ("Cohere2", {"sliding_window": models.WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip
FORGETFUL = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
MINIMAX = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.fixture(scope="module")
def shipped():
    return transformers.AutoTokenizer.from_pretrained(default_path())


def other(family, own, size):
    changes = {"vocab_size": size, "max_position_embeddings": 1024}
    settings = getattr(transformers, f"{family}Config")(**{**models._DECODER, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(settings).eval()


def build(name, size):
    if name in HYBRID:
        return other(*HYBRID[name], size)
    return models.build(name, vocab_size=size, **{"n_positions" if name == "gpt2" else "max_position_embeddings": 1024})


def run(model, tokenizer, texts, out, chosen=TASKS["causal_lm"], strategies=STRATEGIES):
    return compare(
        model, tokenizer, texts, [*strategies, KEEPS_ALL], tasks=chosen, lengths=LENGTHS, samples=1, rounds=1, out=out
    ).rows


def plain(model, tokenizer, texts):
    """Nats by task, metric, length and question, of forwards without cache and without port."""
    drawn, found = Contexts(Corpus(texts, tokenizer), tokenizer, 1, 0), {}

    def nats(context, question, answer):
        ids = torch.from_numpy(np.concatenate([context, question, answer]).astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, -len(answer) - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits[0], ids[0, -len(answer) :]).item()

    ids = drawn.plain("loss", LENGTHS[-1], 1, TARGET + 1)[0][0]
    for length in LENGTHS:
        found["token_nll", length, "0"] = nats(ids[: length + 1], [], ids[length + 1 : length + TARGET + 1])
        context = drawn.single(length)[0]
        for metric in ("query_agnostic", "query_aware"):
            asked = context.questions[0]
            found[metric, length, f"{length}-0"] = nats(context.ids, asked.question, asked.answer)
    crowd = drawn.multikey(LENGTHS[-1])[0]
    for i, asked in enumerate(crowd.questions):
        metric = {"niah_multikey": "multikey", "variable_tracking": "tracked"}[asked.task]
        found[metric, LENGTHS[-1], f"0.{i}"] = nats(crowd.ids, asked.question, asked.answer)
    return found


def is_plain(rows, want, arms=("full", KEEPS_ALL)):
    """The arms that keep everything give the figures ``want`` of the plain model."""
    for arm in arms:
        got = {
            (r.metric, r.at["length"], r.sample): r.about.get("nats", r.value)
            for r in rows
            if r.arm == arm and r.task not in ("speed", "memory")
        }
        assert got.keys() <= want.keys() and got
        assert got == pytest.approx({key: want[key] for key in got}, abs=2e-4)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch):
    monkeypatch.setitem(perplexity.Perplexity.__init__.__kwdefaults__, "target", TARGET)
    for name in ("_WARM", "_TIMED"):
        monkeypatch.setattr(speed, name, 1)


# Plain, sliding windows with sinks, latent attention, learned positions; those that are left differ less.
KINDS = ("llama", "gpt_oss", "deepseek_v3", "gpt2", *HYBRID)


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(n, marks=pytest.mark.slow) for n in models.DECODERS if n not in KINDS)]
)
def test_every_architecture(name, shipped, texts, tmp_path):
    model = build(name, len(shipped))
    rows, want = run(model, shipped, texts[:8], tmp_path), plain(model, shipped, texts[:8])
    is_plain(rows, want)
    assert {r.task for r in rows} == set(TASKS["causal_lm"])
    assert set(want) == {(r.metric, r.at["length"], r.sample) for r in rows if r.task not in ("speed", "memory")}
    held = {r.arm: r.value for r in rows if r.task == "memory" and r.at["length"] == LENGTHS[-1]}
    assert held["random:budget=0.1"] < held["full"] or name == "mistral"  # whose windows hold less than any budget
    with pytest.raises(AssertionError):  # control: what drops tokens is not the plain model
        is_plain(rows, want, ["random:budget=0.1"])


def shared(fork, store, target):
    """A fork that is the parent itself."""
    del fork, target
    return store


def lost(fork, store, target):
    """A fork that counts its tokens from the start of the window."""
    twin = fork(store, target)
    twin.tokens.padded.seen, twin.tokens.padded.index, twin.tokens.padded.valid = twin.tokens.padded.size, None, None
    return twin


@pytest.mark.parametrize("wrong", [shared, lost])
def test_control_of_windows(wrong, shipped, texts, tmp_path, monkeypatch):
    model, fork = build("mistral", len(shipped)), PolicyStore.fork
    monkeypatch.setattr(PolicyStore, "fork", lambda store, target=None: wrong(fork, store, target))
    with pytest.raises(UserError, match="keeps every token and yet predicts otherwise"):
        run(model, shipped, texts[:8], tmp_path, ("perplexity",), ())


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_control_of_states(name, shipped, texts, tmp_path, monkeypatch):
    model = build(name, len(shipped))
    monkeypatch.setattr(port_cache, "_copied", lambda layer: dict(vars(layer)))
    with pytest.raises(UserError, match="keeps every token and yet predicts otherwise"):
        run(model, shipped, texts[:8], tmp_path, ("perplexity",), ())


@pytest.mark.parametrize(
    ("family", "own", "said"),
    [("Jamba", FORGETFUL, "forgets its states"), ("MiniMax", MINIMAX, "does not take a cache of ours")],
)
def test_models_whose_figures_would_be_wrong_are_refused(family, own, said, shipped, texts, tmp_path):
    with pytest.raises(UserError, match=said):
        run(other(family, own, len(shipped)), shipped, texts[:8], tmp_path, ("perplexity",), ())


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_control_of_one_lost_token(dtype, shipped, texts, tmp_path, monkeypatch):
    """Also in 16 bits, where another path rounds by more than a token matters."""
    model = load_default(dtype=dtype)[0]
    run(model, shipped, texts[:8], tmp_path / "right", ("perplexity",), ())
    budget = _text_task._GUARD[0] - 1
    monkeypatch.setattr(_text_task, "_whole", lambda strategy: dataclasses.replace(strategy, budget=budget))
    with pytest.raises(UserError, match="keeps every token and yet predicts otherwise"):
        run(model, shipped, texts[:8], tmp_path / "wrong", ("perplexity",), ())
