# SPDX-License-Identifier: Apache-2.0
"""An attention to the source in every block, with projections of its own; its output begins at zero.

The other way of "Native 3D Editing with Full Attention", which it finds worse. Beside the attention to text,

    h = h + W_o softmax(q k^T / sqrt(d)) v,     q = R N(n W_q), k = R N(l W_k), v = l W_v

where n are the target's tokens as attention to text is given them, l the embedded source's after a layer norm without
weights, N an RMS norm of all heads together, as Wan has it, and R the denoiser's rotary positions where it has some.
W_o is zero at first, with its bias: the denoiser begins as it was. Some 4 dim^2 weights for each layer.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from ...attention.rope import Rotary, rotate_pairs
from ...calls.condition import Condition
from ...conditioning import DenoiserConfig, SourceCondition

__all__ = ["SourceAttention"]


@dataclass(frozen=True, kw_only=True)
class SourceAttention(SourceCondition):
    """Adds attention to the source in every block."""

    def condition(self, config: DenoiserConfig) -> Condition:
        return _Crossed(config)


class _Crossed(Condition):
    beside_text: ClassVar[bool] = True

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_SourceLayer(config.dim, config.heads) for _ in range(config.layers))

    def added(self, layer: int, hidden: Tensor, source: Tensor, rotary: Rotary | None) -> Tensor:
        out: Tensor = self.layers[layer](hidden, source, rotary)
        return out


class _SourceLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.query_norm, self.key_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, source: Tensor, rotary: Rotary | None) -> Tensor:
        source = layer_norm(source, source.shape[-1:])
        q, k = self.query_norm(self.query(hidden)), self.key_norm(self.key(source))
        q, k, v = (x.unflatten(2, (self.heads, -1)) for x in (q, k, self.value(source)))
        if rotary is not None:
            q, k = rotate_pairs(q, rotary), rotate_pairs(k, rotary)
        out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed
