# SPDX-License-Identifier: Apache-2.0
"""Layers that keep more than keys and values, or share them: strategies act on what attention there is."""

import copy
import functools
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers

import manyheads
from manyheads import UserError
from manyheads.integrations import sites
from manyheads.integrations.cache import SlotCache, cache_arguments
from manyheads.integrations.transformers import find_sites, new_cache, prefill
from oracles import models
from oracles.caches import step
from oracles.strategies import Sharpen, Watch
from tolerance import SAME, error

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0,
    "bos_token_id": 1, "max_position_embeddings": 256,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "mamba_d_ssm": 64,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
MOE = {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
MLA = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
TURNS = ["linear_attention", "full_attention"] * 2
SHARED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "num_kv_shared_layers": 2}
ZAMBA = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16, "attention_hidden_size": 64,
    "mamba_d_state": 8, "mamba_expand": 2,
}  # fmt: skip
HYBRIDS = {
    "Qwen3Next": {**DELTA, **MOE, "layer_types": TURNS},
    "Qwen3_5": {**DELTA, "layer_types": TURNS},
    "KimiLinear": {
        **MLA, "num_local_experts": 2, "num_experts_per_tok": 1, "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": TURNS, "mlp_layer_types": ["dense"] * 4,
    },
    "FalconH1": MAMBA,
    "Zamba2": {
        **ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "Zamba": {**ZAMBA, "n_mamba_heads": 2, "num_key_value_heads": 4},
    "Bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip
SHARING = {
    "Gemma3n": {
        **SHARED, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4, "head_dim": 32,
    },
    "Gemma4": SHARED,
}  # fmt: skip
WHOLE = ["full", "snapkv:budget=1.0,window_size=4"]
LENGTH = 20


@functools.cache
def built(name):
    cls = getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = cls.config_class(**{**BASE, **{**HYBRIDS, **SHARING}[name]})
        config._experts_implementation = "eager"
        return cls(config).eval()


def generated(model, ids, **more):
    return model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **more)


def size(cache):
    """Bytes of all that a cache of transformers holds."""
    fields = [x for layer in cache.layers for name, x in vars(layer).items() if name != "_sliding_window_tensor"]
    fields += [x for held in fields if isinstance(held, dict) for x in held.values()]
    return sum(x.nbytes for x in fields if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", [*HYBRIDS, *SHARING])
def test_a_whole_cache_changes_nothing(name):
    model = built(name)
    for ids, more in ((models.tokens(1, LENGTH), {}), (models.tokens(2, LENGTH), {"num_beams": 2})):
        plain = generated(model, ids, **more).sequences
        for spec in WHOLE:
            with manyheads.use(model, spec):
                assert torch.equal(generated(model, ids, **more).sequences, plain), spec


@pytest.mark.parametrize("name", [*HYBRIDS, *SHARING])
def test_all_bytes_are_counted(name):
    """After a prompt: of attention as of states, within 1 % of what the model's own cache holds."""
    model, ids = built(name), models.tokens(1, 40)
    with torch.no_grad():
        plain = model(ids, use_cache=True).past_key_values
        with manyheads.use(model):
            cache = new_cache(model, manyheads.parse("full"))
            model(ids, past_key_values=cache)
            assert cache.bytes() == pytest.approx(size(plain), rel=0.01)
            half = new_cache(model, manyheads.parse("streaming_llm:budget=12"))
            model(ids, past_key_values=half)
            assert half.bytes() < cache.bytes()


@pytest.mark.parametrize("name", [*HYBRIDS, *SHARING])
def test_copies_and_forks_are_independent(name):
    model, ids = built(name), models.tokens(1, LENGTH)
    with manyheads.use(model), torch.no_grad():
        cache = new_cache(model, manyheads.parse("full"), record=8)
        step(model, ids, cache)
        before = cache.bytes()
        twins = [cache.fork(manyheads.parse("keydiff:budget=0.5")), copy.deepcopy(cache)]
        for twin in twins:
            step(model, ids[:, :1], twin)
        assert cache.bytes() == before and twins[0].bytes() < twins[1].bytes()
        again = new_cache(model, manyheads.parse("full"))
        step(model, ids, again)
        assert error(step(model, ids[:, :1], cache), step(model, ids[:, :1], again)) <= SAME


def test_layers_that_share_their_weights():
    """Zamba's attention is told its layer in every call: each has a store of its own."""
    model, watch = built("Zamba2"), Watch()
    assert [site.layer for site, _ in find_sites(model)] == [1, 3]
    with manyheads.use(model, "snapkv:budget=0.5,window_size=4", watch) as port:
        cache = generated(model, models.tokens(1, LENGTH)).past_key_values
    assert [layer.store.keys.shape[2] for layer in cache.layers if hasattr(layer, "store")] == [15, 15]
    assert sum(state["calls"] for state in port.state(watch).values()) == 12


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize(
    "spec", ["streaming_llm:budget=12,sinks=4", "adakv:budget=0.5,base=snapkv(window_size=4)", "fireq:bits=fp8"]
)
def test_layers_that_reuse_keys_see_what_the_store_holds(name, spec):
    """Never a single new token, nor columns that are gone: the keys of a reusing layer are those of the storing one."""
    model, ids, sizes = built(name), models.tokens(1, LENGTH), {}

    class Sizes(Watch):
        def watch(self, call, out):
            sizes.setdefault(call.site.layer, []).append((call.k.shape[2], call.step))

    with manyheads.use(model, spec, Sizes()):
        generated(model, ids)
    assert sizes[2] == sizes[0] and sizes[3] == sizes[1] and all(count > 1 for count, _ in sizes[3])
    plain = generated(model, ids).sequences
    with manyheads.use(model, spec):
        made = generated(model, ids)
    assert [type(layer).__name__ for layer in made.past_key_values.layers[2:]] == ["DummyLayer"] * 2
    assert made.sequences.shape == plain.shape


@pytest.mark.parametrize("name", SHARING)
def test_edits_act_where_keys_are_reused(name):
    model, ids = built(name), models.tokens(1, LENGTH)
    with torch.no_grad():
        plain = model(ids).logits
        with manyheads.use(model, "full", Sharpen(layers=(2, 3))):
            assert error(model(ids).logits, plain) > 1e-3
    with pytest.raises(UserError, match=r"finds no attention to act on"):
        manyheads.use(model, "full:layers=2-3").__enter__()


@pytest.mark.parametrize("length", [1, 3])
def test_the_last_queries_alone(length):
    """Gemma 4 gives layers that reuse keys the last queries only where no more logits are asked for."""
    model, ids = built("Gemma4"), models.tokens(1, LENGTH)
    with torch.no_grad():
        plain = model(ids).logits[:, -length:]
        for spec in WHOLE:
            with manyheads.use(model, spec):
                assert error(model(ids, logits_to_keep=length).logits, plain) <= SAME
        with manyheads.use(model, Watch()):
            static = transformers.StaticCache(config=model.config, max_cache_len=32)
            got = model(ids, logits_to_keep=length, past_key_values=static).logits
    assert error(got, plain) <= SAME


def test_sparse_attention_is_refused_by_name():
    config = transformers.DeepseekV32Config(
        **{**BASE, **MLA}, q_lora_rank=16, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        n_shared_experts=1, moe_intermediate_size=16, index_n_heads=2, index_head_dim=8, index_topk=4,
    )  # fmt: skip
    with pytest.raises(UserError, match="DeepseekV32ForCausalLM chooses its keys by an indexer") as refusal:
        manyheads.use(transformers.DeepseekV32ForCausalLM(config), "full").__enter__()
    assert "\n" not in str(refusal.value)


def test_states_outside_the_cache_are_refused_by_name():
    config = transformers.RecurrentGemmaConfig(**BASE, lru_width=32, block_types=["recurrent", "attention"])
    model = transformers.RecurrentGemmaForCausalLM(config)
    with pytest.raises(
        UserError, match="full cannot keep the cache of RecurrentGemmaForCausalLM: that keeps states on"
    ):
        manyheads.use(model, "full").__enter__()


@pytest.mark.parametrize(
    "spec", [*WHOLE, "adakv:budget=0.5,base=snapkv(window_size=4)", "fireq:bits=fp8", "hashevict:budget=16"]
)
def test_several_answers_from_one_kept_prompt(spec):
    """The cache of one row serves every answer that is asked for, each as it would be alone."""
    model, ids = models.tiny("llama"), models.tokens(1, 24)
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse(spec))
        prefill(model, ids, cache)
        kept = copy.deepcopy(cache)
        made = model.generate(ids, past_key_values=cache, max_new_tokens=4, num_return_sequences=3, num_beams=3)
        assert made.shape == (3, 28) and cache.layers[0].store.rows == 3
        given = models.tokens(2, 24)
        given[:] = ids
        twice = step(model, given[:, :1], copy.deepcopy(kept))
        assert error(twice, step(model, ids[:, :1], copy.deepcopy(kept)).expand_as(twice)) <= SAME
        pair = new_cache(model, manyheads.parse(spec))
        step(model, given, pair)
        with pytest.raises(UserError, match="holds 2 rows and the model was called with 3: give it as many"):
            step(model, models.tokens(3, 1), pair)


@pytest.mark.parametrize("name", [*HYBRIDS, *SHARING])
def test_several_answers_from_one_kept_prompt_of_a_hybrid(name):
    """States are repeated with keys and values."""
    model, ids = built(name), models.tokens(1, LENGTH)
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"))
        prefill(model, ids, cache)
        one = model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=4, do_sample=False)
        several = model.generate(ids, past_key_values=cache, max_new_tokens=4, num_return_sequences=3, num_beams=3)
        assert several.shape == (3, LENGTH + 4) and cache.layers[1].store.rows == 3
        step_by_step = new_cache(model, manyheads.parse("keydiff:budget=0.5"))
        prefill(model, ids, step_by_step)
        logits = step(model, ids[:, -1:].repeat(3, 1), step_by_step)
        assert torch.equal(logits.argmax(-1).flatten(), one[:, LENGTH].repeat(3))


