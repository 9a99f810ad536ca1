# SPDX-License-Identifier: Apache-2.0
"""Linear attention over a feature map in the place of a decoder's attention: what a plan of surgery puts there.

The module reads what the attention that it stands for reads, rotary tables and mask included. In a cache of
transformers its layer holds a state, whose size does not depend on the length, in place of keys and values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..attention.feature_maps import Features, KernelAttention, Radial
from ..attention.positions import split_heads
from ..attention.recurrence import DecayState
from ..errors import UserError

__all__ = ["LinearAttention", "StateLayer"]


class StateLayer(CacheLayerMixin):
    """A layer of a cache that holds the state of linear attention, and counts tokens."""

    is_compileable, is_sliding = False, False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: DecayState | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UserError("this layer of the cache holds a state of linear attention, and no keys")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError("a state of linear attention cannot forget its last tokens: read the text anew")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx.to(self.state.kv.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.reorder_cache(torch.arange(len(self.state.kv)).repeat_interleave(repeats))

    @staticmethod
    def of(cache: Any, layer: int) -> StateLayer:
        """The layer of that number, put there if another stands there."""
        while len(cache.layers) <= layer:
            cache.layers.append(StateLayer())
        if not isinstance(cache.layers[layer], StateLayer):
            cache.layers[layer] = StateLayer()
        found: StateLayer = cache.layers[layer]
        return found


class LinearAttention(nn.Module):
    """Projections of the attention that it stands for, linear attention between them.

    Args:
        width: D.
        heads, kv_heads, head_dim: H, G and d.
        features, radial, decay, norm, seed: see :class:`manyheads.attention.feature_maps.KernelAttention`.
        bias: of queries, keys and values.
        out_bias: of the output projection.
    """

    config: Any = None
    layer_idx: int = 0

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, features: Features, radial: Radial = "normal",
        decay: bool = False, norm: Literal["sum", "group"] = "sum", seed: int = 0, bias: bool = False,
        out_bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * head_dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(heads * head_dim, width, bias=out_bias)
        self.gate = nn.Linear(width, heads * head_dim, bias=False) if norm == "group" else None
        self.inner = KernelAttention(heads, kv_heads, head_dim, features, radial, decay, norm, seed)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
        past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As the attention that it stands for."""
        x = hidden_states
        q, k, v = (
            split_heads(part(x), n)
            for part, n in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        held = None if past_key_values is None else StateLayer.of(past_key_values, self.layer_idx)
        out, state = self.inner(q, k, v, _real(attention_mask, x.shape[1]), None if held is None else held.state)
        if held is not None:
            held.state, held.seen = state, held.seen + x.shape[1]
        out = out if self.gate is None else out * nn.functional.silu(self.gate(x))
        return self.o_proj(out), None


def _real(mask: Tensor | None, length: int) -> Tensor | None:
    """Which of the last ``length`` columns hold tokens, ``[B, T]``, by what the last row of a mask lets be seen."""
    if mask is None:
        return None
    seen = mask[:, 0, -1] if mask.ndim == 4 else mask
    return (seen if seen.dtype == torch.bool else seen >= 0 if mask.ndim == 4 else seen != 0)[:, -length:]
