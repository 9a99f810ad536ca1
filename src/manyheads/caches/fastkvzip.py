# SPDX-License-Identifier: Apache-2.0
"""Keep what gates of low rank expect that a repetition of the text would attend to.

Kim et al., "Fast KVzip: Efficient and Accurate LLM Inference with Gated KV Eviction", arXiv 2601.17668. KVzip's score
is the largest attention weight that a repetition gives a token. A gate imitates such a weight from the hidden state x_i
of the token alone: queries and keys of r = 16 channels of its own, both of x_i, normalised, and S learned keys that
stand for everything else that the query could look at. For query head g of key/value head h

    z = q_hg(x_i) . k_h(x_i) / sqrt(r) + b_hg        z_s = q_hg(x_i) . c_hs / sqrt(r)
    score_hi = mean over g of  1 / (1 + sum_s exp(z_s - z))

Gates are trained on KVzip's scores by cross-entropy, the model stays as it is:

    python -m manyheads.recipes.fastkvzip --model MODEL --out gates
    with manyheads.use(model, "fastkvzip:modules=gates,budget=0.3"): ...

The gate is that of the released code. A token is scored in the forward that reads it; the best of the whole model stay
within the ``budget``, or those above a ``threshold`` in (0, 1). ``recent`` last tokens stay (released: 4,096 of a long
prompt; here 128). Differs: learned keys begin at random, where they begin at zero there; a prompt that comes in chunks
is compressed after its last.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import reference
from ._predicted import Predicted, Predictors

__all__ = ["FastKVzip", "SinkGates"]

_LEAST = 1e-6  # that a score is away from 0 and 1 where its logarithm is taken


class _Gate(nn.Module):
    """Scores ``[B, Hkv, T]`` in (0, 1) of ``[B, T, D]``."""

    def __init__(self, dim: int, heads: int, groups: int, rank: int, others: int) -> None:
        super().__init__()
        self.shape = (heads, groups, rank)
        self.q = nn.Linear(dim, heads * groups * rank)
        self.k = nn.Linear(dim, heads * rank, bias=False)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(rank)), nn.Parameter(torch.ones(rank))
        self.others = nn.Parameter(0.1 * torch.randn(heads, others, rank))
        self.bias = nn.Parameter(torch.zeros(heads, groups))

    def forward(self, x: Tensor) -> Tensor:
        (heads, groups, rank), x = self.shape, reference.widened(x).to(self.bias.dtype)
        q = _normed(self.q(x).unflatten(-1, (heads, groups, rank))) * self.q_norm
        k = _normed(self.k(x).unflatten(-1, (heads, rank))) * self.k_norm
        own = torch.einsum("bthgr,bthr->bthg", q, k) / rank**0.5 + self.bias
        rest = torch.einsum("bthgr,hsr->bthgs", q, self.others) / rank**0.5
        score: Tensor = (own - rest.logsumexp(-1)).sigmoid().mean(-1)
        return score.transpose(1, 2)


def _normed(x: Tensor) -> Tensor:
    """Vectors of root mean square 1."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class SinkGates(Predictors):
    """The gates of a model by layer.

    Args:
        dim: D.
        kv_heads: Hkv of each layer that has one.
        groups: query heads of a key/value head, as many scores are averaged.
        rank: r.
        others: S.
        about: how they were trained, plain values.
    """

    files, what, user, plus = "sink_gates", "gates", "fastkvzip", False
    how = "python -m manyheads.recipes.fastkvzip --model MODEL --out FOLDER"

    def __init__(
        self, dim: int, kv_heads: Mapping[int, int], groups: int = 1, rank: int = 16, others: int = 16,
        about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kv_heads, {"dim": dim, "groups": groups, "rank": rank, "others": others}, about)

    def make(self, heads: int, **more: Any) -> nn.Module:
        c = self.config
        return _Gate(c["dim"], heads, c["groups"], c["rank"], c["others"])

    def target(self, scores: Tensor) -> Tensor:
        return scores.clamp(0, 1)

    def loss(self, found: Tensor, scores: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy(found.clamp(_LEAST, 1 - _LEAST), self.target(scores))


@dataclass(frozen=True, kw_only=True)
class FastKVzip(Predicted):
    """Tokens by what gates predict of KVzip."""

    @classmethod
    def kind(cls) -> type[SinkGates]:
        return SinkGates

    @functools.cached_property
    def trained(self) -> SinkGates:
        return SinkGates.load(self.modules)
