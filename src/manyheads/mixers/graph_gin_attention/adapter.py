# SPDX-License-Identifier: Apache-2.0
"""Sparse-GIN: a small graph network between attention and feed-forward of a frozen layer, on that attention's graph.

Its cost: attention weights are computed once more, a block of queries at a time, beside the model's fused attention,
T S products of head_dim per head; ``width`` (155) numbers per token and layer are kept beside a cache. Training holds
the graph, ``[B, T, T]`` for each layer. ``bottleneck`` needs none of it.

Decoding goes on from the cache that the prompt was read into, in the same ``use``; beam search, which moves rows of the
cache, an evicting cache and compiled decoding are refused.

Legend: B batch, T new tokens, S tokens that they see, H heads, D width of the model, W width of the adapter.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from ...call import AttentionCall, Site
from ...calls.layer_modules import LayerModules
from ...calls.weights import weights
from ...errors import UserError
from ...strategy import AttentionWatch, MidBlock

__all__ = ["HOW", "Adapter", "Adapters", "Graph", "SparseGin"]

HOW = "python -m manyheads.recipes.graph_gin_attention --model MODEL --out FOLDER"
Graph = Literal["intended", "released", "bottleneck", "random"]
GRAPHS = ("intended", "released", "bottleneck", "random")
_STEEP, _MIDDLE, _CUT = 10.0, 0.1, 0.6


class SparseGin(nn.Module):
    """The adapter of one layer.

    Args:
        dim: D.
        width: W.
        scale: lambda at first.
        dropout: of the network's output, in training.
    """

    def __init__(self, dim: int, width: int, scale: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(dim, width), nn.Linear(width, dim)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.act, self.norm = nn.PReLU(), nn.RMSNorm(dim, eps=1e-5)
        self.eps, self.scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(scale))
        self.dropout = dropout

    def forward(self, own: Tensor, neighbours: Tensor) -> Tensor:
        """What is added ``[B, T, D]``, of the tokens' own ``z [B, T, W]`` and their neighbours' sums likewise."""
        g = self.eps * own + neighbours
        g = self.act(g + self.second(self.act(self.first(g))))
        added: Tensor = self.scale * self.norm(self.out(nn.functional.dropout(g, self.dropout, self.training)))
        return added


class Adapters(LayerModules):
    """The adapters of a model by layer, and how they were trained.

    Args:
        dim: D.
        kv_heads: key/value heads of each layer that has one.
        width: W.
        graph: which tokens are neighbours.
        dropout: in training.
        about: how they were trained, plain values.
    """

    files, what, how, user = "adapters", "adapters", HOW, "graph_gin_attention.adapter"

    def __init__(
        self, dim: int, kv_heads: dict[int, int], width: int = 155, graph: Graph = "intended", dropout: float = 0.1,
        about: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kv_heads, {"dim": dim, "width": width, "graph": graph, "dropout": dropout}, about)
        self.graph: Graph = graph

    @classmethod
    def of(cls, dim: int, sites: Iterable[Site], *, last_scale: float = 0.5, **settings: Any) -> Self:
        """New adapters, lambda from 0 to ``last_scale`` over depth; see :meth:`LayerModules.of`."""
        made = super().of(dim, sites, **settings)
        with torch.no_grad():
            for place, layer in enumerate(made.kv_heads):
                made.gin(layer).scale.fill_(last_scale * place / max(1, len(made.kv_heads) - 1))
        return made

    def make(self, heads: int, **more: Any) -> SparseGin:
        return SparseGin(self.config["dim"], self.config["width"], dropout=self.config["dropout"])

    def gin(self, layer: int) -> SparseGin:
        """The adapter of a layer, the very module that is trained."""
        found = self.layer(layer)
        assert isinstance(found, SparseGin)
        return found

    def used(self, layer: int, like: Tensor) -> SparseGin:
        """The same while it is trained, else a copy where ``like`` is."""
        found = self.gin(layer)
        return found if found.scale.requires_grad else self.placed(layer, like)

    def scales(self) -> dict[int, float]:
        """Lambda by layer."""
        return {layer: float(self.gin(layer).scale.detach()) for layer in self.kv_heads}


@dataclass(frozen=True, kw_only=True)
class Adapter(AttentionWatch, MidBlock):
    """Adds what trained adapters give.

    Attributes:
        adapters: folder of the adapters, as :meth:`Adapters.save` wrote it.
        direction: ``intended``, ``released``, ``bottleneck`` or ``random``; what they were trained with when empty.
        live: the adapters themselves, from Python, as in training.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    adapters: str = field(default="", metadata={"help": f"folder of trained adapters; {HOW} makes one"})
    direction: Literal["", "intended", "released", "bottleneck", "random"] = field(
        default="", metadata={"help": "intended, released, bottleneck or random; as trained when not given"}
    )
    live: Adapters | None = field(default=None, compare=False, metadata={"help": "adapters, made from Python only"})

    def __post_init__(self) -> None:
        if not self.adapters and self.live is None:
            raise UserError(f"graph_gin_attention.adapter needs adapters=FOLDER, trained on the model: {HOW}")
        if self.direction not in ("", *GRAPHS):
            raise UserError(f"graph_gin_attention.adapter: direction is {', '.join(GRAPHS)}, not {self.direction!r}")

    @functools.cached_property
    def trained(self) -> Adapters:
        """The adapters."""
        return self.live if self.live is not None else Adapters.load(self.adapters)

    @property
    def graph(self) -> Graph:
        """Which tokens are neighbours."""
        return self.direction or self.trained.graph

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal and site.layer in self.trained.kv_heads

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        """Keep the call until the stream that it writes to is there."""
        del out
        if self.graph != "bottleneck":
            call.state["call"] = call.replace(state={})

    def added(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        return self._added(site, hidden, state).to(hidden.dtype)

    def _added(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        assert site.layer is not None
        if hidden.shape[-1] != (dim := self.trained.config["dim"]):
            raise UserError(f"these adapters are for a width of {dim}, and {site.name} has {hidden.shape[-1]}: {HOW}")
        gin = self.trained.used(site.layer, hidden)
        own: Tensor = gin.project(hidden.to(gin.project.weight.dtype))
        if self.graph == "bottleneck":
            return cast(Tensor, gin(own, own))
        call: AttentionCall = state.pop("call")
        past = own if self.graph == "released" else self._seen(call, own, state)
        parts = []
        for start, w in edges(call, self.graph):
            if self.graph == "released":
                cut = slice(start, start + w.shape[1])
                at = torch.arange(cut.start, cut.stop, device=w.device) + w.shape[2] - own.shape[1]
                self_loops = w.gather(2, at[None, :, None].expand(len(w), -1, 1))
                parts.append(self_loops.to(own.dtype) * own[:, cut])
            else:
                parts.append(w.to(own.dtype) @ past)
        return cast(Tensor, gin(own, torch.cat(parts, 1)))

    def _seen(self, call: AttentionCall, own: Tensor, state: dict[str, Any]) -> Tensor:
        """``z [B, S, W]`` of all keys of the call: of those before it as they were kept.

        Raises:
            UserError: they were not, or the cache holds other keys than these.
        """
        step, size, where = call.step, call.k.shape[2] - call.prepended, call.site.name
        if isinstance(step, Tensor):
            raise UserError("graph_gin_attention.adapter keeps a state that grows: decode without compiling")
        if step:
            kept, of = state.get("z"), state.get("past")
            if kept is None or of is None or of() is not call.past or kept.shape[1] < step or len(kept) != len(own):
                raise UserError(f"the cache at {where} was not read with this adapter: read the prompt in the same use")
            self._check_rows(call, state)
            own = torch.cat([kept[:, :step].to(own.dtype), own], 1)
        if call.past is not None:
            state["z"], state["past"], state["last"] = own.detach(), weakref.ref(call.past), call.k[:, 0, -1].clone()
        if size == own.shape[1]:
            return own
        if call.cache is None and call.site.window is not None and size < own.shape[1]:
            return own[:, own.shape[1] - size :]
        raise UserError(f"the cache at {where} has dropped tokens, whose graph graph_gin_attention.adapter needs whole")

    def _check_rows(self, call: AttentionCall, state: dict[str, Any]) -> None:
        """Refuse a cache whose rows have moved; looked at in the last layer, whose keys depend on the whole text."""
        last = max(layer for layer in self.trained.kv_heads if self.layers is None or layer in self.layers)
        if len(call.k) > 1 and call.site.layer == last:
            before = call.k[:, 0, -call.q.shape[2] - 1]
            if not torch.equal(before, state["last"]):
                raise UserError(
                    "the rows of the cache have moved (beam search), and graph_gin_attention.adapter cannot follow: "
                    "decode greedily or by sampling"
                )


def edges(call: AttentionCall, graph: Graph = "intended") -> Iterator[tuple[int, Tensor]]:
    """Rows of the graph ``[B, t, S]``, a block of queries at a time, with the number of the first; no gradients."""
    for start, rows in weights(call):
        rows = rows[..., call.prepended :]
        w = torch.sigmoid(_STEEP * (rows.sum(1).clamp(max=1.0) - _MIDDLE))
        w = torch.where(w > _CUT, w, 0.0)
        yield start, shuffled(w, rows.sum(1) > 0, start + rows.shape[3] - call.q.shape[2]) if graph == "random" else w


def shuffled(w: Tensor, visible: Tensor, first: int) -> Tensor:
    """Each row's weights at other keys that it sees, ``[B, t, S]``; drawn by row and column, alike in every call."""
    row = torch.arange(first, first + w.shape[1], device=w.device, dtype=torch.float64)[:, None]
    column = torch.arange(w.shape[2], device=w.device, dtype=torch.float64)
    draws = (torch.sin(12.9898 * row + 78.233 * column) * 43758.5453).remainder(1.0)
    order = draws.expand_as(w).masked_fill(~visible, 2.0).argsort(-1)  # keys that are seen come first
    return torch.zeros_like(w).scatter(-1, order, w.sort(-1, descending=True).values)
