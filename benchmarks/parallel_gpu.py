# SPDX-License-Identifier: Apache-2.0
"""Attention that GPUs share: errors, tokens per second and bytes of each exchange, beside what they are measured by.

    python benchmarks/parallel_gpu.py [--json benchmarks/parallel_gpu.json] [--processes 2] [--seconds 220]
    python benchmarks/parallel_gpu.py --backend gloo --tokens 300 --heads 4 --kv-heads 2 --dim 16 --json /tmp/tiny.json

One row of tokens, 32 query heads and 8 of keys with 128 channels in bfloat16, causal and with causal documents.
``errors`` are relative RMS errors of a short sequence from one process in float64: of each exchange, of the kernels in
one process, and of torch's SDPA with the mask in one process. ``rows`` are speeds: a forward pass, and that with a
backward pass after it, on inputs that are there already; of each turn the slowest process counts, after turns that warm
up. ``bytes`` are those that the process that sends most sends in a turn, ``plan_s`` and ``plan_mib`` what the tiles of
the mask took. ``tflop_s`` are of a GPU: 4 d flop a pair and head forward, 14 d with the backward pass, over the mean
area of a process.

``halves``: each process does its share of the greedy layout with all keys at hand, so nothing is exchanged: the bound.
``torch context_parallel``: torch's own, causal only; ``sdpa``: one GPU, all tokens, no exchange. ``ratios``: tokens per
second of ``group_cast`` with the greedy layout over those of the faster ring, of the same mask and length.

Layouts are made beforehand, on the CPU, while other rows are measured. What has not begun when the seconds are over is
left out and named under ``left_out``; results are written after each row.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decode import commit  # benchmarks/decode.py
from manyheads.environment import environment
from manyheads.parallel import AttnMask, ContextParallel, Layout, Processes, World, layout, pattern
from manyheads.parallel._context import _Attend
from manyheads.parallel._exchanges import Exchange

MASKS = ("document_causal", "causal")
WAYS: dict[str, dict[str, Any]] = {  # in the order in which they are asked for
    "group_cast": {"exchange": "group_cast", "layout": "greedy"},
    "ring": {"exchange": "ring", "layout": "zigzag"},
    "ring, by document": {"exchange": "ring", "layout": "document"},
    "torch context_parallel cudnn": {},
    "halves": {"layout": "greedy"},
    "all_gather": {"exchange": "all_gather", "layout": "greedy"},
    "ulysses": {"exchange": "ring", "layout": "contiguous", "heads": 0},
    "sdpa cudnn": {},
    "sdpa flash": {},
    "torch context_parallel flash": {},
}
ALONE = {"ring, by document": ("causal",), **{way: ("document_causal",) for way, how in WAYS.items() if not how}}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
RATE = 2.5e14  # flop per second that a GPU is expected to do, to see what fits into the seconds
SHORT = 4096  # tokens of the errors
CHECKED = 131072  # tokens up to which torch's context_parallel is compared with its SDPA
LIMIT = 100  # seconds that a row may take before it is taken for stuck
Shape = tuple[int, int, int]  # query heads, key heads, channels


class Alone(Exchange):
    """Rows of one process to keys that are all here."""

    def __init__(self, rows: Tensor, mask: AttnMask) -> None:
        super().__init__(SimpleNamespace(rank=0), (rows,), mask)  # type: ignore[arg-type]
        self.every = torch.arange(mask.size)

    def visit(self, kv: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.every, kv

    def back(self, kv: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return gradient(self.every, kv)


@cache
def masked(name: str, tokens: int) -> AttnMask:
    """One of the masks, drawn once."""
    return pattern(name, tokens, seed=1)


def shared(name: str, tokens: int, how: str, ranks: int) -> list[Any]:
    """Rows of a layout as arrays, which go through a pipe."""
    return [rows.numpy() for rows in layout(how, masked(name, tokens), ranks).rows]


def here() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def ready() -> None:
    """All processes are here, and have nothing left to do."""
    dist.all_reduce(torch.zeros(1, device=here()))
    settled()


def settled() -> None:
    """Nothing is left to do on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(
    world: World, attend: Callable[..., Tensor], leaves: list[Tensor], seconds: float
) -> dict[str, Any]:  # fmt: skip
    """Seconds of this process, turn by turn; ``seconds`` is what a turn is expected to take."""
    long = seconds > 2
    with torch.no_grad():
        out = attend(*leaves)
        dout = torch.randn_like(out)
        del out
    if not long:
        torch.autograd.grad(attend(*leaves), leaves, dout)
    found: dict[str, Any] = {"forward": [], "both": [], "sent": 0}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2 if long else max(3, min(10, int(1 / max(seconds, 1e-3))))):
        world.ledger.clear()
        ready()
        begin = time.perf_counter()
        out = attend(*leaves)
        settled()
        found["forward"].append(time.perf_counter() - begin)
        grads = torch.autograd.grad(out, leaves, dout)
        settled()
        found["both"].append(time.perf_counter() - begin)
        found["sent"] = world.ledger.bytes()
        del out, grads
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return found


