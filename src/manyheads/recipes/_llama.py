# SPDX-License-Identifier: Apache-2.0
"""A Llama written to be trained fast.

The weights of one kind are one stack over the layers, so that Muon orthogonalises all layers in one batched product
(a loop over 70 small matrices costs more than the forward pass of a model this small), and nothing but a causal SDPA
stands between the projections. ``to_transformers`` gives the same function as a ``LlamaForCausalLM``.
Shapes: B batch, T tokens, L layers, D hidden, F feed-forward, H heads, K key/value heads, d head_dim, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

_STACKS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


class Llama(nn.Module):
    """Float32 parameters, arithmetic in ``dtype``; initialised from ``config`` (output projections at zero)."""

    cos: Tensor  # [positions, 1, d/2]
    sin: Tensor

    def __init__(self, config: LlamaConfig, dtype: torch.dtype = torch.float32, zero_output: bool = True) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        layers, hidden, mlp = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        queries, keys = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads or 1))

        def normal(*shape: int, std: float = config.initializer_range) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * std)

        out_std = 0.0 if zero_output else config.initializer_range
        self.embed = normal(config.vocab_size, hidden)
        self.head = self.embed if config.tie_word_embeddings else normal(config.vocab_size, hidden)
        self.q, self.k, self.v = (normal(layers, width, hidden) for width in (queries, keys, keys))
        self.o = normal(layers, hidden, queries, std=out_std)
        self.gate, self.up = normal(layers, mlp, hidden), normal(layers, mlp, hidden)
        self.down = normal(layers, hidden, mlp, std=out_std)
        self.attention_norm = nn.Parameter(torch.ones(layers, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
        self.norm = nn.Parameter(torch.ones(hidden))
        theta: float = dict(config.rope_parameters or {})["rope_theta"]
        frequencies = theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] in ``dtype`` for token ids [B, T] of any integer type."""
        eps = self.config.rms_norm_eps
        x = F.embedding(tokens.long(), self.embed).to(self.dtype)  # [B, T, D]
        cos, sin = (table[: tokens.shape[1]] for table in (self.cos, self.sin))
        stacks = [getattr(self, name).to(self.dtype).unbind() for name in _STACKS]
        for q, k, v, o, gate, up, down, attention_norm, mlp_norm in zip(*stacks, strict=True):
            h = F.rms_norm(x, x.shape[-1:], attention_norm, eps)
            heads = [F.linear(h, w).unflatten(-1, (-1, self.head_dim)) for w in (q, k, v)]  # [B, T, H or K, d]
            heads[:2] = [_rotate(head, cos, sin) for head in heads[:2]]
            q, k, v = (head.transpose(1, 2) for head in heads)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # [B, H, T, d]
            x = x + F.linear(a.transpose(1, 2).flatten(2), o)
            h = F.rms_norm(x, x.shape[-1:], mlp_norm, eps)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        return F.linear(F.rms_norm(x, x.shape[-1:], self.norm.to(self.dtype), eps), self.head.to(self.dtype))

    @classmethod
    def from_transformers(cls, folder: Path, dtype: torch.dtype) -> "Llama":
        """The model that ``to_transformers`` wrote to ``folder``, to be trained on."""
        source: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        state, model = source.state_dict(), cls(source.config, dtype)
        with torch.no_grad():
            model.embed.copy_(state["model.embed_tokens.weight"])
            model.head.copy_(state["lm_head.weight"])
            model.norm.copy_(state["model.norm.weight"])
            for name, home in _STACKS.items():
                stack = getattr(model, name)
                stack.copy_(torch.stack([state[f"model.layers.{i}.{home}.weight"] for i in range(len(stack))]))
        return model

    def to_transformers(self, dtype: torch.dtype) -> LlamaForCausalLM:
        """The same weights, rounded to ``dtype``, as a transformers model on the CPU."""
        state = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm, "lm_head.weight": self.head}
        for name, home in _STACKS.items():
            for layer, weight in enumerate(getattr(self, name)):
                state[f"model.layers.{layer}.{home}.weight"] = weight
        model: Any = LlamaForCausalLM(self.config)
        model.load_state_dict({name: weight.detach().cpu() for name, weight in state.items()})
        result: LlamaForCausalLM = model.to(dtype).eval()
        return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [B, T, H, d], in float32, the two halves of a head being the two coordinates."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
