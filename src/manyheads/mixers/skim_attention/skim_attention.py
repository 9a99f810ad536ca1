# SPDX-License-Identifier: Apache-2.0
"""Attention whose weights come of the boxes of words alone, once for all layers of a model."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from ...attention.masks import each_text, neighbours, texts_with_state
from ...attention.reference import repeat_kv, softmax
from ...call import MixerConfig
from ...errors import UserError
from ...strategy import Mixer
from .._mixer import positions_of, projections, split_heads, whole
from .layout import Axes, LayoutEmbedding

__all__ = ["SkimAttention", "SkimMixer", "layout_weights"]


@dataclass(frozen=True, kw_only=True)
class SkimAttention(Mixer):
    """Skim-Attention, for encoders that are given boxes of their words.

    Attributes:
        axes: what of a box is embedded; ``order`` is the paper's 1-D positions in place of boxes, ``centre`` its
            degraded boxes.
        resolution: rows of the tables of coordinates.
        window: keys fewer than so many words away in the text are seen, those of LongSkimformer; None for all.
        context: layers of an encoder over the layouts, before the map is made of them; the released model has two.
        shared: one map of attention for all layers; else each layer has a query and a key projection of its own.
    """

    directions: ClassVar = ("bidirectional",)

    axes: Axes = field(default="all", metadata={"help": "of a box: all, x, y, centre, order (no box) or none"})
    resolution: int = field(default=1024, metadata={"help": "rows of the tables of coordinates"})
    window: int | None = field(default=None, metadata={"help": "words that a word sees on either side; all without"})
    context: int = field(default=0, metadata={"help": "layers of an encoder over layouts before the map; released: 2"})
    shared: bool = field(default=True, metadata={"help": "one map of attention for all layers"})

    def __post_init__(self) -> None:
        if self.resolution < 2 or self.context < 0 or (self.window is not None and self.window < 1):
            raise UserError("skim_attention: resolution is at least 2 steps, window at least 1 word, context 0 or more")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal:
            raise UserError("skim_attention: is encoder attention; the paper has no causal form")
        return SkimMixer(config, self)


@dataclass(frozen=True, slots=True)
class Page:
    """What the layers of one forward share.

    Attributes:
        layout: embeddings of boxes ``[N, T, dim]`` of texts that begin at column 0.
        lengths: tokens of each ``[N]``, None for T.
        weights: attention of all layers, see :func:`layout_weights`; None where each makes its own.
    """

    layout: Tensor
    lengths: Tensor | None
    weights: Tensor | None


def layout_weights(q: Tensor, k: Tensor, lengths: Tensor | None, window: int | None = None) -> Tensor:
    """Weights ``softmax(q k^T / sqrt(d))`` over real keys.

    Args:
        q, k: ``[N, H, T, d]`` of layouts.
        lengths: ``[N]`` real tokens, from column 0 on; None for T.
        window: keys fewer than so many tokens away are seen; None for all.

    Returns:
        ``[N, H, T, T]``; with a window ``[N, H, blocks, window, 3 window]``, each block of queries with the keys of the
        block before it, its own and the one after.
    """
    length, q = q.shape[2], q * q.shape[-1] ** -0.5
    ends = torch.full(q.shape[:1], length, device=q.device) if lengths is None else lengths
    if window is None:
        keys = torch.arange(length, device=q.device)
        mask = None if lengths is None else (keys < ends[:, None])[:, None, None]
        return softmax(q @ k.mT, mask)
    q, k = _blocks(q, window), neighbours(_blocks(k, window))
    at = torch.arange(q.shape[2] * window, device=q.device).view(-1, window)
    keys = (torch.arange(q.shape[2], device=q.device) - 1)[:, None] * window + torch.arange(3 * window, device=q.device)
    near = ((at[:, :, None] - keys[:, None]).abs() < window) & (keys >= 0)[:, None]
    return softmax(q @ k.mT, (near & (keys < ends[:, None, None])[:, :, None])[:, None])


def _blocks(x: Tensor, window: int) -> Tensor:
    """``[N, H, T, d]`` in blocks of ``window`` tokens, filled up with zeros: ``[N, H, blocks, window, d]``."""
    blocks: Tensor = pad(x, (0, 0, 0, -x.shape[2] % window)).unflatten(2, (-1, window))
    return blocks


def _read(weights: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Values ``[N, H, T, d]`` weighted by :func:`layout_weights`: ``[N, T, H * d]``."""
    if window is None:
        out = weights.to(v.dtype) @ v
    else:
        out = (weights.to(v.dtype) @ neighbours(_blocks(v, window))).flatten(2, 3)[:, :, : v.shape[2]]
    return out.transpose(1, 2).flatten(2)


