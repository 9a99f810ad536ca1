# SPDX-License-Identifier: Apache-2.0
"""The mixer: every head is a graph isomorphism network on the graph that its attention draws.

Legend: B batch, H heads, T queries, S keys, d channels of a head.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu, softplus

from ...attention import reference, rope
from ...attention.masks import MaskSpec
from ...attention.positions import rope_tables
from ...call import MixerConfig
from ...errors import UserError
from ...strategy import Mixer
from .._mixer import SoftmaxMixer

__all__ = ["GinAttention", "GraphGinAttention"]

Adjacency = Literal[
    "none", "relu", "silu", "softplus", "sharp_softplus", "sigmoid", "flow", "binary", "top_k"
]  # fmt: skip
_EPS = 1e-5  # of the norm


@dataclass(frozen=True, kw_only=True)
class GraphGinAttention(Mixer):
    """GIN-Attention or, with ``aggregate=pna``, PNA-Attention.

    Attributes:
        aggregate: ``gin`` sums neighbours; ``pna`` has their mean, variance, longest and shortest vector side by side.
        r: width of a head's MLP, as a part of the head's.
        sharpen: a learned factor on the logits, one a layer, that starts at 1.
        temperature: divides the logits.
        adjacency: what becomes of the attention weights before they are a graph; anything but ``none`` (and ``pna``)
            computes them block by block, which no fused kernel does.
        threshold: of the adjacency; ``pna`` takes its longest and shortest vector of keys above it.
        learned_threshold: it is a parameter, and starts there.
        beta: steepness of ``sigmoid`` and ``sharp_softplus``.
        fraction: part of the keys that a query sees which ``top_k`` makes its neighbours.
        o_proj: a linear layer behind the heads; ``pna`` always has one.
        dropout: in the MLPs of ``gin``.
        position: ``rope`` or ``none``.
        theta: base of the rotation.
    """

    aggregate: Literal["gin", "pna"] = field(default="gin", metadata={"help": "gin or pna"})
    r: float = field(default=0.5, metadata={"help": "width of a head's MLP, as a part of the head's"})
    sharpen: bool = field(default=True, metadata={"help": "a learned factor on the logits"})
    temperature: float = field(default=1.0, metadata={"help": "divides the logits"})
    adjacency: Adjacency = field(
        default="none",
        metadata={"help": "none, relu, silu, softplus, sharp_softplus, sigmoid, flow, binary or top_k"},
    )
    threshold: float = field(default=0.2, metadata={"help": "of the adjacency and of pna's extremes"})
    learned_threshold: bool = field(default=False, metadata={"help": "the threshold is a parameter"})
    beta: float = field(default=10.0, metadata={"help": "steepness of sigmoid and sharp_softplus"})
    fraction: float = field(default=0.1, metadata={"help": "part of the visible keys that top_k makes neighbours"})
    o_proj: bool = field(default=False, metadata={"help": "a linear layer behind the heads"})
    dropout: float = field(default=0.1, metadata={"help": "in the MLPs of gin"})
    position: Literal["rope", "none"] = field(default="rope", metadata={"help": "rope or none"})
    theta: float = field(default=10_000.0, metadata={"help": "base of the rotation"})

    def __post_init__(self) -> None:
        choices = {"aggregate": ("gin", "pna"), "position": ("rope", "none"), "adjacency": Adjacency.__args__}  # type: ignore[attr-defined]
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"graph_gin_attention: {name} is {', '.join(known)}, not {getattr(self, name)!r}")
        if min(self.r, self.temperature, self.beta) <= 0 or not 0 < self.fraction <= 1 or not 0 <= self.dropout < 1:
            raise UserError(
                "graph_gin_attention: r, temperature and beta are above 0, fraction is above 0 and at most 1, dropout "
                "at least 0 and below 1"
            )

    def build(self, config: MixerConfig) -> nn.Module:
        if config.num_heads * config.head_dim != config.dim:
            raise UserError("graph_gin_attention parts the channels among heads: heads * head_dim has to be dim")
        return GinAttention(config, self)


class HeadMLPs(nn.Module):
    """An MLP for each head, by batched products: ``[B, H, T, d_in] -> [B, H, T, d]``.

    Linear, dropout, RMSNorm, SiLU, linear; without ``norm`` neither dropout nor norm, nor biases.
    """

    def __init__(self, heads: int, inner: int, wide: int, dim: int, layers: int, norm: bool, dropout: float) -> None:
        super().__init__()
        self.up = nn.Parameter(0.02 * torch.randn(heads, inner, wide))
        self.down = nn.Parameter(0.02 / (2 * layers) ** 0.5 * torch.randn(heads, wide, dim))
        self.up_bias, self.down_bias, self.norm = (
            nn.Parameter(torch.full((heads, 1, size), start)) if norm else None
            for size, start in ((wide, 0.0), (dim, 0.0), (wide, 1.0))
        )
        self.dropout = dropout

    def forward(self, z: Tensor) -> Tensor:
        y = z @ self.up
        if self.norm is not None and self.up_bias is not None:
            y = nn.functional.dropout(y + self.up_bias, self.dropout, self.training)
            y = nn.functional.rms_norm(y, y.shape[-1:], eps=_EPS) * self.norm
        y = silu(y) @ self.down
        return y if self.down_bias is None else y + self.down_bias


class GinAttention(SoftmaxMixer):
    """The layer; key/value heads are as many as query heads, and the state holds keys and the heads' own channels."""

    def __init__(self, config: MixerConfig, strategy: GraphGinAttention) -> None:
        super().__init__(replace(config, num_kv_heads=config.num_heads))
        self.strategy, heads, d = strategy, config.num_heads, config.head_dim
        self.alpha = nn.Parameter(torch.ones(())) if strategy.sharpen else None
        threshold = torch.tensor(strategy.threshold)
        self.threshold = nn.Parameter(threshold) if strategy.learned_threshold else strategy.threshold
        gin, wide = strategy.aggregate == "gin", max(1, int(strategy.r * d))
        self.eps = nn.Parameter(torch.zeros(heads, 1, 1)) if gin else None
        if gin:
            self.v_proj = nn.Identity()  # type: ignore[assignment]
            if not strategy.o_proj:
                self.out_proj = nn.Identity()  # type: ignore[assignment]
        self.mlp: nn.Module = HeadMLPs(
            heads, d if gin else 4 * d, wide, d, config.num_layers, gin, strategy.dropout
        )  # fmt: skip

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.strategy.position == "none":
            return x
        return rope.rotate(x, rope_tables(positions, x.shape[-1], self.strategy.theta)).to(x.dtype)

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        q = self._rotate(q, positions) / self.strategy.temperature
        return q if self.alpha is None else q * self.alpha

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self._rotate(k, positions)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys: Tensor, spec: MaskSpec, **given: Any
    ) -> Tensor:
        plain = self.eps is not None and self.strategy.adjacency == "none"
        if plain:
            z = super()._attend(q, k, v, at, keys, spec, **given)
        elif self.editor is not None:
            raise UserError(
                f"{self.strategy.spec} reads the weights themselves, which {self.editor[1].spec} cannot edit"
            )
        else:
            z = self._by_weights(q, k, v, at, keys, spec, given.get("real"))
        if self.eps is not None:
            z = z + self.eps * v[:, :, v.shape[2] - q.shape[2] :]
        out: Tensor = self.mlp(z)
        return out

    def _by_weights(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys: Tensor, spec: MaskSpec, real: Tensor | None
    ) -> Tensor:
        """What is made of neighbours ``[B, H, T, d]``, or four times as wide, a block of queries at a time."""
        length, size = q.shape[2], k.shape[2]
        block = length if spec.documents is not None else reference.block_size(q, q.shape[0] * q.shape[1] * size)
        rows = []
        for t in range(0, length, block):
            cut = slice(t, t + block)
            allowed = spec.dense(q[:, :, cut].shape[2], size, positions=(at[:, cut], keys), real=real)
            weights = reference.softmax(q[:, :, cut] @ k.mT * self.scale, allowed)
            graph = adjacency(weights, allowed, self.strategy, self.threshold)
            rows.append(graph @ v if self.eps is not None else statistics(graph, v, allowed, self.threshold))
        return torch.cat(rows, 2)