@pytest.mark.parametrize("by", ["name", "place"])
@pytest.mark.parametrize("name", ["Lfm2", "Qwen3Next"])
def test_a_kept_prompt_is_repeated_however_the_cache_is_given(name, by):
    """Its argument has another name in another transformers; by place the name is no matter."""
    model, ids = built(name), models.tokens(1, LENGTH)
    with manyheads.use(model), torch.no_grad():
        cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"))
        prefill(model, ids, cache)
        one, last = copy.deepcopy(cache), ids[:, -1:]
        want = model(last, **cache_arguments(model, one)).logits
        given = ((), cache_arguments(model, cache)) if by == "name" else ((None, None, cache), {})
        several = model(last.repeat(3, 1), *given[0], **given[1]).logits
    assert cache.layers[1].store.rows == 3 and one.layers[1].store.rows == 1
    assert error(several, want.repeat(3, 1, 1)) <= SAME


class Wrapper(torch.nn.Module):
    """A model around a model, which hands on whatever it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def test_the_name_of_the_cache_argument():
    model = built("Lfm2")
    (name, _), (also, yes) = cache_arguments(model, SlotCache()).items()
    assert name in inspect.signature(model.forward).parameters and (also, yes) == ("use_cache", True)
    assert [*cache_arguments(Wrapper(model), SlotCache())] == [name, also]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a name that transformers gives up
        model(models.tokens(1, 4), **cache_arguments(model, SlotCache(config=model.config)))


def test_only_what_can_be_cropped_says_so():
    """``generate`` asks before it crops what an assistant guessed, and on MPS before it runs ahead by a token."""
    with manyheads.use(model := built("FalconH1")):
        beside = new_cache(model, manyheads.parse("full")).layers[1]
    assert not beside.is_croppable  # it holds states too
    with manyheads.use(model := built("Lfm2")):
        layer = new_cache(model, manyheads.parse("full")).layers[1]
        assert layer.is_croppable
        for kind in ("cpu", "mps"):
            device = SimpleNamespace(type=kind)
            layer.store = SimpleNamespace(held=[None, SimpleNamespace(device=device)])
            assert layer.is_croppable == (kind == "cpu")


def test_a_module_that_serves_several_layers_is_refused():
    model = copy.deepcopy(built("Zamba2"))
    model.model.layers[3].shared_transformer = model.model.layers[1].shared_transformer
    several = "one module serves several layers, each with a cache of its own"
    with pytest.raises(UserError, match=several), manyheads.use(model, "full"):
        generated(model, models.tokens(1, LENGTH))


def test_keys_that_travel_between_devices_are_refused(monkeypatch):
    """What stands for them travels with the tensor, and a copy of that is another tensor."""
    model, hand_on = built("Gemma4"), sites.lend
    monkeypatch.setattr(sites, "lend", lambda k, call: hand_on(k.clone(), call))
    with pytest.raises(UserError, match="put the layers on one device"), manyheads.use(model, "full"):
        generated(model, models.tokens(1, LENGTH))


def test_control_of_shared_keys(monkeypatch):
    """Were the keys alone handed on, a reusing layer would see the new token and nothing else."""
    model, seen = built("Gemma4"), []
    monkeypatch.setattr(sites, "borrow", lambda k, call, lent: call)

    class Sizes(Watch):
        def watch(self, call, out):
            seen.append(call.k.shape[2])

    with manyheads.use(model, "adakv:budget=0.5,base=snapkv(window_size=4)", Sizes(layers=(3,))):
        generated(model, models.tokens(1, LENGTH))
    assert seen[1:] == [1] * 5


def test_control_of_bytes():
    """Were states left out, the sum would be too small."""
    model, ids = built("FalconH1"), models.tokens(1, 40)
    with manyheads.use(model, "full"), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    stores = sum(layer.store.nbytes() for layer in cache.layers)
    assert stores < 0.9 * SlotCache.bytes(cache)
