# SPDX-License-Identifier: Apache-2.0
"""How long a prompt takes that hosts share by anchors and passing, on one GPU or on several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...costs.clock import Clock
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...parallel import Processes, _cost
from ...parallel.apb import APB, Blocks
from ._host import llama, one_host, together

__all__ = ["PrefillTime"]

_BYTES, _WIDE = 2, 4  # of a number of bfloat16, and of float32
_LINK = _cost.CLUSTERS["h100"].within
_WARM = 2


@dataclass(frozen=True, kw_only=True)
class PrefillTime(Task):
    """Layers of Llama-3-8B's shape with random weights; an arm without a strategy is one process.

    By one GPU: the shares of the last two hosts are computed alone, the last of which sees most and the other of which
    also chooses what it passes on; the longer time counts. The all-gathers are *modelled*, at NVLink's
    published rate, and added. A ring (option ``ring``) is *modelled* as an even share of the time of one process, with
    all its messages hidden. By several GPUs: as it is, by NCCL, beside each GPU alone; rings are left out.

    Attributes:
        gpus: that do it.
        timed: tokens of the prompts.
        layers: of the model.
        rounds: repetitions.
        label: name in rows.
    """

    alone: ClassVar[bool] = True
    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("prefill", "prefill, s", "s", kind="time"),)

    gpus: int = 1
    timed: tuple[int, ...] = (32_768, 65_536, 131_072)
    layers: int = 4
    rounds: int = 6
    label: str = ""

    def unsupported_reason(self, run: RunContext) -> str | None:
        if run.device.type != "cuda":
            return "prompts that are worth sharing take a GPU"
        there = torch.cuda.device_count()
        return None if there >= self.gpus else f"it takes {self.gpus} GPUs, and here are {there}"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{n} tokens", n / 1e3, f"{n} tokens", {"length": n}) for n in self.timed]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        yield from (self._alone if self.gpus == 1 else self._several)(run, unit.params["length"])
        run.advance(unit.cost)

    def _alone(self, run: RunContext, length: int) -> Iterator[Row]:
        """The whole prompt by one process, and each arm's last hosts, in turns."""
        model, clock = llama(self.layers, run.device, length), Clock(run.device)
        ids = torch.randint(512, (1, length), generator=run.torch_rng(length=length)).to(run.device)
        with torch.inference_mode():
            for turn in range(self.rounds + _WARM):
                whole = clock.seconds(lambda: model(ids, use_cache=False))
                for arm in run.arms:
                    spent, modelled = whole, 0.0
                    if arm.spec:
                        (apb,) = arm.strategies
                        assert isinstance(apb, APB)
                        spent = 0.0
                        for host in (apb.hosts - 2, apb.hosts - 1):
                            with one_host(model, apb, ids, host) as read:
                                spent = max(spent, clock.seconds(read))
                        modelled = self.layers * _moved(apb.blocks(length), model.config)
                    elif arm.options.get("ring"):
                        spent, modelled = 0.0, whole / APB().hosts
                    if turn >= _WARM:
                        at, about = {"length": length}, {"measured": spent, "modelled": modelled}
                        name = f"{length}-{turn - _WARM}"
                        yield self.row("prefill", arm, spent + modelled, name, at=at, about=about)

    def _several(self, run: RunContext, length: int) -> Iterator[Row]:
        with Processes(self.gpus, "nccl", limit=600) as pool:
            for arm in run.arms:
                if not arm.options.get("ring"):
                    times = pool.run(together, arm.spec, self.layers, length, self.rounds)
                    for turn, each in enumerate(zip(*times, strict=True)):
                        yield self.row("prefill", arm, max(each), f"{length}-{turn}", at={"length": length})


def _moved(blocks: Blocks, config: Any) -> float:
    """Seconds, modelled, that a layer's exchanges take."""
    width = config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_key_value_heads * width * _BYTES
    asked, part = config.hidden_size * _BYTES, config.num_attention_heads * (width + 1) * _WIDE
    passing, others = _cost.all_gather(_LINK, blocks.hosts, max(blocks.counts) * kv), blocks.hosts - 1
    return passing + sum(_LINK.time(others * blocks.query * size, others) for size in (asked, part))
