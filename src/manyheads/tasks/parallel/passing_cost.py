# SPDX-License-Identifier: Apache-2.0
"""What sharing a prompt by anchors and passing moves and computes, beside a ring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...parallel import Processes
from ...parallel.apb import APB, Blocks
from ._host import counted

__all__ = ["PassingCost"]

_SHAPE = (8, 2, 16)  # query heads, key/value heads, channels


@dataclass(frozen=True, kw_only=True)
class PassingCost(Task):
    """An arm without a strategy is causal attention in one process; with the option ``ring``, shared by a ring.

    ``passed`` and ``received`` are counted by processes that do it, in one layer of bfloat16: keys and values, and with
    them what the query's exact attention takes, in the busiest host, the last one. ``pairs`` are queries times keys
    that they see, the anchor's among them, in the busiest host, of those of one process; FLOPs of attention are 4 d H
    times as many.

    Attributes:
        processes: numbers of hosts.
        tokens: of the prompts.
    """

    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("passed", "keys and values received by a host in a layer, bytes", "bytes"),
        Metric("received", "received by the busiest host in a layer, bytes", "bytes"),
        Metric("pairs", "attention of the busiest host, of that of one process"),
    )

    processes: tuple[int, ...] = (4, 8)
    tokens: tuple[int, ...] = (1024, 2048)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{n} hosts", 20.0 * n, f"{n} hosts", {"hosts": n}) for n in self.processes]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arms, hosts = [arm for arm in run.arms if arm != run.baseline], unit.params["hosts"]
        specs = [(arm.key, "ring" if arm.options.get("ring") else arm.spec) for arm in arms]
        with Processes(hosts, limit=600) as pool:
            for length in self.tokens:
                by_sender = pool.run(counted, specs, length, _SHAPE)
                at: dict[str, Any] = {"hosts": hosts, "length": length}
                name = f"{hosts}-{length}"
                for arm in run.arms:
                    for i, metric in enumerate(("passed", "received")):
                        mine = [] if arm == run.baseline else [sender[arm.key][i] for sender in by_sender]
                        most = max((sum(sizes) for sizes in zip(*mine, strict=True)), default=0)
                        yield self.row(metric, arm, most, name, at=at)
                    yield self.row("pairs", arm, _pairs(arm, length, hosts), name, at=at)
        run.advance(unit.cost)


def _pairs(arm: Arm, length: int, hosts: int) -> float:
    """Of the busiest host; a ring is evenly shared."""
    if not arm.spec:
        return 1 / hosts if arm.options.get("ring") else 1.0
    (apb,) = arm.strategies
    assert isinstance(apb, APB)
    blocks = apb.blocks(length, hosts)
    return max(blocks.pairs(host) for host in range(hosts)) / Blocks.causal(length)
