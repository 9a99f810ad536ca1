# SPDX-License-Identifier: Apache-2.0
"""Attention by a grid of processes: is it exact, what does it send over which links, and what does checkpointing keep?

``exchange`` runs one layer of attention, forward and backward, on processes of this machine that count as machines of
``node`` processes. ``training`` runs steps of a Llama whose tokens processes share, under three kinds of activation
checkpointing; where there are GPUs it times them. ``modelled`` says what a layer would take on a cluster by the
alpha-beta model of :mod:`manyheads.parallel._cost`; nothing of that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...attention.reference import causal_mask, repeat_kv
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ...parallel import Processes, World, _context, keep_attention, pattern, sum_gradients
from ...parallel._cost import CLUSTERS, all_to_all
from ...parallel.loongtrain import LoongTrain, numbers_sent
from ...spec import parse
from ._held import Held

__all__ = ["TwoDimensional", "layer_time"]

KINDS: dict[str, dict[str, Any] | None] = {"none": None, "full": {}, "kept": {"context_fn": keep_attention}}
_EFFICIENCY = 0.5  # of the peak, that attention reaches; of the model
_START = 300.0  # seconds that processes may take to import what they need, beside other programs


@dataclass(frozen=True, kw_only=True)
class TwoDimensional(Task):
    """One layer for every arm; a model for those of ``trained``. Samples are processes.

    Attributes:
        ranks, node: processes, and how many of them count as a machine.
        lengths: tokens of the layer; twice ``ranks`` divides each.
        heads, kv_heads, head_dim: of the layer.
        trained: arms that train a model.
        trainers: processes that do.
        model: sizes of it, as fields of ``LlamaConfig``.
        tokens: of its sequences.
        rounds: steps that are timed on GPUs, after one that is not.
        cluster, devices, modelled: of the model of costs, with how many tokens; a layer of 32 heads of 128, 8 of keys.
    """

    subject: ClassVar[str] = "processes"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("error", "error of output, log-sum-exp and gradients", what="the largest, RMS over RMS, in float64"),
        Metric("formula", "counted over formula, less 1"),
        Metric("within", "sent within machines", "B/token", what="forward and backward of a layer"),
        Metric("between", "sent between machines", "B/token", what="forward and backward of a layer"),
        Metric("forwards", "attention forward per layer and step", "times"),
        Metric("held", "held for the way back", "B/token/layer"),
        Metric("gradient_gap", "gradients that are not the same bits", what="a share of all"),
        Metric("modelled", "a layer forward and backward, modelled", "ms"),
        Metric("step_time", "a training step", "s", kind="time"),
        Metric("peak", "peak memory", "GiB"),
    )

    ranks: int = 8
    node: int = 4
    lengths: tuple[int, ...] = (128, 192, 256, 384)
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 16
    trained: tuple[str, ...] = ()
    trainers: int = 2
    model: tuple[tuple[str, int], ...] = ()
    tokens: tuple[int, ...] = (64, 128)
    rounds: int = 0
    cluster: str = "a100"
    devices: int = 64
    modelled: tuple[int, ...] = (2**17, 2**18, 2**20)

    def units(self, run: RunContext) -> list[WorkUnit]:
        names = {"exchange": "bytes and errors", "training": "checkpointing", "modelled": "modelled times"}
        return [WorkUnit(self.key, name, 1.0, label) for name, label in names.items()]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        yield from {"exchange": self._exchange, "training": self._training, "modelled": self._modelled}[unit.name](run)

    def _exchange(self, run: RunContext) -> Iterator[Row]:
        sizes = self.heads, self.kv_heads, self.head_dim
        with Processes(self.ranks, node=self.node, limit=_START) as pool:
            for arm in run.arms:
                for length in self.lengths:
                    found = pool.run(exchange, arm.spec, length, sizes, run.seed)
                    for rank, one in enumerate(found):
                        for metric, value in one.items():
                            at = {"of": "sent"} if metric == "formula" else {}
                            yield self.row(metric, arm, value, f"{length}.{rank}", context=f"{length}", at=at)

    def _training(self, run: RunContext) -> Iterator[Row]:
        gpu = run.device.type == "cuda"
        with Processes(self.trainers, "nccl" if gpu else "gloo", limit=_START) as pool:
            for arm in (arm for arm in run.arms if arm.name in self.trained):
                for tokens in self.tokens:
                    given = arm.spec, dict(self.model), tokens, self.rounds if gpu else 0, run.seed
                    for rank, found in enumerate(pool.run(training, *given)):
                        yield from self._rows_of(arm, tokens, rank, found)

    def _rows_of(self, arm: Arm, tokens: int, rank: int, found: dict[str, dict[str, Any]]) -> Iterator[Row]:
        """Rows of one process, of ``found[kind][metric]``."""
        for kind, one in found.items():
            at = {"checkpoint": kind}
            about = {"sample": f"{tokens}.{rank}", "context": f"{tokens}"}
            for metric in ("forwards", "held", "gradient_gap", "peak"):
                if metric in one:
                    yield self.row(metric, arm, one[metric], at=at, **about)
            for turn, seconds in enumerate(one["seconds"]):
                sized = {**at, "tokens": tokens}
                yield self.row("step_time", arm, seconds, f"{tokens}.{rank}.{turn}", at=sized)
        made = dict(self.model)
        width = made["hidden_size"] // made["num_attention_heads"]
        said = made["num_attention_heads"] * (width + 1) * found["kept"]["wide"]
        off = abs((found["kept"]["held"] - found["full"]["held"]) / said - 1)
        yield self.row("formula", arm, off, f"{tokens}.{rank}", context=f"{tokens}", at={"of": "kept"})

    def _modelled(self, run: RunContext) -> Iterator[Row]:
        heads = 1
        while heads <= 32:
            for tokens in self.modelled:
                for window in sorted({self.devices // heads, max(1, CLUSTERS[self.cluster].node // heads)}):
                    made = 1e3 * layer_time(self.cluster, self.devices, tokens, heads, window)
                    at = {"tokens": tokens, "shared_heads": heads, "window": window}
                    yield self.row("modelled", run.baseline, made, f"{tokens}.{heads}.{window}", at=at)
            heads *= 2


def layer_time(
    cluster: str, devices: int, tokens: int, heads: int, window: int, q_heads: int = 32, kv_heads: int = 8,
    width: int = 128, item: int = 2,
) -> float:  # fmt: skip
    """Seconds of a layer's causal attention, forward and backward, modelled; heads are shared by neighbours.

    A step of a ring takes as long as its computation or the transfer of its block, whichever is longer; backward
    computes 2.5 times as much and sends blocks and their gradients. An inner ring that fits into a machine uses its
    links, and its first block's way to the next window goes on meanwhile.
    """
    given, contexts = CLUSTERS[cluster], devices // heads
    kv = max(kv_heads, heads)
    block = tokens / contexts * kv / heads * 2 * width * item
    step = 4 * (tokens / contexts) ** 2 / 2 * (q_heads / heads) * width / (_EFFICIENCY * given.flops)
    inner, outer, windows = given.link(heads * window), given.between, contexts // window
    total = 0.0
    for work, times in ((1.0, 1), (2.5, 2)):  # forward; backward, with gradients
        ring = (window - 1) * max(work * step, inner.time(times * block)) + work * step
        total += (windows - 1) * max(ring, outer.time(times * block)) + ring
        sent = tokens / devices * width * (2 * q_heads + 2 * kv) * item
        total += all_to_all(given.link(heads), heads, sent) if heads > 1 else 0.0
    return total


def exchange(world: World, spec: str, length: int, sizes: tuple[int, int, int], seed: int) -> dict[str, float]:
    """One layer in a process: its error, its bytes a token, and how far those of the forward are from the formula."""
    strategy = cast("LoongTrain", parse(spec))
    heads, kv_heads, width = sizes
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, h, length, width, generator=generator, dtype=torch.float64)
             for h in (heads, kv_heads, kv_heads, heads)]  # fmt: skip
    shared = strategy.share(world, pattern("causal", length))
    dout = shared.shard(drawn[3], 2)
    q, k, v = inputs = [shared.shard(x, 2).requires_grad_() for x in drawn[:3]]
    world.ledger.clear()
    out, lse = shared.attend(q, k, v)
    forward = {name: world.ledger.bytes(name) for name in ("all-to-all", "ring", "ring between windows")}
    grads = torch.autograd.grad((out * dout).sum() + lse.sum(), inputs)
    counted = [world.ledger.bytes(between=between) / length for between in (False, True)]
    whole = [x.requires_grad_() for x in drawn[:3]]
    wants = _dense(*whole)
    wants += torch.autograd.grad((wants[0] * drawn[3]).sum() + wants[1].sum(), whole)
    error = max(_rms(x - shared.shard(y, 2)) / _rms(y) for x, y in zip((out, lse, *grads), wants, strict=True))
    said = numbers_sent(length, world.size, strategy.heads, heads, kv_heads, width, strategy.window)
    formula = max(abs(forward[name] - 8 * n) / max(8 * n, 1) for name, n in said.items())
    return {"error": error, "formula": formula, "within": counted[0], "between": counted[1]}


def _rms(x: Tensor) -> float:
    return float(x.detach().pow(2).mean().sqrt())


def _dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Causal attention by the formula: output and log-sum-exp."""
    scores = q @ repeat_kv(k, q.shape[1]).mT * q.shape[3] ** -0.5
    scores = scores.masked_fill(~causal_mask(q.shape[2], q.shape[2], q.device), -torch.inf)
    return scores.softmax(-1) @ repeat_kv(v, q.shape[1]), scores.logsumexp(-1)


