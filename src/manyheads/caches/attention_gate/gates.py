# SPDX-License-Identifier: Apache-2.0
"""The gates of a model: a small causal attention in front of each layer that says which tokens it remembers.

Legend: B batch, T new tokens, S all tokens so far, D width of the model, Hkv key/value heads, H' heads and d' channels
of the gate's own attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import reference
from ...attention.causal import causal_tail
from ...calls.layer_modules import LayerModules

__all__ = ["Gate", "Gates"]

HOW = "python -m manyheads.recipes.attention_gate --model MODEL --out FOLDER"


class Gate(nn.Module):
    """Causal attention of H' heads over the layer's inputs, and a linear layer to one logit for each key/value head.

    A token's own value is added to what its attention gives: with no training attention is an average over all that was
    read, in which the token itself is hardly seen.

    Args:
        dim: D.
        kv_heads: Hkv.
        num_heads: H'.
        head_dim: d'.
        bias: of every logit at the start; above 0 everything is kept.
    """

    def __init__(self, dim: int, kv_heads: int, num_heads: int = 2, head_dim: int = 16, bias: float = 2.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, kv_heads)
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.constant_(self.out.bias, bias)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, H', T, d']`` of ``hidden [B, T, D]``, in its dtype."""
        x = reference.widened(hidden)
        projected: Tensor = self.qkv(x.to(self.qkv.weight.dtype))
        parts = projected.to(hidden.dtype).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def decide(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits ``[B, Hkv, T]`` of the last T tokens.

        Args:
            q: ``[B, H', T, d']``.
            k, v: ``[B, H', S, d']``.
            real: which of the S tokens are none of padding, bool ``[B, S]``; None for all.
        """
        q, k, v = (reference.widened(x) for x in (q, k, v))
        new, size, scale = q.shape[2], k.shape[2], self.head_dim**-0.5
        if real is None:
            out = causal_tail(q, k, v, scale)
        else:
            mask = reference.causal_mask(new, size, q.device) & real[:, None]
            own = torch.arange(size - new, size, device=q.device)[:, None] == torch.arange(size, device=q.device)
            mask = (mask | own)[:, None]  # padding sees itself: no row is empty
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
        out = out + v[:, :, size - new :].transpose(1, 2)
        logits: Tensor = self.out(out.flatten(2).to(self.out.weight.dtype))
        return logits.transpose(1, 2)

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits ``[B, Hkv, T]`` of a whole text ``hidden [B, T, D]``; ``real [B, T]`` as in :meth:`decide`."""
        return self.decide(*self.project(hidden), real)


class Gates(LayerModules):
    """The gates of a model by layer, and what they were trained for.

    Args:
        dim: D.
        kv_heads: Hkv of each layer that has a gate.
        num_heads, head_dim, bias: as in :class:`Gate`.
        threshold: probability above which a token is kept.
        sinks: first tokens that are kept whatever the gates say.
        about: how they were trained, plain values.
    """

    files, what, how, user = "gates", "gates", HOW, "attention_gate"

    def __init__(
        self, dim: int, kv_heads: Mapping[int, int], num_heads: int = 2, head_dim: int = 16, bias: float = 2.0,
        threshold: float = 0.5, sinks: int = 0, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        config = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim}
        super().__init__(kv_heads, config, about, bias=bias)
        self.threshold, self.sinks = threshold, sinks

    @property
    def described(self) -> dict[str, Any]:
        return {**self.config, "threshold": self.threshold, "sinks": self.sinks}

    def make(self, heads: int, **more: Any) -> Gate:
        return Gate(self.config["dim"], heads, self.config["num_heads"], self.config["head_dim"], **more)

    def gate(self, layer: int) -> Gate:
        """The gate of a layer, the very module that is trained."""
        found = self.layer(layer)
        assert isinstance(found, Gate)
        return found
