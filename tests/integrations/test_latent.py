# SPDX-License-Identifier: Apache-2.0
"""Modules whose cache holds latents are recognised by their attributes, in every architecture that has them."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

from manyheads.attention import mla
from manyheads.integrations.latent import latent_of
from manyheads.integrations.transformers import find_sites
from oracles import models
from tolerance import CLOSE, FORMULA, assert_close, error

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_BASE = {
    "vocab_size": models.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "rope_parameters": _ROPE, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 16,
}  # fmt: skip
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense"] * 2,
    "num_local_experts": 4,
}
LATENT = {  # name: (what its config has of its own, layers with latents)
    "DeepseekV2": ({"first_k_dense_replace": 1}, [0, 1]),
    "DeepseekV3": ({"first_k_dense_replace": 1, "q_lora_rank": None}, [0, 1]),
    "AXK1": ({}, [0, 1]),
    "Glm4MoeLite": ({}, [0, 1]),
    "Youtu": ({}, [0, 1]),
    "MiniCPM3": ({}, [0, 1]),
    "Mistral4": ({"head_dim": 4, "rope_parameters": {**_ROPE, "llama_4_scaling_beta": 0.1,
                  "original_max_position_embeddings": 8}}, [0, 1]),
    "LongcatFlash": ({"num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16,
                      "zero_expert_num": 2, "moe_topk": 2, "head_dim": 4}, [0, 1, 2, 3]),
    "KimiLinear": ({**_HYBRID, "linear_head_dim": 8, "linear_num_heads": 4, "q_lora_rank": None}, [1]),
    "BailingHybrid": ({**_HYBRID, "head_dim": 8}, [1]),
}  # fmt: skip
SPARSE = ("DeepseekV32", "GlmMoeDsa")  # an indexer chooses among expanded keys: left alone
PRESENT = tuple(name for name in LATENT if hasattr(transformers, f"{name}Config"))


def build(name, **changes):
    """A tiny random model, the same every time."""
    own = LATENT[name][0] if name in LATENT else {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)


def test_the_table_is_for_these_versions():
    assert len(PRESENT) >= 9  # 5.17 has all but BailingHybrid


@pytest.mark.parametrize("name", PRESENT)
def test_sites_with_latents(name):
    sites = find_sites(build(name))
    assert [site.layer for site, _ in sites if site.latent] == LATENT[name][1]
    for site, module in sites:
        latent = site.latent
        assert latent.weight() is module.kv_b_proj.weight
        assert (latent.rank, latent.nope_dim, latent.rope_dim, latent.v_dim, latent.num_heads) == (16, 8, 4, 6, 4)


@pytest.mark.parametrize("name", PRESENT)
def test_the_weight_makes_the_modules_own_keys_and_values(name):
    """What is read declaratively expands latents as the module does, and no other order of rows would."""
    for site, module in find_sites(build(name).double()):
        latent = latent_of(module)
        held = torch.randn(2, 1, 5, 20).double()
        want_k, want_v = module.expand_kv(*held.split([16, 4], -1))
        dims = mla.Dims(latent.num_heads, latent.rank, latent.nope_dim, latent.rope_dim, latent.v_dim)
        up = latent.weight().unflatten(0, (latent.num_heads, -1))
        k, v = mla.keys_values(held, up, dims)
        assert_close(k, want_k, FORMULA)
        assert_close(v, want_v, FORMULA)
        assert error(mla.keys_values(held, up.flip(0), dims)[0], want_k) > 1e-2, site
        assert error(mla.keys_values(held, up.roll(1, 1), dims)[1], want_v) > 1e-2


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention_is_left_alone(name):
    sites = find_sites(build(name))
    assert len(sites) == 2 and all(site.latent is None for site, _ in sites)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "whisper"])
def test_ordinary_attention_has_none(name):
    assert all(site.latent is None for site, _ in find_sites(models.tiny(name)))


def _with(linear):
    module = find_sites(build("DeepseekV3"))[0][1]
    module.kv_b_proj = linear
    return module


def test_an_unusual_projection_is_not_taken():
    """A bias, another shape, what does not say its shape; but a layer of another class says what it computes."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert latent_of(_with(nn.Linear(16, 56, bias=False)))
    assert latent_of(_with(nn.Linear(16, 56))) is None
    assert latent_of(_with(nn.Linear(16, 64, bias=False))) is None
    adapted = _with(Adapted(16, 56, bias=False))
    assert_close(latent_of(adapted).weight(), 2 * adapted.kv_b_proj.weight, CLOSE)
    assert latent_of(_with(nn.Sequential(nn.Linear(16, 56, bias=False)))) is None
    module = find_sites(build("DeepseekV3"))[0][1]
    del module.v_head_dim
    assert latent_of(module) is None and latent_of(nn.Linear(2, 2)) is None


def test_the_weight_is_current_and_the_module_is_not_kept():
    module = find_sites(build("DeepseekV3"))[0][1]
    latent, gone = copy.deepcopy(latent_of(module)), weakref.ref(module)
    module.kv_b_proj.weight = nn.Parameter(torch.zeros(56, 16))
    assert not bool(latent.weight().any())
    del module
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="model of kv_b_proj is gone"):
        latent.weight()