class LayoutBlock(nn.Module):
    """A layer of BERT over layouts."""

    def __init__(self, config: MixerConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.window, dim = config.num_heads, window, config.dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections(replace(config, num_kv_heads=self.heads))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.mixer_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Layouts ``[N, T, dim]`` of texts of ``lengths [N]``."""
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        read = _read(layout_weights(q, k, lengths, self.window), v, self.window)
        x = self.mixer_norm(x + self.out_proj(read))
        y: Tensor = self.ffn_norm(x + self.down(gelu(self.up(x))))
        return y


class SkimMixer(nn.Module):
    """One layer: values of the text, weights of the page. The first layer embeds boxes for all of them."""

    def __init__(self, config: MixerConfig, strategy: SkimAttention) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        q_proj, _, self.v_proj, self.out_proj = projections(config)
        if config.layer == 0:
            self.layout = LayoutEmbedding(config.dim, strategy.axes, strategy.resolution)
            self.layout_norm = nn.LayerNorm(config.dim)
            self.context = nn.ModuleList(LayoutBlock(config, strategy.window) for _ in range(strategy.context))
        if config.layer == 0 or not strategy.shared:
            self.q_proj, self.k_proj = q_proj, nn.Linear(config.dim, q_proj.out_features, bias=False)

    def prepare(
        self, x: Tensor, *, layout: Tensor | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first layer reads, as it is, and for all layers the page of boxes ``layout [B, T, 4]``."""
        at = positions_of(x.shape[0], x.shape[1], x.device, mask, None, cu_seqlens)
        page = self.page(layout, at, mask, cu_seqlens)
        return x, {"page": replace(page, weights=self.weights(page)) if self.strategy.shared else page}

    def page(
        self, layout: Tensor | None, positions: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Page:
        """Layouts of boxes ``[B, T, 4]``, or of ``positions [B, T]``, without weights."""
        embedded = self.layout_norm(self.layout(layout, positions).to(self.layout_norm.weight.dtype))
        _, (texts, lengths) = texts_with_state(lambda rows, n: (rows, (rows, n)), embedded, mask, cu_seqlens)
        for block in self.context:
            texts = block(texts, lengths)
        return Page(texts, lengths, None)

    def weights(self, page: Page) -> Tensor:
        """Of this layer's own queries and keys."""
        q, k = (split_heads(p(page.layout), self.config.num_heads) for p in (self.q_proj, self.k_proj))
        return layout_weights(q, k, page.lengths, self.strategy.window)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: Any = None, cu_seqlens: Tensor | None = None,
        page: Page | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Output ``[B, T, dim]`` of ``x [B, T, dim]``, padded anywhere by ``mask`` or packed; there is no state.

        Raises:
            UserError: a layer that is not the first is given no page.
        """
        whole(state)
        if page is None:
            if self.config.layer:
                raise UserError("skim_attention: give a later layer the page that the first one's prepare() made")
            page = self.prepare(x, mask=mask, cu_seqlens=cu_seqlens)[1]["page"]
        weights = self.weights(page) if page.weights is None else page.weights
        return each_text(lambda rows, _: self._mixed(rows, weights), x, mask, cu_seqlens), None

    def _mixed(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Values of texts ``rows [N, T, dim]`` weighted."""
        v = repeat_kv(split_heads(self.v_proj(rows), self.config.num_kv_heads), self.config.num_heads)
        y: Tensor = self.out_proj(_read(weights, v, self.strategy.window))
        return y
