# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of real architectures, with weights large enough that attention matters, and inputs for them."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, WINDOW = 64, 8
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ALTERNATING = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama ForCausalLM", {}),
    "qwen2": ("Qwen2 ForCausalLM", {}),
    "qwen3": ("Qwen3 ForCausalLM", {}),
    "phi3": ("Phi3 ForCausalLM", {}),
    "olmo2": ("Olmo2 ForCausalLM", {}),
    "mistral": ("Mistral ForCausalLM", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2 ForCausalLM",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3_text": (
        "Gemma3 ForCausalLM",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "gpt_oss": (
        "GptOss ForCausalLM",
        {
            "sliding_window": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": _ROPE,
            "layer_types": _ALTERNATING,
        },
    ),
    "llama4": (
        "Llama4 ForCausalLM",
        {
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 48,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3 ForCausalLM",
        {
            "head_dim": None,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "rope_parameters": _ROPE,
        },
    ),
    "gpt2": (
        "GPT2 LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.3,
            "eos_token_id": None,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
    ),
    "bert": (
        "Bert ForMaskedLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "pad_token_id": 0,
        },
    ),
    "t5": (
        "T5 ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": None,
            "decoder_start_token_id": 1,
        },
    ),
    "bart": ("Bart ForConditionalGeneration", {"max_position_embeddings": 256, "forced_eos_token_id": None}),
    "whisper": (
        "Whisper ForConditionalGeneration",
        {
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
ROTARY = (
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "olmo2",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "llama4",
    "deepseek_v3",
)
DECODERS = (*ROTARY, "gpt2")
SEQ2SEQ = ("t5", "bart", "whisper")
ALL = tuple(CONFIGS)
_built: dict[tuple[str, torch.dtype], nn.Module] = {}


def config(name: str, **changes: Any) -> Any:
    family, own = CONFIGS[name]
    base = _DECODER if name in ROTARY else _SEQ2SEQ if name in ("bart", "whisper") else {}
    prefix = {"gemma3_text": "Gemma3Text", "llama4": "Llama4Text"}.get(name, family.split()[0])
    return getattr(transformers, f"{prefix}Config")(**{**base, **own, **changes})


def build(name: str, *, attn: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A fresh model, the same weights every time.

    float64 is for tests that hold two numerically different paths against each other where something is chosen on the
    way, a token or a slot to drop: the logits of random models nearly tie, and the rounding of float32 differs from one
    processor to another.
    """
    cls = getattr(transformers, CONFIGS[name][0].replace(" ", ""))
    settings = config(name, **changes)
    if attn is not None:
        settings._attn_implementation = attn
    if dtype == torch.float64:
        settings._experts_implementation = "eager"  # the grouped product takes no float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(settings).eval()
        if name == "gpt_oss":  # its own initialisation leaves the sinks at zero
            for layer in model.model.layers:
                layer.self_attn.sinks.data.normal_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.to(dtype)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of this name that the whole session shares: never change it."""
    if (name, dtype) not in _built:
        _built[name, dtype] = build(name, dtype=dtype)
    return _built[name, dtype]


def built() -> dict[tuple[str, torch.dtype], nn.Module]:
    return dict(_built)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, batch: int = 2, length: int = 19, seed: int = 0) -> dict[str, Tensor]:
    """What ``generate`` takes. 19 tokens pass every sliding window, and left padding is there in the second row."""
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(seed))}
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:, :5] = 0
    return {"input_ids": tokens(batch, length, seed=seed), "attention_mask": mask}


def forward(name: str, model: Any, **extra: Any) -> Tensor:
    """Logits of one plain forward."""
    given = inputs(name)
    if name in SEQ2SEQ:
        given["decoder_input_ids"] = tokens(2, 11, seed=1)
    with torch.no_grad():
        logits: Tensor = model(**given, **extra).logits
    return logits