def training(world: World, spec: str, sizes: dict[str, Any], tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Steps of a model in a process, under each kind of checkpointing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    gpu = rounds > 0
    device = torch.device("cuda", world.rank) if gpu else torch.device("cpu")
    ids = torch.randint(sizes["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(seed)).to(device)
    found: dict[str, Any] = {}
    first: Tensor | None = None
    for kind, more in KINDS.items():
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes, max_position_embeddings=tokens, tie_word_embeddings=True, use_cache=False)
        model: Any = LlamaForCausalLM(config)
        model = model.to(device, torch.bfloat16 if gpu else torch.float64).train()
        if more is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False, **more})
        seconds: list[float] = []
        with use(model, spec, mesh=world):
            one = _measured(model, ids, world, sizes["num_hidden_layers"])
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(rounds):
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                _step(model, ids, world)
                torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
        grads = one.pop("grads")
        first = grads if first is None else first
        gap = float((grads != first).double().mean())
        found[kind] = {**one, "seconds": seconds, "gradient_gap": gap, "wide": 4 if gpu else 8}
        if gpu:
            found[kind]["peak"] = torch.cuda.max_memory_allocated(device) / 2**30
        del model
    return found


def _step(model: Any, ids: Tensor, world: World) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    sum_gradients(model, world)
    model.zero_grad(set_to_none=True)


def _measured(model: Any, ids: Tensor, world: World, layers: int) -> dict[str, Any]:
    """A step that is not timed: what is held after the forward, calls of attention over those of a forward, gradients.

    It counts calls where processes' attention asks for them.
    """
    calls, real = [0], vars(_context)["attend"]

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return real(*args)

    vars(_context)["attend"] = counted
    try:
        with Held(*model.parameters()) as held:
            loss = model(input_ids=ids, labels=ids).loss
        forward, left = calls[0], held.nbytes
        loss.backward()
    finally:
        vars(_context)["attend"] = real
    sum_gradients(model, world)
    grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).cpu()
    model.zero_grad(set_to_none=True)
    mine = ids.shape[1] / world.size
    return {"held": left / mine / layers, "forwards": calls[0] / forward, "grads": grads}
