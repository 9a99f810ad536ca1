# SPDX-License-Identifier: Apache-2.0
"""COMCAT: what a head of a vision transformer computes depends on products of its weights; factorise those.

The logits of head i are ``x^T (W_Q^T W_K) x'``, and what it adds to the stream is ``(W_O W_V) x'`` weighed by
attention: of four matrices only two products matter, both of a rank that is at most the head's channels d. Their
truncated SVD of rank r makes every projection of the layer r / d as large; with as many parameters the SVD of a matrix
alone has two thin ones, of half the rank.

Xiao et al., COMCAT: Towards Efficient Compression and Customization of Attention-Based Vision Models (arXiv
2305.17235).

    W~_Q^T W~_K = U S V^T    W'_Q = (U S^1/2)^T, W'_K = S^1/2 V^T, the first r rows        [r, D + 1]
    W_O W~_V    = U S V^T    W'_O = U S^1/2 [D, r], W'_V = S^1/2 V^T

W~ is a weight with its bias beside it, and inputs have a 1 at their end: with biases the product is exact at r = d. The
released code drops the biases of q, k, v and o, which is ``biases=false``. Logits stay over the root of the old d.

Ours: products are whitened by the mean of ``x x^T`` (``whiten``), and ranks of layers follow from the singular values
(``ranks=spectra``: one by one to the layer whose two products lose the largest share without it), in place of the
paper's search by Gumbel softmax in 30 epochs of training, which is not here. A layer has one rank for both products,
so that stock attention computes it; with ``ranks=uniform`` all layers have, and the result is a plain checkpoint.
``mlp`` is the share of the parameters of the feed-forward layers that stays, by a whitened SVD, as the paper has by a
plain one. Its fine-tuning by a teacher is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from ...calls.calibration import Statistic, Statistics, gram, mean
from ...conversion import Anatomy, Conversion, Factorise, HeadDim, Step, SurgeryPlan
from ...errors import UserError
from .._low_rank import factors, product_factors, rank_for, whitener

__all__ = ["COMCAT", "HeadProducts"]

_GRAM, _MEAN = gram("attention"), mean("attention")
_MLP = {"up": gram("mlp"), "down": gram("neurons")}


@dataclass(frozen=True)
class HeadProducts:
    """The factors of a layer's heads, of which the first r rows are the best of rank r.

    Attributes:
        qk: ``[H, d, D + 1]`` twice.
        ov: ``[H, d, D]`` and ``[H, d, D + 1]``.
        lost: ``[d]``, shares of the squares of both products, summed over heads, that are in the r-th singular values.
    """

    qk: tuple[Tensor, Tensor]
    ov: tuple[Tensor, Tensor]
    lost: Tensor

    @classmethod
    def of(cls, model: Anatomy, layer: int, moment: Tensor | None, biases: bool = True) -> HeadProducts:
        """Those of a layer; ``moment [D + 1, D + 1]`` of inputs with a 1 behind them, to whiten by."""
        heads = model.layers[layer].heads

        def with_bias(part: str) -> Tensor:
            weight, bias = model.weight(part, layer).double(), model.bias(part, layer)
            last = weight.new_zeros(len(weight)) if bias is None or not biases else bias.double()
            rows: Tensor = torch.cat([weight, last[:, None]], 1).unflatten(0, (heads, -1))
            return rows

        root = None if moment is None else whitener(moment)
        q, k, qk = product_factors(with_bias("q"), with_bias("k"), root, root)
        out = model.weight("o", layer).double().unflatten(1, (heads, -1)).permute(1, 2, 0)
        o, v, ov = product_factors(out, with_bias("v"), None, root)
        shares = [s.square() / s.square().sum(-1, keepdim=True) for s in (qk, ov)]
        return cls((q, k), (o, v), sum(shares, torch.zeros_like(qk)).sum(0))

    def step(self, model: Anatomy, layer: int, rank: int, biases: bool = True) -> HeadDim:
        """The layer with heads of ``rank`` channels."""
        scale = (rank / self.lost.numel()) ** 0.5  # stock attention divides by the root of the rank, not of d
        parts = {"q": scale * self.qk[0], "k": self.qk[1], "v": self.ov[1]}
        tensors: dict[str, Tensor] = {}
        for part, rows in parts.items():
            flat = rows[:, :rank].flatten(0, 1)
            tensors |= {part: flat[:, :-1], f"{part}.bias": flat[:, -1]}
        tensors["o"] = self.ov[0][:, :rank].flatten(0, 1).mT
        bias = model.bias("o", layer)
        if bias is not None:
            tensors["o.bias"] = bias if biases else torch.zeros_like(bias)
        return HeadDim(layer=layer, dim=rank, tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class COMCAT(Conversion):
    """See the head of this file."""

    families: ClassVar[frozenset[str]] = frozenset({"vit", "dinov2"})  # no positions turn q and k

    keep: float = field(default=0.5, metadata={"help": "share of the parameters of attention that stays"})
    mlp: float = field(default=1.0, metadata={"help": "share of the parameters of feed-forward layers that stays"})
    ranks: str = field(default="spectra", metadata={"help": "of layers: spectra, or uniform (a plain checkpoint)"})
    whiten: bool = field(default=True, metadata={"help": "weigh products by the inputs that calibration saw"})
    biases: bool = field(default=True, metadata={"help": "false: drop those of q, k, v and o, as the released code"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.mlp <= 1:
            raise UserError("keep and mlp are shares, above 0 and at most 1")
        if self.ranks not in ("spectra", "uniform"):
            raise UserError(f"ranks are spectra or uniform, not {self.ranks!r}")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return (*((_GRAM, _MEAN) if self.whiten else ()), *(_MLP.values() if self.mlp < 1 else ()))

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        found = []
        for i in range(len(model.layers)):
            moment = _moment(stats[_GRAM][i], stats[_MEAN][i]) if self.whiten else None
            found.append(HeadProducts.of(model, i, moment, self.biases))
        steps: list[Step] = [
            products.step(model, i, rank, self.biases)
            for i, (products, rank) in enumerate(zip(found, self._ranks(found), strict=True))
        ]
        return SurgeryPlan((*steps, *(self._feed_forward(model, stats) if self.mlp < 1 else ())))

    def _ranks(self, found: Sequence[HeadProducts]) -> list[int]:
        """Of each layer; their sum is ``keep`` of that of the heads' channels."""
        sizes = [len(products.lost) for products in found]
        ranks = [int(self.keep * size) for size in sizes] if self.ranks == "uniform" else [1] * len(found)
        more = int(self.keep * sum(sizes)) - len(ranks)
        if min(ranks) < 1 or more < 0:
            least = ceil(1000 / min(sizes)) / 1000
            raise UserError(f"a head keeps one of its {min(sizes)} channels at least: give keep={least:g} or more")
        if self.ranks == "uniform":
            return ranks
        for _ in range(more):
            most = max((i for i, size in enumerate(sizes) if ranks[i] < size), key=lambda i: found[i].lost[ranks[i]])
            ranks[most] += 1
        return ranks

    def _feed_forward(self, model: Anatomy, stats: Statistics) -> Iterator[Factorise]:
        for layer in range(len(model.layers)):
            for part, inputs in _MLP.items():
                weight = model.weight(part, layer)
                out, inside = weight.shape
                rank = rank_for(self.mlp, out, inside)
                left, right = factors(weight, rank, whitener(stats[inputs][layer].to(weight.device)))
                yield Factorise(part=part, layer=layer, rank=rank, tensors={"left": left, "right": right})


def _moment(gram: Tensor, mean: Tensor) -> Tensor:
    """Of inputs with a 1 behind them."""
    row = torch.cat([mean, mean.new_ones(1)])
    return torch.cat([torch.cat([gram, mean[:, None]], 1), row[None]])