def drawn(shape: Shape, queries: int, keys: int) -> list[Tensor]:
    """Inputs of one process."""
    sizes = (shape[0], queries), (shape[1], keys), (shape[1], keys)
    return [torch.randn(1, h, n, shape[2], device=here(), dtype=torch.bfloat16, requires_grad=True) for h, n in sizes]


def context(world: World, name: str, tokens: int, way: dict[str, Any], rows: list[Any]) -> ContextParallel:
    """What shares the attention of a row."""
    given = Layout(tuple(map(torch.from_numpy, rows)))
    heads = way.get("heads", 1) or world.size
    return ContextParallel(world, masked(name, tokens), given, way["exchange"], heads=heads)


def planned(exchange: Exchange, shape: Shape) -> dict[str, float]:
    """Make the tiles of all steps, as the first pass would; what they took."""
    blocks: list[Tensor] = []

    def note(tokens: Tensor, kv: Tensor) -> Tensor:
        blocks.append(tokens)
        return kv

    empty = torch.zeros(
        len(exchange.mine) if not isinstance(exchange, Alone) else len(exchange.every), 1, device=here()
    )
    exchange.back(empty, note)
    settled()
    begin, size = time.perf_counter(), 0
    for step, tokens in enumerate(blocks):
        made = exchange.tiles(step, tokens, here())
        made.lists(), made.transposed()
        settled()
        size += made.nbytes
    return {"plan_s": time.perf_counter() - begin, "plan_mib": size / 2**20}


def speed(
    world: World, name: str, tokens: int, way: dict[str, Any], rows: list[Any], shape: Shape, seconds: float
) -> dict[str, Any]:  # fmt: skip
    """One process of a row."""
    scale, whole = shape[2] ** -0.5, masked(name, tokens)
    mine = torch.from_numpy(rows[world.rank])
    if "exchange" in way:
        both = context(world, name, tokens, way, rows)
        plan, leaves = planned(both.exchange, shape), drawn(shape, len(mine), len(mine))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return both.attend(q, k, v, scale)[0]
    else:
        alone = Alone(mine, whole)
        plan, leaves = planned(alone, shape), drawn(shape, len(mine), tokens)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _Attend.apply(q, k, v, alone, scale)[0]

    areas = [int(whole.row_areas[part].sum()) for part in rows]
    return {**measured(world, attend, leaves, seconds), **plan, "imbalance": max(areas) / (sum(areas) / len(areas))}


def peer(world: World, name: str, tokens: int, shape: Shape, seconds: float) -> dict[str, Any]:
    """One process of a row of what others have; causal."""
    kind, _, backend = name.rpartition(" ")
    group = shape[0] // shape[1]

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(BACKENDS[backend]) if torch.cuda.is_available() else nullcontext())
        held = [x.detach() for x in drawn(shape, tokens, tokens)]
        if tokens <= CHECKED:
            held.append(repeated(*held))
        if kind != "sdpa":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.tensor.experimental import context_parallel

            for x in held:
                dist.broadcast(x, 0)
            mesh = init_device_mesh(here().type, (world.size,))
            many = {"buffers": held, "buffer_seq_dims": [2] * len(held), "no_restore_buffers": set(held)}
            stack.enter_context(context_parallel(mesh, **many))
        leaves = [x.requires_grad_() for x in held[:3]]
        for attend in (grouped, repeated):
            try:
                out = attend(*leaves)
                torch.autograd.grad(out.sum(), leaves)
            except (RuntimeError, NotImplementedError, TypeError):
                if attend is grouped:
                    continue
                raise
            error = float((out.detach() - held[3]).norm() / held[3].norm()) if len(held) > 3 else None
            if error is None or error < 0.02:
                break
        else:
            raise RuntimeError(f"its output is not the attention of all tokens: relative error {error:.2g}")
        return {**measured(world, attend, leaves, seconds), "shared_heads": attend is grouped, "error_to_sdpa": error}


