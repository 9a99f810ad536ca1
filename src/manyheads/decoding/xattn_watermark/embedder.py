# SPDX-License-Identifier: Apache-2.0
"""The layers that write a message: cross-attention from a frozen model's stream to the embeddings of its bits.

Legend: B batch, T tokens, D width of the model, W width of a layer's attention, b bits, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention

from ...call import Site
from ...calls.layer_modules import LayerModules
from ...errors import UserError

__all__ = ["HOW", "CrossAttention", "Embedder", "Place"]

HOW = "python -m manyheads.recipes.xattn_watermark --model MODEL --out FOLDER"
Place = Literal["between", "within"]
_EPS = 1e-6


class CrossAttention(nn.Module):
    """What one layer adds to the stream x.

        y = r tanh(g) XAttn(norm(x), M);    y + r tanh(g') FFN(norm(x + y))

    g and g' are 0 at first; r is a constant, the size of the stream there, so that one learning rate fits all layers.

    Args:
        dim: D.
        width: W, of queries, of keys and values, and of the feed-forward part.
        heads: H.
        uniform: every query sees all bits alike, which leaves a constant of the message: an ablation.
    """

    def __init__(self, dim: int, width: int, heads: int, uniform: bool = False) -> None:
        super().__init__()
        self.heads, self.uniform = heads, uniform
        self.q, self.out = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)
        self.k, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)
        for linear in (self.q, self.k, self.v, self.out, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
        self.gate, self.feed_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.size: Tensor
        self.register_buffer("size", torch.ones(()))

    def memory(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, b, W / H]`` of embeddings ``[B, b, W]``."""
        split = (layer_norm(bits, bits.shape[-1:]), self.heads)
        return _heads(self.k(split[0]), split[1]), _heads(self.v(split[0]), split[1])

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is added to ``x [B, T, D]``, by the keys and values of its rows or of one message for all."""
        normed = rms_norm(x, x.shape[-1:], eps=_EPS)
        if self.uniform:
            found = v.mean(2, keepdim=True).expand(len(x), -1, x.shape[1], -1)
        else:
            q = _heads(self.q(normed), self.heads)
            found = scaled_dot_product_attention(q, k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1))
        y = self.size * self.gate.tanh() * self.out(found.transpose(1, 2).flatten(2))
        fed = self.down(gelu(self.up(rms_norm(x + y, x.shape[-1:], eps=_EPS))))
        added: Tensor = y + self.size * self.feed_gate.tanh() * fed
        return added


def _heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split


class Embedder(LayerModules):
    """The layers of a model by the block that they follow or stand in, and how they were trained.

    Args:
        dim: D.
        kv_heads: key/value heads of each block that has one.
        bits: b.
        width, heads, uniform: of :class:`CrossAttention`.
        place: ``between`` blocks, or ``within`` them, between attention and feed-forward.
        about: how they were trained, plain values.

    Attributes:
        memory: embeddings ``[b, 2, W]`` of both values of each bit.
        messages: ``[B, b]`` of 0 and 1, of the rows that are read, where a strategy has no message: in training.
        off: nothing is added.
    """

    files, what, how, user = "embedder", "watermarking layers", HOW, "xattn_watermark"

    def __init__(
        self, dim: int, kv_heads: Mapping[int, int], bits: int, width: int = 128, heads: int = 4,
        place: Place = "between", uniform: bool = False, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if bits < 1 or width % heads:
            raise UserError("xattn_watermark: a message has bits, 1 or more, and heads divide width")
        config = {"dim": dim, "bits": bits, "width": width, "heads": heads, "place": place, "uniform": uniform}
        super().__init__(kv_heads, config, about)
        self.memory = nn.Parameter(torch.randn(bits, 2, width))
        self.messages: Tensor | None = None
        self.off = False

    @classmethod
    def of(cls, dim: int, sites: Iterable[Site], *, every: int = 3, first: float = 0.5, **settings: Any) -> Embedder:
        """New layers in every so manieth block, from a part ``first`` of the depth on; see :meth:`LayerModules.of`."""
        made = [site for site in sites if site.layer is not None and site.causal]
        start = int(first * len(made))
        return super().of(dim, made[start::every] or made[-1:], **settings)

    def make(self, heads: int, **more: Any) -> CrossAttention:
        config = self.config
        return CrossAttention(config["dim"], config["width"], config["heads"], config["uniform"])

    def used(self, layer: int, like: Tensor) -> CrossAttention:
        """The layer's module while it is trained, else a copy where ``like`` is."""
        found = self.layer(layer)
        assert isinstance(found, CrossAttention)
        if found.gate.requires_grad:
            return found
        placed: CrossAttention = self.placed(layer, like)
        return placed

    def embedded(self, messages: Tensor, like: CrossAttention) -> Tensor:
        """The embeddings ``[B, b, W]`` of messages ``[B, b]``, where a layer's module is."""
        memory = self.memory.to(like.gate.device, like.gate.dtype)
        chosen = messages.to(memory.device, memory.dtype)[..., None]
        return memory[:, 0] * (1 - chosen) + memory[:, 1] * chosen
