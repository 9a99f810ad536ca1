# SPDX-License-Identifier: Apache-2.0
"""Latent attention in the place of a decoder's attention: what a plan of surgery puts there, and its stock checkpoint.

The module has the attributes and the cache of DeepSeek's attention: a latent and one rotary key for each token, which
:mod:`.latent` knows, so that whatever decodes such models decodes these. Two things differ. Which rotary
frequency turns a channel is said for each module, and queries have the rotary channels of their own key/value head
alone; beside those of the others they are zero. As a checkpoint of DeepSeek-V3 the zeros are stored.

Legend: B rows, T tokens, D width, H query heads and G key/value heads of d channels, of which r are rotary, R latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb, eager_attention_forward

__all__ = ["LatentAttention", "as_deepseek"]

_STATIC = ("default", "linear", "llama3")  # rotary tables that are the same at every length
_LARGE = 2**14  # of a constant channel: what a norm divides by then depends on the others by 2^-28 and less


class LatentAttention(nn.Module):
    """Keys and values of all heads are linear in R latents; r channels of a head turn, as the lists of pairs say.

    Args:
        width: D.
        heads: H.
        head_dim: d.
        rank: R.
        pairs: for each key/value head the rotary pairs that it keeps, numbers of the model's frequencies.
        bias: of queries and latents.
        out_bias: of the output projection.
    """

    config: Any = None  # of the model, given by whoever puts the module there, as is the number of the layer
    layer_idx: int = 0
    pairs: Tensor
    own: Tensor

    def __init__(
        self, width: int, heads: int, head_dim: int, rank: int, pairs: Sequence[Sequence[int]], bias: bool = False,
        out_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        groups, turned = len(pairs), 2 * len(pairs[0])
        self.num_heads = self.num_key_value_heads = heads
        self.kv_lora_rank, self.qk_rope_head_dim = rank, groups * turned
        self.qk_nope_head_dim, self.v_head_dim, self.own_rope_dim = head_dim - turned, head_dim, turned
        self.num_key_value_groups, self.is_causal, self.scaling = 1, True, head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(width, rank + groups * turned, bias=bias)
        self.kv_b_proj = nn.Linear(rank, heads * (self.qk_nope_head_dim + head_dim), bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=out_bias)
        self.register_buffer("pairs", torch.tensor(pairs, dtype=torch.long).flatten(), persistent=False)
        own = torch.arange(heads)[:, None] * groups // heads == torch.arange(groups)
        self.register_buffer("own", own, persistent=False)

    def placed(self, rope: Tensor) -> Tensor:
        """Rotary channels of queries ``[..., H, r, n]`` among those of all key/value heads, ``[..., H, G r, n]``."""
        halves: Tensor = rope.unflatten(-2, (2, 1, -1)) * self.own[:, None, :, None, None].to(rope.dtype)
        return halves.flatten(-4, -2)

    def expand_kv(self, latents: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, of latents ``[B, 1, S, R]`` and rotary keys ``[B, 1, S, G r]``."""
        both = self.kv_b_proj(latents[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, v = both.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        return torch.cat([nope, k_rot.expand(-1, self.num_heads, -1, -1)], -1), v

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As the attention that it stands for."""
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        nope, own = q.split([self.qk_nope_head_dim, self.own_rope_dim], -1)
        rope = self.placed(own[..., None])[..., 0].transpose(1, 2)
        latents, k_rot = self.kv_a_proj_with_mqa(hidden_states)[:, None].split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        cos, sin = (x[..., self.pairs].repeat(1, 1, 2) for x in position_embeddings)
        rope, k_rot = apply_rotary_pos_emb(rope, k_rot, cos, sin)
        if past_key_values is not None:
            latents, k_rot = past_key_values.update(latents, k_rot, self.layer_idx)
        k, v = self.expand_kv(latents, k_rot)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self, torch.cat([nope.transpose(1, 2), rope], -1), k, v, attention_mask, dropout=0.0, scaling=self.scaling,
            **kwargs,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), weights


def as_deepseek(model: Any) -> Any | None:
    """A decoder whose attention is all :class:`LatentAttention` as a stock DeepSeek-V3; None where that cannot say it.

    It can where all layers turn the same frequencies, and the rest of the model is llama's. Latents have one channel
    more there: a large constant, so that the norm over latents, which DeepSeek has, divides by a constant.
    """
    modules = [m for m in model.modules() if isinstance(m, LatentAttention)]
    old, first = model.config, modules[0]
    rotary: Any = getattr(model.base_model, "rotary_emb", None)
    alike = len({(m.kv_lora_rank, m.own_rope_dim, tuple(m.pairs.tolist())) for m in modules}) == 1
    biased = any(name.endswith("bias") for m in modules for name, _ in m.named_parameters())
    if not alike or biased or len(modules) != old.num_hidden_layers or getattr(old, "sliding_window", None):
        return None
    if getattr(rotary, "rope_type", "") not in _STATIC:
        return None
    rank, rope, heads = _stock_rank(first), first.qk_rope_head_dim, first.num_heads
    theta = float(old.rope_parameters["rope_theta"])
    wanted = rotary.inv_freq[first.pairs.to(rotary.inv_freq.device)].double()
    factors = (theta ** -(torch.arange(0, rope, 2, dtype=torch.float64) / rope) / wanted.cpu()).tolist()
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings",
        "rms_norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
    )  # fmt: skip
    config = DeepseekV3Config(
        **{name: getattr(old, name) for name in shared}, num_attention_heads=heads, num_key_value_heads=heads,
        first_k_dense_replace=old.num_hidden_layers, kv_lora_rank=rank, q_lora_rank=None, attention_bias=True,
        qk_rope_head_dim=rope, qk_nope_head_dim=first.qk_nope_head_dim, v_head_dim=first.v_head_dim,
        rope_interleave=False, rope_parameters={
            "rope_type": "longrope", "rope_theta": theta, "short_factor": factors, "long_factor": factors,
            "factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": old.max_position_embeddings,
        },
    )  # fmt: skip
    try:
        with torch.device("meta"):
            made: Any = DeepseekV3ForCausalLM(config)
        held = {name: p for name, p in model.state_dict().items() if ".self_attn." not in name}
        for i, module in enumerate(modules):
            held |= {f"model.layers.{i}.self_attn.{name}": x for name, x in _stock(module).items()}
        made = DeepseekV3ForCausalLM(config).to(next(model.parameters()))
        made.load_state_dict(held)
    except (KeyError, RuntimeError):  # parts that DeepSeek has not
        return None
    return made


def _stock_rank(module: LatentAttention) -> int:
    """Channels of a latent and one that is constant; an even number, so that two can share a byte."""
    return module.kv_lora_rank + 1 + (module.kv_lora_rank + 1) % 2


def _stock(module: LatentAttention) -> dict[str, Tensor]:
    """Weights of DeepSeek's attention that compute the same."""
    with torch.no_grad():
        own, rank, heads = module.kv_lora_rank, _stock_rank(module), module.num_heads
        a, b = module.kv_a_proj_with_mqa.weight, module.kv_b_proj.weight
        q = module.q_proj.weight.unflatten(0, (heads, -1))
        nope, rope = q.split([module.qk_nope_head_dim, module.own_rope_dim], 1)
        full = torch.cat([nope, module.placed(rope)], 1)
        scale = (full.shape[1] * module.scaling**2) ** 0.5  # DeepSeek divides by the root of all channels
        bias = a.new_zeros(rank + len(a) - own)
        bias[own] = _LARGE
        gain = a.new_zeros(rank)
        gain[:own] = _LARGE / rank**0.5  # what the norm divides by
        more = a.new_zeros(rank - own, a.shape[1])
        return {
            "q_proj.weight": (full * scale).flatten(0, 1),
            "kv_a_proj_with_mqa.weight": torch.cat([a[:own], more, a[own:]]),
            "kv_a_proj_with_mqa.bias": bias, "kv_a_layernorm.weight": gain,
            "kv_b_proj.weight": torch.cat([b, b.new_zeros(len(b), rank - own)], 1),
            "o_proj.weight": module.o_proj.weight, "o_proj.bias": a.new_zeros(a.shape[1]),
        }  # fmt: skip
