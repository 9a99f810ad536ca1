# SPDX-License-Identifier: Apache-2.0
"""Softmax attention whose projections are shared by the layers of a model, in four ways, or of low rank.

    dictionary  W_l = sum_s c_ls D_s: every layer a sum of S shared matrices. MASA, Share Your Attention: Transformer
                Weight Sharing via Matrix-based Dictionary Learning (arXiv 2508.04581)
    sequential  layers in a row have one matrix: l has number l S // L of S (MobileLLM, arXiv 2402.14905)
    repeat      the first S layers' again and again: l has number l mod S ("repeat all over", likewise)
    low_rank    no sharing: W_l = A_l B_l, of the rank with as many parameters
    none        no sharing; with ``kv_heads`` grouped queries (arXiv 2305.13245)

Each projection has S matrices of its own, ``keep`` of the L layers. In training the numbers c_l come from a vector of
the layer through three linear layers (GELU between them), which are of no use afterwards: the numbers are all that is
kept, and are what counts as parameters. What sums to the weight of a layer is one matrix product, so that a trained
model is also an ordinary one.

Silent in the text that we had and chosen here: the size of these vectors, and that what they give is added to numbers
drawn at random, of length 1 for each layer, so that its weights begin with the spread that they have without sharing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._positions import PositionedMixer, Positions

__all__ = ["SharedProjection", "WeightSharing"]

Share = Literal["dictionary", "sequential", "repeat", "low_rank", "none"]
_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_STD, _LAYER_VECTOR = 0.02, 16  # of weights; channels of a layer's vector


class _Linear(nn.Linear):
    """A linear layer whose start is its owner's matter, not the model's."""

    skip_init: ClassVar = True


class _Coefficients(nn.Module):
    """The numbers ``[L, S]`` of all layers: of length 1 each at first, and what is learned from a vector of each."""

    start: Tensor

    def __init__(self, layers: int, atoms: int) -> None:
        super().__init__()
        self.register_buffer("start", nn.functional.normalize(torch.randn(layers, atoms), dim=1))
        self.vectors = nn.Parameter(torch.randn(layers, _LAYER_VECTOR))
        maps = [_Linear(_LAYER_VECTOR, n) for n in (_LAYER_VECTOR, _LAYER_VECTOR, atoms)]
        nn.init.normal_(maps[-1].weight, std=_STD)
        nn.init.zeros_(maps[-1].bias)
        self.maps = nn.ModuleList(maps)
        self.active_share = layers * atoms / sum(p.numel() for p in self.parameters())  # the numbers are what is kept

    def forward(self) -> Tensor:
        x = self.vectors
        for i, part in enumerate(self.maps):
            x = part(nn.functional.gelu(x) if i else x)
        return self.start + x


class _Dictionary(nn.Module):
    """Shared matrices ``[S, out, in]`` and what each layer takes of them."""

    def __init__(self, share: Share, layers: int, shape: tuple[int, int, int], std: float) -> None:
        super().__init__()
        count = shape[0]
        self.atoms = nn.Parameter(std * torch.randn(shape))
        self.places = [i * count // layers if share == "sequential" else i % count for i in range(layers)]
        self.coefficients = _Coefficients(layers, count) if share == "dictionary" else None

    def weight(self, layer: int) -> Tensor:
        if self.coefficients is None:
            return self.atoms[self.places[layer]]
        found: Tensor = torch.tensordot(self.coefficients()[layer], self.atoms, 1)
        return found


class SharedProjection(nn.Module):
    """A linear layer without a bias that is one of those of a dictionary; its own until it takes another's."""

    def __init__(self, dictionary: _Dictionary, layer: int) -> None:
        super().__init__()
        self.own: _Dictionary | None = dictionary
        self.layer = layer

    def take(self, other: SharedProjection) -> None:
        """Have the weights of the other's dictionary, which stays the other's."""
        self.own, self._others = None, (other.own,)  # a tuple: no module that is counted and saved twice

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` of this layer."""
        return cast(_Dictionary, self.own or self._others[0]).weight(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class _SharingMixer(PositionedMixer):
    """Softmax attention, the first of a model's layers to be given the others."""

    def tie(self, others: Sequence[nn.Module]) -> None:
        """Have mixers of other layers use this one's dictionaries."""
        for name in _NAMES.values():
            own = getattr(self, name)
            for other in others if isinstance(own, SharedProjection) else ():
                getattr(other, name).take(own)


def _low_rank(out: int, inside: int, rank: int, std: float) -> nn.Module:
    """Two linear layers whose product has entries of spread ``std``."""
    down, up = _Linear(inside, rank, bias=False), _Linear(rank, out, bias=False)
    nn.init.normal_(down.weight, std=inside**-0.5)
    nn.init.normal_(up.weight, std=std * math.sqrt(inside / rank))
    return nn.Sequential(down, up)


@dataclass(frozen=True, kw_only=True)
class WeightSharing(Mixer):
    """Softmax attention with rotary positions and shared projections, see the head of this file."""

    directions: ClassVar = ("causal", "bidirectional")

    share: Share = field(
        default="dictionary", metadata={"help": "dictionary (MASA), sequential, repeat, low_rank or none"}
    )
    keep: float = field(default=1 / 3, metadata={"help": "share of the parameters of these projections that stays"})
    parts: str = field(default="qkvo", metadata={"help": "projections that are shared, of q, k, v and o"})
    kv_heads: int = field(default=0, metadata={"help": "key/value heads; as the model says when 0"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError("weight_sharing: keep is a share, above 0 and at most 1")
        if not self.parts or set(self.parts) - set("qkvo") or len(set(self.parts)) < len(self.parts):
            raise UserError(f"weight_sharing: parts are of q, k, v and o, each once, not {self.parts!r}")

    def build(self, config: MixerConfig) -> nn.Module:
        if self.kv_heads:
            if config.num_heads % self.kv_heads:
                raise UserError(f"weight_sharing: {config.num_heads} heads do not divide into {self.kv_heads} groups")
            config = replace(config, num_kv_heads=self.kv_heads)
        mixer = _SharingMixer(config, Positions())
        layers, count = config.num_layers, max(1, round(self.keep * config.num_layers))
        for part in self.parts if self.share != "none" else "":
            out, inside = getattr(mixer, _NAMES[part]).weight.shape
            std = _STD / math.sqrt(2 * layers) if part == "o" else _STD
            if self.share == "low_rank":
                made = _low_rank(out, inside, max(1, int(self.keep * out * inside / (out + inside))), std)
            else:
                made = SharedProjection(_Dictionary(self.share, layers, (count, out, inside), std), config.layer)
            setattr(mixer, _NAMES[part], made)
        return mixer
