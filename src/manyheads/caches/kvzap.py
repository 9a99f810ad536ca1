# SPDX-License-Identifier: Apache-2.0
"""Keep what a small network in each layer expects that a repetition of the text would attend to.

Jegou and Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", arXiv 2601.07891. KVzip+ knows what serves to
say the text again (``kvzip:plus=true``), at the cost of reading it twice. A network of one hidden layer, trained on
those scores, tells them from the hidden state of the token alone, in the forward that reads it anyway:

    log s_i = W_2 gelu(W_1 x_i + b_1) + b_2        x the input of the layer's attention, a score for each key/value head

so that tokens that are made can be scored, too. Tokens below a ``threshold`` are dropped once ``recent`` later ones
have come (delayed eviction, as DMS); with a ``budget`` instead, the best of the whole model stay. Networks are trained
on the model, which stays as it is, in minutes:

    python -m manyheads.recipes.kvzap --model MODEL --out scores
    with manyheads.use(model, "kvzap:modules=scores,threshold=-6"): ...

As released: a hidden layer of 1/8 of the width (512 of 4,096), the mean squared error of the logarithm, ``recent`` of
128, and a prompt that is read densely. The first ``sinks`` tokens stay (ours). ``hidden=0`` is the linear variant.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention import reference
from ._predicted import Predicted, Predictors

__all__ = ["KVzap", "ScoreNetworks"]

_LEAST = 1e-12  # of a score whose logarithm is taken


class _Network(nn.Module):
    """Scores ``[B, Hkv, T]`` of ``[B, T, D]``."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers: nn.Module = nn.Linear(dim, heads)
        if hidden:
            self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, heads))

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.parameters())
        found: Tensor = self.layers(reference.widened(x).to(weight.dtype))
        return found.transpose(1, 2)


class ScoreNetworks(Predictors):
    """The networks of a model by layer.

    Args:
        dim: D.
        kv_heads: Hkv of each layer that has one.
        hidden: units, 0 for none; D / 8 if negative.
        about: how they were trained, plain values.
    """

    files, what, user, plus = "networks", "networks", "kvzap", True
    how = "python -m manyheads.recipes.kvzap --model MODEL --out FOLDER"

    def __init__(
        self, dim: int, kv_heads: Mapping[int, int], hidden: int = -1, about: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(kv_heads, {"dim": dim, "hidden": max(1, dim // 8) if hidden < 0 else hidden}, about)

    def make(self, heads: int, **more: Any) -> nn.Module:
        return _Network(self.config["dim"], heads, self.config["hidden"])

    def target(self, scores: Tensor) -> Tensor:
        return scores.clamp(min=_LEAST).log()

    def loss(self, found: Tensor, scores: Tensor) -> Tensor:
        return nn.functional.mse_loss(found, self.target(scores))


@dataclass(frozen=True, kw_only=True)
class KVzap(Predicted):
    """Tokens by what networks predict of KVzip+."""

    @classmethod
    def kind(cls) -> type[ScoreNetworks]:
        return ScoreNetworks

    @functools.cached_property
    def trained(self) -> ScoreNetworks:
        return ScoreNetworks.load(self.modules)
