# SPDX-License-Identifier: Apache-2.0
"""What the model's mask says of columns that are cached already counts, whatever the storage; nothing of it is lost."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import manyheads
from manyheads import UserError
from manyheads.integrations import masks
from manyheads.integrations.cache import Past
from manyheads.integrations.transformers import new_cache
from oracles import models
from tolerance import SAME, error

WHOLE = ["full", "snapkv:budget=1.0,window_size=4", "adakv:budget=1.0", "mla_hw"]
PROMPT, MORE = 21, 3


def told(hidden=(), batch=1, width=PROMPT + MORE):
    mask = torch.ones(batch, width, dtype=torch.long)
    for columns in hidden:
        mask[:, columns] = 0
    return mask


def ruled(kind):
    """A mask ``[1, 1, T, S]`` of the user's own over all columns: blocks that do not see one another."""
    at = torch.arange(PROMPT + MORE)
    allowed = (at[-MORE:, None] >= at) & ((at[-MORE:, None] // 8 == at // 8) | (at < 3))
    if kind == "bool":
        return allowed[None, None]
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


LATER = {
    "late ones": lambda: told([slice(15, 18)]),
    "hidden": lambda: told([slice(4, 9)]),
    "padding told late": lambda: told([slice(0, 3), slice(10, 12)]),
    "too short": lambda: told(width=PROMPT + 1),
    "own, bool": lambda: ruled("bool"),
    "own, float": lambda: ruled("float"),
    "none": lambda: None,
}


def logits(model, later, first=None, cache=None, size=MORE):
    """Of the last tokens, after a prompt read under the mask ``first``."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    ids, more = models.tokens(1, PROMPT), models.tokens(1, MORE, seed=1)
    with torch.no_grad():
        model(ids, past_key_values=cache, attention_mask=first)
        made = []
        for at in range(0, MORE, size):
            mask = later if later is None else later[..., : PROMPT + at + size] if later.ndim == 2 else later
            mask = mask if mask is None or mask.ndim == 2 else mask[:, :, at : at + size, : PROMPT + at + size]
            made.append(model(more[:, at : at + size], past_key_values=cache, attention_mask=mask).logits)
    return torch.cat(made, 1)


@pytest.mark.parametrize("size", [MORE, 1], ids=["together", "one by one"])
@pytest.mark.parametrize(
    ("name", "later"),  # transformers itself takes no mask of one width for the layers of two of gemma3_text
    [
        (n, k)
        for n in ("llama", "gemma3_text", "gpt2", "deepseek_v3")
        for k in LATER
        if n != "gemma3_text" or "own" not in k
    ],
)
def test_a_whole_cache_obeys_a_later_mask(name, later, size):
    model = models.tiny(name)
    plain = logits(model, LATER[later](), size=size)
    for spec in WHOLE if name == "deepseek_v3" else WHOLE[:3]:
        if name == "deepseek_v3" and spec.startswith("adakv"):
            continue
        with manyheads.use(model, spec):
            assert error(logits(model, LATER[later](), size=size), plain) <= SAME, spec


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", WHOLE[:3])
def test_a_later_mask_may_show_what_an_earlier_one_hid(spec, attn):
    """The prompt said that its first tokens are padding, and the next forward says that they are not, or nothing."""
    model = models.build("llama", attn=attn)
    first = told([slice(0, 5)], width=PROMPT)
    for later in (told(), None, told([slice(0, 2)])):
        plain = logits(model, later, first)
        with manyheads.use(model, spec):
            assert error(logits(model, later, first), plain) <= SAME


@pytest.mark.parametrize("later", ["late ones", "padding told late", "own, bool"])
@pytest.mark.parametrize("size", [MORE, 1])
def test_it_counts_on_the_slots_that_are_left(later, size):
    """Sinks and recent tokens are kept: as the model with a mask that also hides what was dropped."""
    model, spec = models.tiny("llama"), "streaming_llm:budget=12,sinks=4,schedule=prefill"
    mask = LATER[later]()
    whole = mask.bool() if mask.ndim == 4 else mask[:, None, None].bool().expand(-1, -1, MORE, -1)
    at = torch.arange(PROMPT + MORE)
    whole = whole & (at <= at[-MORE:, None]) & ~((at >= 4) & (at < PROMPT - 8))
    with manyheads.use(model, spec):
        ours = logits(model, mask, size=size)
    assert error(ours, logits(model, whole, size=size)) <= SAME
    with manyheads.use(model, spec):
        assert error(logits(model, None, size=size), ours) > 100 * SAME


@pytest.mark.parametrize(
    "spec", ["fireq:bits=fp8,window_tokens=4", "adakv:budget=0.5", "fireq:window_tokens=4", "hashevict:budget=16"]
)
def test_it_counts_in_packed_and_fixed_storage(spec):
    """What no token may see changes nothing: other keys in the hidden columns, the same output."""
    model = models.tiny("llama")
    with manyheads.use(model, spec):
        hidden, seen = (logits(model, told(cut), size=1) for cut in ([slice(0, PROMPT)], []))
    alone = DynamicCache(config=model.config)
    more, places = models.tokens(1, MORE, seed=1), torch.arange(PROMPT, PROMPT + MORE)[None]
    with torch.no_grad():
        plain = model(more, past_key_values=alone, position_ids=places).logits
    assert error(hidden, plain) <= SAME and error(seen, plain) > 100 * SAME


def test_chunked_attention():
    """Layers whose tokens see their own chunk only (Llama 4), also while decoding beyond one."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, attention_chunk_size=8, no_rope_layers=[1, 0], moe_layers=[],
        num_local_experts=2, initializer_range=0.3, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = Llama4ForCausalLM(config).eval()
    for size in (MORE, 1):
        plain = logits(model, None, size=size)
        for spec in WHOLE[:2]:
            with manyheads.use(model, spec):
                assert error(logits(model, None, size=size), plain) <= SAME
    ids = models.tokens(1, 12)
    plain = model.generate(ids, max_new_tokens=14, do_sample=False)
    with manyheads.use(model, "full"):
        made = model.generate(ids, max_new_tokens=14, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(made.sequences, plain)
    assert made.past_key_values.layers[0].store.keys.shape[2] == 7  # a chunk less one, as in the model's own cache


def test_a_mask_function_of_the_users_own():
    """It is asked for all columns, though the stores would do without the cached ones."""

    def sparse(**given):
        rule = given.pop("mask_function")
        return sdpa_mask(**given, mask_function=lambda b, h, q, k: rule(b, h, q, k) & ((q - k) % 3 != 1))

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def function(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("sparse_for_a_test", function)
    AttentionMaskInterface.register("sparse_for_a_test", sparse)
    try:
        model = models.build("llama")
        dense = logits(model, told([slice(2, 3)]))
        model.set_attn_implementation("sparse_for_a_test")
        plain = logits(model, told([slice(2, 3)]))
        assert error(plain, dense) > 100 * SAME
        for spec in WHOLE[:3]:
            with manyheads.use(model, spec):
                assert error(logits(model, told([slice(2, 3)])), plain) <= SAME
    finally:
        for table in (AttentionInterface, AttentionMaskInterface):
            for name in [name for name in table._global_mapping if name.endswith("sparse_for_a_test")]:
                del table._global_mapping[name]


def test_a_cache_of_fixed_size_refuses():
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"), room=8)
        with pytest.raises(UserError, match="has a fixed size and cannot mask tokens that it holds"):
            logits(model, told([slice(4, 9)]), cache=cache, size=1)
        cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"), room=8)
        logits(model, told(), cache=cache, size=1)


def test_ordinary_decoding_builds_no_mask_over_the_past(monkeypatch):
    """No mask over cached columns, and one look at ``attention_mask`` a forward, as transformers takes itself."""
    model, looks, shapes = models.tiny("llama"), [], []
    whole = masks._full
    monkeypatch.setattr(masks, "_full", lambda x: looks.append(x.shape) or whole(x))
    build = masks.sdpa_mask
    monkeypatch.setattr(masks, "sdpa_mask", lambda **given: shapes.append(given["kv_length"]) or build(**given))
    with manyheads.use(model, "snapkv:budget=0.5,window_size=4"):
        logits(model, told(), told(width=PROMPT), size=1)
    assert shapes == [PROMPT, 1, 1, 1] and len(looks) == 3
    looks.clear()
    with manyheads.use(model, "snapkv:budget=0.5,window_size=4"):
        logits(model, None)
    assert not looks


@pytest.mark.parametrize("later", ["hidden", "padding told late"])
def test_control_of_the_past(monkeypatch, later):
    """Were stores to go by what they know already, later masks over the past would be lost."""
    monkeypatch.setattr(masks, "_agrees", lambda *_: True)
    model = models.tiny("llama")
    plain = logits(model, LATER[later]())
    with manyheads.use(model, "full"):
        assert error(logits(model, LATER[later]()), plain) > 100 * SAME


def asked(told, past=10, length=3, real=None, ours=True, **given):
    """What the mask function is asked for, where ``past`` columns are cached of which the store knows ``real``."""
    store = SimpleNamespace(real=real)
    rule = {"q_length": length, "kv_length": length, "kv_offset": Past.of(store, past), "attention_mask": told}
    rule |= {"mask_function": masks.causal_mask_function if ours else sdpa_mask, **given}
    return masks._mask(lambda **found: found, True, rule)


@pytest.mark.parametrize("hidden", range(13))
def test_one_hidden_column_of_all_is_told(hidden):
    """Whether it is cached or among the new ones, near the border or at an end."""
    told = torch.ones(1, 13, dtype=torch.long)
    assert asked(told)["attention_mask"] is None and asked(told)["kv_length"] == 3
    told[:, hidden] = 0
    found = asked(told)
    assert found["attention_mask"] is told
    if hidden < 10:
        assert (found["kv_length"], found["kv_offset"], found["allow_is_causal_skip"]) == (13, 0, False)
    else:  # the store says the same of the cached ones
        assert found["kv_length"] == 3 and "allow_is_causal_skip" not in found
    known = asked(told, real=told[:, :10].bool())
    assert known["attention_mask"] is told and known["kv_length"] == 3


def test_what_is_told_has_to_cover_all_columns():
    """A column short, it is kept and all columns are asked for; further columns of a fixed size say nothing."""
    short, long = torch.ones(1, 12, dtype=torch.long), torch.ones(1, 15, dtype=torch.long)
    found = asked(short)
    assert found["attention_mask"] is short and (found["kv_length"], found["kv_offset"]) == (13, 0)
    long[:, 13:] = 0
    assert asked(long)["attention_mask"] is None
    own = asked(long, ours=False)
    assert own["attention_mask"] is long and (own["kv_length"], own["kv_offset"]) == (13, 0)
    assert "allow_is_causal_skip" not in own  # the past is as the store knows it
