# SPDX-License-Identifier: Apache-2.0
"""Arms: how they are written, and that a shared prefill gives what a strategy gives by itself."""

from dataclasses import dataclass

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.compare.arms import Arm, Prefix, forward_chunked, make_arms
from manyheads.integrations.transformers import new_cache
from manyheads.spec import parse, split_list
from manyheads.strategy import AttentionEdit


@dataclass(frozen=True, kw_only=True)
class Sharper(AttentionEdit):
    """Stands for the strategies that keep no cache."""

    factor: float = 1.5

    def edit(self, call):
        return call.replace(scale=call.scale * self.factor)


def test_specs_are_split_at_the_commas_between_them():
    text = "full, snapkv:window_size=16,kernel_size=5,random,keydiff:budget=0.3,streaming_llm:sinks=2"
    assert split_list(text) == [
        "full", "snapkv:window_size=16,kernel_size=5", "random", "keydiff:budget=0.3", "streaming_llm:sinks=2",
    ]  # fmt: skip
    assert split_list("snapkv,window_size=16") == ["snapkv:window_size=16"] and split_list(" , ") == []


def test_arms_are_specs_times_budgets_once():
    arms = make_arms(["snapkv", "full", "random:budget=64", "snapkv"], [0.5, "0.25", 100], 512)
    assert [a.key for a in arms] == ["full", *(f"snapkv:budget={b}" for b in (0.5, 0.25, 100)), "random:budget=64"]
    assert [a.key for a in make_arms([parse("hashevict:num_bits=8,budget=0.3")], [0.5], 512)][1:] == [
        "hashevict:num_bits=8,budget=0.3"
    ]
    assert all(parse(arm.key) == arm.strategy for arm in arms)


@pytest.mark.parametrize(
    ("specs", "budgets", "word"),
    [
        (["snapvk"], [0.5], "snapkv"), (["snapkv:windwo_size=3"], [0.5], "window_size"), (["random"], [0], "above 0"),
        (["random"], [-0.5], "above 0"), (["random"], [1.5], "at most 1.0"), (["random"], ["much"], "not 'much'"),
        (["snapkv"], [8], "protected"), (["snapkv"], [0.01], "protected"), (["hashevict:budget=3"], [0.5], "protected"),
        (["random"], ["nan"], "above 0"), (["random"], [], "--budgets"),
    ],
)  # fmt: skip
def test_bad_arms_are_refused(specs, budgets, word):
    with pytest.raises(UserError, match=word) as error:
        make_arms(specs, budgets, 512)
    assert "\n" not in str(error.value)


def ids(rows, length):
    return torch.randint(1, 1500, (rows, length), generator=torch.Generator().manual_seed(length))


SPECS = [
    "full",
    "random",
    "streaming_llm",
    "snapkv",
    "keydiff",
    "hashevict",
    "hashevict:probe=key",
    "random:schedule=7",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("prefilled", [1, 2])
def test_shared_prefill_equals_a_run_of_its_own(model, spec, prefilled):
    """Also when the shared prefill came in two forwards; token by token is what decoding does."""
    arm = make_arms([spec], [0.3], 160)[-1]
    context, following = ids(2, 160), ids(2, 24)
    with torch.inference_mode():
        with manyheads.use(model):
            prefix = Prefix(model, context[:, : 160 // prefilled], [arm])
            if prefilled == 2:
                prefix.extend(context[:, 80:])
            with prefix.open(arm) as cache:
                held = cache.bytes()
                shared = forward_chunked(model, cache, following, 24, 1)
        with manyheads.use(model, arm.strategy):
            own = new_cache(model, arm.strategy)
            model(context, past_key_values=own)
            assert own.bytes() == held if prefilled == 1 else abs(own.bytes() - held) <= 2 * 2 * 160  # validity bits
            alone = torch.cat([model(following[:, i : i + 1], past_key_values=own).logits for i in range(24)], 1)
    torch.testing.assert_close(shared, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in ("streaming_llm",)])
def test_chunks_equal_single_tokens(model, spec):
    arm = make_arms([spec], [0.3], 160)[-1]
    with torch.inference_mode(), manyheads.use(model):
        prefix = Prefix(model, ids(2, 160), [arm])
        outs = []
        for chunk_size in (1, arm.chunk_size(48)):
            with prefix.open(arm) as cache:
                outs.append(forward_chunked(model, cache, ids(2, 30), 20, chunk_size))
    torch.testing.assert_close(*outs, atol=2e-5, rtol=1e-4)


def test_chunk_size_bounds_what_a_query_sees_beyond_the_budget():
    arm = Arm(parse("streaming_llm"), "streaming_llm")
    assert [arm.chunk_size(n) for n in (20, 100, 1024)] == [1, 3, 21]
    assert Arm(parse("random:schedule=9"), "").chunk_size(100) == 9 and Arm(parse("snapkv"), "").chunk_size(100) is None


def test_full_is_the_plain_model(model):
    arm = make_arms([], [0.5], 160)[0]
    context, following = ids(2, 160), ids(2, 24)
    with torch.inference_mode():
        plain = model(torch.cat([context, following], 1)).logits[:, 160:]
        with manyheads.use(model):
            prefix = Prefix(model, context, [arm])
            with prefix.open(arm) as cache:
                torch.testing.assert_close(forward_chunked(model, cache, following, 24), plain, atol=2e-5, rtol=1e-4)


def test_a_strategy_without_a_cache_of_its_own(model):
    """It reads the context by itself, under its own port, and everything else goes on alike."""
    arms = make_arms([Sharper(factor=2.0)], [0.5], 160)
    assert not arms[1].forks and not arms[1].stores and arms[1].budget == 1.0
    context, following = ids(2, 160), ids(2, 24)
    with torch.inference_mode():
        with manyheads.use(model, Sharper(factor=2.0)):
            plain = model(torch.cat([context, following], 1)).logits[:, 160:]
        with manyheads.use(model), Prefix(model, context, arms).open(arms[1]) as cache:
            got = forward_chunked(model, cache, following, 24)
    torch.testing.assert_close(got, plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "said"), [("active_dormant", "manyheads inspect"), ("pab", "denoisers"), ("coca", "token mixer.*--train")]
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(spec, said):
    with pytest.raises(UserError, match=said):
        make_arms([spec], [0.5], 512)
    assert len(make_arms(["minimax_hybrid"], [0.5], 512)) == 2  # a mixer that also acts on models