def errors(world: World, name: str, tokens: int, shape: Shape, rows: list[Any]) -> dict[str, dict[str, float]]:
    """Relative RMS errors of output and gradients of this process's rows from one process in float64."""
    mask, every = masked(name, tokens), torch.arange(tokens)
    heads, kv_heads, dim = shape
    source = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    drawn_ = [torch.randn(1, h, tokens, dim, generator=source).to(here(), torch.bfloat16) for h in sizes]
    *inputs, dout = drawn_
    alone = Alone(every, mask)

    def passed(attend: Callable[..., Tensor], given: list[Tensor], back: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        out = attend(*leaves)
        return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, back.to(out.dtype)))]

    def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Attend.apply(q, k, v, alone, dim**-0.5)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = mask.dense(every.to(q.device), every.to(q.device))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    want = passed(single, [x.double() for x in inputs], dout.double())
    mine = torch.from_numpy(rows[world.rank]).to(here())
    got = {
        "sdpa, one process": [x[:, :, mine] for x in passed(dense, inputs, dout)],
        "one process": [x[:, :, mine] for x in passed(single, inputs, dout)],
    }
    for way in ("group_cast", "ring", "all_gather", "ulysses"):
        both = context(world, name, tokens, WAYS[way], rows)
        here_ = [both.shard(x, 2) for x in inputs]
        got[way] = passed(lambda q, k, v, both=both: both.attend(q, k, v)[0], here_, both.shard(dout, 2))
    found: dict[str, dict[str, float]] = {}
    for way, xs in got.items():
        found[way] = {}
        for part, x, y in zip(("out", "dq", "dk", "dv"), xs, want, strict=True):
            sums = torch.stack([(x - y[:, :, mine]).square().sum(), y[:, :, mine].square().sum()])
            dist.all_reduce(sums)
            found[way][part] = float((sums[0] / sums[1]).sqrt())
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and the quantiles .2 and .8."""
    some = sorted(values)
    return {"median": statistics.median(some), "low": some[len(some) // 5], "high": some[-1 - len(some) // 5]}


def row(found: list[dict[str, Any]], tokens: int, area: int, shape: Shape) -> dict[str, Any]:
    """One row of what the processes found: the slowest of each turn."""
    made: dict[str, Any] = {}
    for part, flop in (("forward", 4), ("both", 14)):
        seconds = spread([max(turn) for turn in zip(*(one[part] for one in found), strict=True)])
        made[f"{part}_s"] = seconds
        made[f"{part}_s_of_each"] = [statistics.median(one[part]) for one in found]
        made[f"{part}_tokens_s"] = tokens / seconds["median"]
        made[f"{part}_tflop_s"] = flop * area * shape[0] * shape[2] / seconds["median"] / 1e12
    made["bytes"] = max(one["sent"] for one in found)
    made["turns"] = len(found[0]["both"])
    more = {key: value for key, value in found[0].items() if key not in ("forward", "both", "sent")}
    return made | more


class Run:
    """Rows of a run, kept on disk after each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.monotonic()
        self.shape = options.heads, options.kv_heads, options.dim
        self.made: dict[str, Any] = {
            "environment": environment(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(), "processes": options.processes, "backend": options.backend,
            "shape": {"heads": options.heads, "kv_heads": options.kv_heads, "dim": options.dim, "dtype": "bfloat16"},
            "errors": [], "rows": [], "ratios": [], "left_out": [],
        }  # fmt: skip

    def left(self) -> float:
        return float(self.options.seconds - (time.monotonic() - self.begin))

    def keep(self, kind: str, row: dict[str, Any]) -> None:
        self.made[kind].append(row)
        self.options.json.write_text(json.dumps(self.made, indent=1) + "\n")
        print(f"{time.monotonic() - self.begin:6.1f} s", json.dumps(row), flush=True)

    def try_(self, pool: Processes, about: dict[str, Any], ranks: int, *job: Any) -> bool:
        """One row, if it fits into what is left; whether the processes still stand."""
        work = masked(about["mask"], about["tokens"]).area
        seconds = 14 * work * self.shape[0] * self.shape[2] / ranks / (RATE if torch.cuda.is_available() else 1e9)
        turns = 2.3 if seconds > 2 else 5
        if self.left() < turns * seconds + 3:
            self.made["left_out"].append(about)
            return True
        try:
            found = pool.run(*job, seconds)
        except Exception as error:  # a peer that refuses, a lack of memory: the row says so
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.keep("rows", {**about, "error": lines[-1][:300]})
            return False
        self.keep("rows", {**about, **row(found, about["tokens"], work // ranks, self.shape)})
        return True

    def ratios(self) -> None:
        speeds = {(x["mask"], x["tokens"], x["way"]): x for x in self.made["rows"] if "error" not in x}
        for mask, tokens, way in list(speeds):
            rings = [x for (m, n, w), x in speeds.items() if (m, n) == (mask, tokens) and w.startswith("ring")]
            if way != "group_cast" or not rings:
                continue
            told = {"mask": mask, "tokens": tokens}
            for part in ("forward", "both"):
                name = f"{part}_tokens_s"
                told[part] = speeds[mask, tokens, way][name] / (best := max(x[name] for x in rings))
                if (bound := speeds.get((mask, tokens, "halves"))) is not None:
                    told[f"{part}_of_halves"] = speeds[mask, tokens, way][name] / bound[name]
                    told[f"{part}_bound"] = bound[name] / best  # what it could be at most
            self.keep("ratios", told)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="gloo: CPUs, to try the script")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32 * 1024, 128 * 1024, 512 * 1024])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=220, help="no row begins that would end after them")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help="of the rows")
    run = Run(options := parser.parse_args())
    ranks, short = options.processes, min(SHORT, *options.tokens)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as makers:
        plans: dict[tuple[str, int, str], Future[list[Any]]] = {}
        for tokens in sorted({short, *options.tokens}):
            for mask in MASKS:
                for how in ("greedy", "zigzag", "document", "contiguous"):
                    plans[mask, tokens, how] = makers.submit(shared, mask, tokens, how, ranks)
        jobs = [(n, mask, way) for n in sorted(options.tokens) for way in options.ways for mask in MASKS
                if mask not in ALONE.get(way, ())]  # fmt: skip
        jobs.sort(key=lambda job: job[0] == max(options.tokens) and job[1] == "causal")  # the longest rows last
        with ExitStack() as stack:
            pool = stack.enter_context(Processes(ranks, options.backend, limit=LIMIT))
            kv_heads = max(ranks, options.kv_heads // 4)
            few = kv_heads * (options.heads // options.kv_heads), kv_heads, options.dim
            for mask in MASKS:
                told = pool.run(errors, mask, short, few, plans[mask, short, "greedy"].result())[0]
                run.keep("errors", {"mask": mask, "tokens": short, **told})
            for tokens, mask, way in jobs:
                given: tuple[Any, ...] = peer, way, tokens, run.shape
                if (how := WAYS[way].get("layout")) is not None:
                    given = speed, mask, tokens, WAYS[way], plans[mask, tokens, how].result(), run.shape
                about = {"mask": mask, "tokens": tokens, "way": way}
                if not run.try_(pool, about, 1 if way.startswith("sdpa") else ranks, *given):
                    pool = stack.enter_context(Processes(ranks, options.backend, limit=LIMIT))  # the others have ended
        run.ratios()
        run.keep("left_out", {"seconds_left": run.left()})


if __name__ == "__main__":
    main()
