# SPDX-License-Identifier: Apache-2.0
"""Which way to share attention among processes is the fastest for a mask?

Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism (arXiv 2510.17896).

The benchmark runs five ways to share attention (Ulysses, ring, all-gather, USP, LoongTrain), each over four masks, and
finds that none is the best everywhere: hybrids as a rule, rings only where no texts are apart, Ulysses up to the number
of heads. So the strategy here is a choice: it counts for each way what processes would compute and send, and takes the
one whose slowest process is modelled to be done first on a cluster (see :mod:`manyheads.parallel._cost`). The choice is
modelled, the attention exact. ``manyheads parallel`` is the benchmark itself, of all fourteen masks.

Where paper and released code differ, masks count: global rows and columns beside a window have the area that runs (the
released lists of slices have 52.6 to 55.1 % of it), and a prefix is strict (keys before it; one released mask has a
column more). Besides, sizes that are fixed in tokens there (windows of 1,024, blocks of 64 to 1,024) are shares of
short sequences here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UserError
from ..parallelism import ContextParallelism
from ._context import ContextParallel, World
from ._cost import CLUSTERS, predict
from ._counts import Shape, count
from ._layouts import Layout, layout
from ._masks import AttnMask
from ._methods import METHODS, method

__all__ = ["LongcaBench"]


@dataclass(frozen=True, kw_only=True)
class LongcaBench(ContextParallelism):
    """The way to share a mask that is modelled to be the fastest.

    Attributes:
        method: one of ``ulysses``, ``ring``, ``all_gather``, ``usp``, ``loongtrain``, ``double_ring``, ``group_cast``
            and ``group_cast_2d``; ``auto`` for the fastest.
        heads, kv_heads, width, itemsize: of the tensors to come, from which times are modelled: heads of queries and of
            keys, channels, bytes of a number.
        cluster: ``h100`` or ``a100``.
        node: processes of a machine; the cluster's where 0.
        backward: whether gradients are asked for.
    """

    method: str = field(default="auto", metadata={"help": f"auto for the fastest, or {', '.join(METHODS)}"})
    heads: int = field(default=32, metadata={"help": "of queries, for which times are modelled"})
    kv_heads: int = field(default=8, metadata={"help": "of keys"})
    width: int = field(default=128, metadata={"help": "channels of a head"})
    itemsize: int = field(default=2, metadata={"help": "bytes of a number"})
    cluster: str = field(default="h100", metadata={"help": "for which times are modelled: h100 or a100"})
    node: int = field(default=0, metadata={"help": "processes of a machine; 0: the cluster's"})
    backward: bool = field(default=True, metadata={"help": "whether gradients are asked for"})

    def __post_init__(self) -> None:
        """Refuse names that are none."""
        if self.cluster not in CLUSTERS:
            raise UserError(f"there is no cluster {self.cluster!r}; there are {', '.join(CLUSTERS)}")
        if self.method != "auto":
            method(self.method)

    def ranked(self, mask: AttnMask, ranks: int) -> list[tuple[str, float, Layout]]:
        """Methods that can share ``mask`` among so many processes: name, modelled seconds, layout; fastest first.

        Raises:
            UserError: none can.
        """
        shape = Shape(self.heads, self.kv_heads, self.width, itemsize=self.itemsize)
        place, layouts, found = CLUSTERS[self.cluster], dict[str, Layout](), []
        reason = ""
        for name in METHODS if self.method == "auto" else (self.method,):
            given = method(name).given(ranks, self.node or place.node, self.kv_heads)
            how = given.pop("layout")
            if how not in layouts:
                layouts[how] = layout(how, mask, ranks)
            try:
                counts = count(mask, ranks, layouts[how], shape, **given)
            except UserError as error:
                reason = str(error)
                continue
            found.append((name, predict(counts, place).slowest(self.backward), layouts[how]))
        if not found:
            raise UserError(reason)
        return sorted(found, key=lambda one: one[1])

    def share(self, world: World, mask: AttnMask, layout: Layout | None = None) -> ContextParallel:
        """Attention of ``mask`` by the first of :meth:`ranked`."""
        name, _, who = self.ranked(mask, world.size)[0]
        given = method(name).given(world.size, self.node or CLUSTERS[self.cluster].node, self.kv_heads)
        return ContextParallel(world, mask, **(given | {"layout": layout or who}))