def adjacency(weights: Tensor, allowed: Tensor, how: GraphGinAttention, threshold: float | Tensor) -> Tensor:
    """The graph ``[B, H, T, S]`` that attention weights become; no edge to a key that is not ``allowed``.

    ``binary`` and ``top_k`` are steps: no gradient reaches queries and keys through them.
    """
    x = weights - threshold
    match how.adjacency:
        case "none":
            return weights
        case "relu":
            made = relu(x)
        case "silu":
            made = silu(x)
        case "softplus":
            made = softplus(x)
        case "sharp_softplus":
            made = softplus(how.beta * x) / how.beta
        case "sigmoid":
            made = torch.sigmoid(how.beta * x)
        case "flow":
            made = torch.sigmoid(5 * weights) * torch.sigmoid(50 * x)
        case "binary":
            made = (x > 0).to(weights.dtype)
        case "top_k":
            count = (allowed.sum(-1, keepdim=True) * how.fraction).floor().clamp(min=1)
            order = weights.masked_fill(~allowed, -1.0).argsort(dim=-1, descending=True, stable=True)
            made = (order.argsort(-1) < count).to(weights.dtype)
    return made * allowed


def statistics(graph: Tensor, v: Tensor, allowed: Tensor, threshold: float | Tensor) -> Tensor:
    """Mean, longest, variance and shortest of the values of neighbours, ``[B, H, T, 4 d]``.

    The longest and the shortest are whole vectors, of the keys whose edge is above the threshold; where there is none,
    that of the first key that the query may see.
    """
    degree = graph.sum(-1, keepdim=True)
    degree = torch.where(degree == 0, 1.0, degree)
    mean = graph @ v / degree
    variance = (graph @ v.square() / degree - mean.square()).clamp(min=0.0)
    norms, near = v.norm(dim=-1)[:, :, None], graph > threshold
    near = torch.where(near.any(-1, keepdim=True), near, allowed & (allowed.cumsum(-1) == 1))
    batch, head = (torch.arange(n, device=v.device) for n in v.shape[:2])
    found = [
        v[batch[:, None, None], head[:, None], norms.masked_fill(~near, sign * -torch.inf).mul(sign).argmax(-1)]
        for sign in (1, -1)
    ]
    return torch.cat([mean, found[0], variance, found[1]], -1)
