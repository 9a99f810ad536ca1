# SPDX-License-Identifier: Apache-2.0
"""MegaScale-MoE: Large-Scale Communication-Efficient Training of Mixture-of-Experts Models in Production (2505.11432).

    with manyheads.use(model, "megascale_moe", mesh=mesh):   # a MixtralForCausalLM, as it is
        model(input_ids=ids, labels=ids).loss.backward()
    sum_gradients(model)

Attention is shared by heads, so that its weights are whole in every process and a token's width is sent a few times
instead of all tokens to all; the feed-forward layers are shared by experts. Of n processes, with m query heads for each
head of keys and values, a process sends forward, in rows of all tokens:

    attention by split weights   2 (n - 1) / n                    all-gather, reduce-scatter
    attention by heads           (2 + 2 / m) (n - 1) / n^2        all-to-all of queries, keys, values, outputs

which is (1 + 1/m) / n of it (notes on the paper print twice that; bytes that are counted here say this one). How tokens
come to experts is chosen by the cost model, see :mod:`manyheads.parallel._experts_cost`.

The other parts of the paper stand by themselves: :class:`manyheads.parallel.MoeBlock` holds few activations and
computes the others again, :class:`manyheads.parallel.CompressedReduceScatter` sums gradients in few bits and is a hook
of DistributedDataParallel. Of overlap there is this: tokens leave before what does not need them (``meanwhile`` of
:class:`manyheads.parallel.ExpertParallel`, the projections of ``MoeBlock``), and gradients likewise. What is missing:
an order of a whole layer's operators on several streams, kernels that compute on tiles while others travel, and
pipelines between machines.

While a strategy is in use on a model of transformers, the weights of all experts stay in every process, and each uses
its own: gradients of the others are 0 there, so that one rule holds for all parameters: add them over the processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..parallelism import ContextParallelism, ExpertParallelism
from ._context import ContextParallel
from ._cost import CLUSTERS
from ._experts import DISPATCHES, ExpertParallel
from ._experts_cost import choose_dispatch

if TYPE_CHECKING:
    from . import AttnMask, Layout, World

__all__ = ["MegascaleMoe"]


@dataclass(frozen=True, kw_only=True)
class MegascaleMoe(ContextParallelism, ExpertParallelism):
    """Attention shared by heads, experts by processes.

    Attributes:
        dispatch: how tokens come to experts; ``auto`` is what :func:`manyheads.parallel.choose_dispatch` has as the
            quickest.
        sums: what sums of experts' outputs are sent as, with ``dispatch=all_gather``: ``exact`` in the model's own
            dtype by a reduce-scatter; ``bfloat16`` or ``float8`` rounded once and added in float32, and so gradients.
        heads: processes that share heads; all when 0. As many as divide the heads; the others share context.
        cluster: of the cost model.
        imbalance: rows of the busiest process over the mean, for the cost model.
    """

    dispatch: Literal["auto", "all_to_all", "dedupe", "all_gather"] = field(
        default="auto", metadata={"help": "how tokens come to experts; auto: the quickest by the cost model"}
    )
    sums: Literal["exact", "bfloat16", "float8"] = field(
        default="exact", metadata={"help": "what sums of outputs are sent as, with dispatch=all_gather"}
    )
    heads: int = field(default=0, metadata={"help": "processes that share heads, the others context; 0: all"})
    cluster: str = field(default="h100", metadata={"help": "links of the cost model: h100 or a100"})
    imbalance: float = field(default=1.0, metadata={"help": "rows of the busiest process over the mean, likewise"})

    def __post_init__(self) -> None:
        """Refuse what no layer could have."""
        if self.dispatch not in ("auto", *DISPATCHES) or self.cluster not in CLUSTERS:
            raise UserError(f"dispatch is auto, {', '.join(DISPATCHES)} and cluster {' or '.join(CLUSTERS)}, not "
                            f"{self.dispatch}, {self.cluster}")  # fmt: skip
        if self.sums not in ("exact", "bfloat16", "float8") or (self.sums != "exact" and self.dispatch != "all_gather"):
            raise UserError(f"sums is exact, or bfloat16 or float8 with dispatch=all_gather, not {self.sums} with "
                            f"{self.dispatch}")  # fmt: skip
        if self.heads < 0 or self.imbalance < 1:
            raise UserError(f"heads is 0 or more and imbalance 1 or more, not {self.heads}, {self.imbalance:g}")

    def share(self, world: World, mask: AttnMask, layout: Layout | None = None) -> ContextParallel:
        return ContextParallel(world, mask, layout or "contiguous", "group_cast", self.heads or world.size)

    def share_experts(self, world: World, experts: int, top_k: int, row: int) -> ExpertParallel:
        given, more = (experts, top_k, world.size, self.cluster), {"row": row, "imbalance": self.imbalance}
        chosen = choose_dispatch(*given, **more) if self.dispatch == "auto" else self.dispatch  # type: ignore[arg-type]
        return ExpertParallel(world, experts, top_k, chosen, None if self.sums == "exact" else self.sums)
