# SPDX-License-Identifier: Apache-2.0
"""What processes that share experts send and hold, and how exact their sums of gradients are, counted on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...parallel import MoeConfig, Processes
from ...parallel._compressed import decode, encode, ring_sum
from ...parallel._cost import CLUSTERS
from ...parallel._experts_cost import dispatch_rows, dispatch_time
from . import _moe_runs as runs

__all__ = ["Experts"]

_SKEW = 0.25  # standard deviation of the logarithm of how much experts are asked for, where choices are skewed
_ROW, _FEW = 4, 16  # bytes of a number; tokens of a process where no choice is counted
_MIXTRAL = MoeConfig(dim=128, heads=32, kv_heads=8, experts=8, top_k=2, inner=448)


@dataclass(frozen=True, kw_only=True)
class Experts(Task):
    """Processes are started once and count all of it. Samples are draws: of choices, of weights, of gradients.

    An arm says what it is by its strategy's ``dispatch``, or by one of its options: ``attention`` (``heads`` or
    ``split``), ``held`` (of a block), ``sum`` (a format; with ``ring`` it rounds at every hop).

    Attributes:
        ranks: processes.
        draws: of everything.
        tokens: of a process where bytes of a dispatch are counted.
        dim: numbers of a token there.
        cases: experts and how many a token chooses.
        config: of the block; Mixtral's ratios.
        numbers: in a sum of gradients, and how many processes add them.
        added: numbers of processes whose sums are compared; those are computed in one.
    """

    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("sent", "rows of the busiest process for each token, both ways of a layer", "rows",
               what="all bytes that it sends, or gets if that is more, over those of its tokens"),
        Metric("unexpected", "rows sent, off the formula"),
        Metric("modelled", "both ways of a layer on 8 H100, modelled, us", "us"),
        Metric("attention_sent", "rows that attention sends for each of all tokens, forward", "rows"),
        Metric("held", "rows that a block holds for each token", "rows"),
        Metric("sum_sent", "bytes sent for each number of a sum that others need", "bytes"),
        Metric("sum_error", "relative error of a sum of gradients"),
    )  # fmt: skip

    ranks: int = 8
    draws: int = 6
    tokens: int = 256
    dim: int = 256
    cases: tuple[tuple[int, int], ...] = ((8, 2), (8, 6), (8, 7), (8, 8), (64, 2), (64, 8))
    config: MoeConfig = _MIXTRAL
    numbers: int = 1 << 16
    added: tuple[int, ...] = (8, 16, 32, 64)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "all", 1.0, "experts that processes share")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        with Processes(self.ranks, limit=300.0) as pool:
            for arm in run.arms:
                if arm.spec:
                    yield from self._dispatch(run, pool, arm)
                if "attention" in arm.options:
                    sent = pool.run(runs.attention_sent, arm.options["attention"], self.config, _FEW)
                    whole = _FEW * self.ranks * self.config.dim * _ROW
                    yield from self.each("attention_sent", arm, [size / whole for size in sent])
                if "held" in arm.options:
                    for draw in range(2):  # all draws give the same sums
                        held = pool.run(runs.block_held, arm.options["held"], self.config, _FEW, draw)
                        per_token = sum(held) / (_FEW * self.ranks * self.config.dim * _ROW)
                        yield self.row("held", arm, per_token, f"{draw}")
                if "sum" in arm.options and "ring" not in arm.options:
                    sent = pool.run(runs.sum_sent, arm.options["sum"], 1024)
                    yield from self.each("sum_sent", arm, [size / (1024 * (self.ranks - 1)) for size in sent])
        for arm in run.arms:
            if "sum" in arm.options:
                yield from self._errors(run, arm)

    def _dispatch(self, run: RunContext, pool: Processes, arm: Arm) -> Iterator[Row]:
        way: Any = arm.strategy.dispatch  # type: ignore[attr-defined]
        for experts, top_k in self.cases:
            at = {"experts": experts, "top_k": top_k}
            cluster = CLUSTERS["h100"]
            seconds = dispatch_time(way, experts, top_k, 8, tokens=4096, row=8192, cluster=cluster)
            yield self.row("modelled", arm, 1e6 * seconds, "0", at=at)
            for choice in ("even", "skewed"):
                chosen = [self._chosen(run, experts, top_k, choice, draw) for draw in range(self.draws)]
                found = pool.run(runs.dispatch_sent, way, experts, torch.stack(chosen), self.dim)
                for draw, every in enumerate(zip(*found, strict=True)):
                    yield self.row("sent", arm, self._busiest(every), f"{draw}", at={**at, "choice": choice})
                    rows = sum(size for sent in every for (name, _), size in sent.items() if name == "tokens")
                    rows /= self.ranks * self.tokens * self.dim * _ROW
                    off = abs(rows / dispatch_rows(way, experts, top_k, self.ranks) - 1)
                    if choice == "even":
                        yield self.row("unexpected", arm, off, f"{draw}", at=at)

    def _busiest(self, every: Sequence[Mapping[tuple[str, int], int]]) -> float:
        """What the process that sends or gets most does so of, in rows for each of its tokens."""
        gone, come = [sum(sent.values()) for sent in every], Counter[int]()
        for sent in every:
            for (_, to), size in sent.items():
                come[to] += size
        return max(*gone, *come.values()) / (self.tokens * self.dim * _ROW)

    def _chosen(self, run: RunContext, experts: int, top_k: int, choice: str, draw: int) -> torch.Tensor:
        """Experts of the tokens of all processes, ``[n, T, k]``: each once, alike or some more than others."""
        draws = run.torch_rng(experts=experts, top_k=top_k, choice=choice, draw=draw)
        asked = torch.randn(experts, generator=draws) * (_SKEW if choice == "skewed" else 0.0)
        chance = torch.rand(self.ranks, self.tokens, experts, generator=draws)
        return (asked - (-chance.log()).log()).topk(top_k).indices

    def _errors(self, run: RunContext, arm: Arm) -> Iterator[Row]:
        """Sums of gradients whose sizes differ as those of a model's parameters do: by a factor e, drawn for each."""
        kind = arm.options["sum"]
        for count in self.added:
            for draw in range(self.draws):
                draws = run.torch_rng(added=count, draw=draw)
                sizes = torch.randn(self.numbers, generator=draws).exp()
                parts = torch.randn(count, self.numbers, generator=draws) * sizes
                exact = parts.double().sum(0)
                got = ring_sum(list(parts), kind) if "ring" in arm.options else decode(encode(parts, kind)).sum(0)
                off = float((got.double() - exact).norm() / exact.norm())
                yield self.row("sum_error", arm, off, f"{draw}", at={"processes": count})
