# SPDX-License-Identifier: Apache-2.0
"""Branchformer: Parallel MLP-Attention Architectures to Capture Local and Global Context (arXiv 2207.02971).

A Conformer's block has self-attention and a convolution one behind the other. Here they are branches side by side, so
that what each gives can be weighed, and one of them left out:

    x1 = attention(LN(x))      x2 = cgMLP(LN(x))      out = LN(x + merge(x1, x2))

- attention: multi-head with relative positions as Transformer-XL has them, score (i, j) =
  ((q_i + u) k_j + (q_i + v) W_r r_{i-j}) / sqrt(d), r sinusoidal; or Fastformer's additive attention, linear in T.
- cgMLP (convolutional gating): [a, g] = GELU(W_1 x), out = W_2 (a * conv(LN(g))), the convolution by channel over
  ``kernel`` frames. It starts with weights near 0 and bias 1, so that the gate is open.
- merge: ``concat`` W [x1; x2]; ``learned`` W (w1 x1 + w2 x2), where each branch is pooled over time by attention to one
  score and w is the softmax of the two; ``fixed`` W ((1 - share) x1 + share x2), in which a branch of weight 0 is not
  built.
- branch dropout: in training the attention of a layer is left out with chance ``drop``, w = (0, 1). Of such a model the
  attention of some layers can be left out for good (``skip``): one training, several costs of inference.

Shapes: ``x [B, T, D]``, ``mask [B, T]`` True where speech is. The released code (ESPnet) does not mask before the
convolution, so that padding reaches the last frames of speech; here it does not. Left out: stochastic depth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...attention.masks import zero_padding
from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe
from ...strategy import Layers

__all__ = ["AdditiveAttention", "Block", "Branchformer", "ConvGatingMLP", "Merge", "RelativeAttention"]

Kind = Literal["concat", "learned", "fixed"]
Share = Annotated[float, Field(ge=0, le=1)]


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions, ``[B, T, D] -> [B, T, D]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.position = nn.Linear(dim, dim, bias=False)
        self.u, self.v = (nn.Parameter(torch.empty(heads, 1, dim // heads).uniform_(-0.1, 0.1)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length, dim = x.shape[1:]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        far = torch.arange(length - 1, -length, -1, device=x.device, dtype=torch.float64)  # i - j, largest first
        rates = 10_000.0 ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float64) / dim)
        angles = far[:, None] * rates
        r = self.position(torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(x.dtype))
        by_distance = (q + self.v) @ r.unflatten(-1, (self.heads, -1)).permute(1, 2, 0)  # [B, H, T, 2 T - 1]
        at = torch.arange(length, device=x.device)
        column = (length - 1 - at[:, None] + at).expand(*q.shape[:2], -1, -1)
        bias = by_distance.gather(-1, column) / math.sqrt(q.shape[-1])
        bias = bias.masked_fill(~mask[:, None, None], float("-inf"))
        out: Tensor = self.out(scaled_dot_product_attention(q + self.u, k, v, bias).transpose(1, 2).flatten(2))
        return out


class AdditiveAttention(nn.Module):
    """Fastformer's attention (arXiv 2108.09084): a global query, then a global key, each a weighted sum over time."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.of_query, self.of_key = nn.Linear(dim, heads), nn.Linear(dim, heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        p = k * self._pooled(q, self.of_query(q), mask)
        u = v * self._pooled(p, self.of_key(p), mask)
        out: Tensor = self.out(u) + q
        return out

    def _pooled(self, x: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        """``[B, 1, D]``: each head's features summed by the softmax over time of its scores ``[B, T, H]``."""
        split = x.unflatten(-1, (self.heads, -1))
        scores = scores / math.sqrt(split.shape[-1])
        weights = scores.masked_fill(~mask[..., None], float("-inf")).softmax(1)
        pooled: Tensor = (weights[..., None] * split).sum(1, keepdim=True).flatten(2)
        return pooled


class ConvGatingMLP(nn.Module):
    """An MLP of hidden size ``2 * width``, half of which gates the other through a convolution over time."""

    def __init__(self, dim: int, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(dim, 2 * width), nn.Linear(width, dim), nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        nn.init.normal_(self.conv.weight, std=1e-6)
        nn.init.ones_(self.conv.bias)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        held, gate = nn.functional.gelu(self.up(x)).chunk(2, -1)
        gate = self.conv(zero_padding(self.norm(gate), mask).mT).mT
        out: Tensor = self.down(self.dropout(held * gate))
        return out


class Merge(nn.Module):
    """Makes one of two branches ``[B, T, D]``; either may be None, where it was left out."""

    def __init__(self, dim: int, kind: Kind, share: float) -> None:
        super().__init__()
        self.kind, self.share = kind, share
        self.out = nn.Linear(2 * dim if kind == "concat" else dim, dim)
        if kind == "learned":
            self.pool, self.weigh = (nn.ModuleList(nn.Linear(dim, 1) for _ in range(2)) for _ in range(2))

    def forward(self, x1: Tensor | None, x2: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The merged ``[B, T, D]``, and the weights ``[B, 2]`` of the branches (1 and 1 where concatenated)."""
        one = next(x for x in (x1, x2) if x is not None)
        if x1 is None or x2 is None:
            return self.out(one), one.new_tensor([x1 is not None, x2 is not None]).expand(len(one), 2)
        if self.kind == "concat":
            return self.out(torch.cat((x1, x2), -1)), one.new_ones(len(one), 2)
        weights = self.weights(x1, x2, mask) if self.kind == "learned" else one.new_tensor([1 - self.share, self.share])
        weights = weights.expand(len(one), 2)
        return self.out(weights[:, 0, None, None] * x1 + weights[:, 1, None, None] * x2), weights

    def weights(self, x1: Tensor, x2: Tensor, mask: Tensor) -> Tensor:
        """Learned weights ``[B, 2]``, which sum to 1."""
        scores = []
        for x, pool, weigh in zip((x1, x2), self.pool, self.weigh, strict=True):
            over = (pool(x) / math.sqrt(x.shape[-1])).masked_fill(~mask[..., None], float("-inf")).softmax(1)
            scores.append(weigh((over * x).sum(1)))
        return torch.cat(scores, -1).softmax(-1)


class Block(nn.Module):
    """One layer, ``[B, T, D] -> [B, T, D]``.

    Attributes:
        shown: weights ``[B, 2]`` of attention and cgMLP in the last forward.
    """

    def __init__(self, recipe: "Branchformer", task: FieldTask, width: int, layer: int) -> None:
        super().__init__()
        dim, only = task.dim, recipe.share if recipe.merge == "fixed" else 0.5
        attention = RelativeAttention if recipe.attention == "relative" else AdditiveAttention
        self.attention = attention(dim, task.heads) if only < 1 else None
        self.local = ConvGatingMLP(dim, width, recipe.kernel, task.dropout) if only > 0 else None
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.merge, self.dropout = Merge(dim, recipe.merge, recipe.share), nn.Dropout(task.dropout)
        self.drop, self.skip = recipe.drop, recipe.skip is not None and layer in recipe.skip
        self.shown: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x1 = x2 = None
        left_out = self.skip or (self.training and self.drop > 0 and float(torch.rand(())) < self.drop)
        if self.attention is not None and not (left_out and self.local is not None):
            x1 = self.dropout(self.attention(self.norms[0](x), mask))
        if self.local is not None:
            x2 = self.dropout(self.local(self.norms[1](x), mask))
        merged, weights = self.merge(x1, x2, mask)
        self.shown = weights.detach()
        out: Tensor = self.norms[2](x + self.dropout(merged))
        return out


@dataclass(frozen=True, kw_only=True)
class Branchformer(Recipe):
    """An encoder of speech whose blocks have attention and a convolutional gating MLP side by side.

    Attributes:
        merge: how the branches become one.
        share: of the cgMLP where the weights are fixed; 1 is the cgMLP alone, 0 attention alone.
        attention: relative, or additive (Fastformer), which is linear in the length.
        kernel: frames of the gating convolution, odd.
        drop: chance that a layer's attention is left out of a training step; not with ``concat``.
        skip: layers whose attention is left out, in a model that was trained with ``drop``; not with ``concat``.
    """

    task: ClassVar[str] = "digit_strings"

    merge: Kind = field(default="concat", metadata={"help": "how branches are merged: concat, learned or fixed"})
    share: Share = field(
        default=0.5, metadata={"help": "weight of the cgMLP with merge=fixed; 0 and 1 leave one alone"}
    )
    attention: Literal["relative", "additive"] = field(default="relative", metadata={"help": "relative or additive"})
    kernel: int = field(default=31, metadata={"help": "frames of the gating convolution"})
    drop: Share = field(default=0.0, metadata={"help": "chance of training a layer without its attention"})
    skip: Layers = field(default=None, metadata={"help": "layers used without their attention, as 0-3+7"})

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"branchformer: kernel={self.kernel}: a window around a frame is odd; write kernel=31")
        if self.merge == "concat" and (self.drop or self.skip):
            raise UserError(
                "branchformer: drop and skip leave a branch out, which a concatenation needs: merge=learned"
            )

    def build(self, task: FieldTask, width: int) -> nn.Module:
        return task.around([Block(self, task, width, layer) for layer in range(task.layers)])

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Mean weights of the branches by layer, over test samples; none where nothing is weighed."""
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        if self.merge != "learned":
            return ()
        model(batch["inputs"], batch["mask"])
        shown = [block.shown.float().mean(0).tolist() for block in blocks if block.shown is not None]
        rows = list(map(str, range(len(shown))))
        return (
            Picture("learned weights of the branches", rows, ["attention", "cgMLP"], shown, ("layers", "branches")),
        )
