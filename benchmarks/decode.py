# SPDX-License-Identifier: Apache-2.0
"""Decode attention on a GPU: our kernel over bf16, INT4 and FP8 caches beside torch's SDPA, in the same run.

    python benchmarks/decode.py [--json benchmarks/decode.json]

Heads of Llama-3-8B: 32 query heads, 8 key/value heads, 128 channels; one query a row. Every call is timed inside a CUDA
graph of many, and reads other tokens than the calls before it, so that the L2 cache holds none of them. Bytes are those
of keys and values as stored, scales included; the rate is set against that of torch's device-to-device copy, bytes read
and written, measured in the same run. SDPA is timed as torch picks its backend and under each backend by itself; ratios
are to the fastest of these. The ratio to SDPA that a packed cache has is that of a smaller cache: SDPA reads bf16.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from manyheads.attention.codec import FP8, INT4
from manyheads.environment import environment
from manyheads.kernels.decode import decode_attention

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
SIZES = {1: [2**i for i in range(11, 18)], 8: [2**i for i in range(11, 17)]}
POOL = 2 * 8 * KV_HEADS * 2**16  # tokens: two caches of the largest size
COLD = 256 * 2**20  # bytes that are read before any byte is read again; L2 caches hold 50 to 130 MB
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

Call = Callable[[int], object]


def microseconds(call: Call, calls: int, rounds: int = 9) -> float:
    """Median over ``rounds`` replays of a graph of ``call(0), call(1), ...``, per call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return float(statistics.median(times))


def copy_rate() -> float:
    """Bytes read and written per second, in GB/s, of torch's copy of 1 GiB: the better of launched and in a graph."""
    source = torch.randn(2**29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    times = [microseconds(lambda _: target.copy_(source), 5)]
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(2 * source.nbytes / min(times[0], statistics.median(times[1:])) / 1e3)


class Pool:
    """Many tokens' keys and values in each storage; a case reads a different stretch at each call."""

    def __init__(self) -> None:
        self.bf16 = [torch.randn(POOL, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
        self.planes: dict[str, dict[str, Tensor]] = {"bf16": dict(zip("kv", self.bf16, strict=True))}
        for codec in (INT4, FP8):
            planes: dict[str, Tensor] = {}
            for name, x in zip("kv", self.bf16, strict=True):
                parts = [codec.encode(part) for part in x.chunk(16)]
                planes[name], planes[f"{name}_scale"] = (torch.cat(side) for side in zip(*parts, strict=True))
            self.planes[codec.name] = planes

    def token_bytes(self, storage: str) -> int:
        return sum(x[0].nbytes for x in self.planes[storage].values())

    def ours(self, storage: str, q: Tensor, lengths: Tensor) -> tuple[Call, int]:
        """The kernel over heads of ``lengths [B, Hkv]``, and how many different caches there are."""
        ends = lengths.flatten().cumsum(0).long()
        starts, total, planes = (ends - lengths.flatten()).view_as(lengths), int(ends[-1]), self.planes[storage]
        count = self.count(total, storage)
        offsets = [(starts + i * total).cuda() for i in range(count)]
        sizes, capacity = lengths.int().cuda(), int(lengths.max())

        def call(i: int) -> object:
            return decode_attention(
                q, **planes, offsets=offsets[i % count], lengths=sizes, scale=SCALE, capacity=capacity
            )

        return call, count

    def sdpa(self, q: Tensor, size: int) -> tuple[Call, int]:
        total = q.shape[0] * KV_HEADS * size
        count = self.count(total, "bf16")
        caches = [
            [x[i * total : (i + 1) * total].view(-1, KV_HEADS, size, DIM) for x in self.bf16] for i in range(count)
        ]

        def call(i: int) -> object:
            k, v = caches[i % count]
            return scaled_dot_product_attention(q[:, :, None], k, v, scale=SCALE, enable_gqa=True)

        return call, count

    def count(self, total: int, storage: str) -> int:
        return min(POOL // total, math.ceil(COLD / (total * self.token_bytes(storage))) + 1)


def sdpa_times(pool: Pool, q: Tensor, size: int) -> dict[str, float]:
    """Microseconds of SDPA as torch picks it (``auto``) and under each backend that takes these shapes."""
    call, count = pool.sdpa(q, size)
    times = {"auto": microseconds(call, max(count, 10))}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times[name] = microseconds(call, max(count, 10))
        except RuntimeError as error:
            print(f"  sdpa {name}: {str(error).splitlines()[0]}")
    return times


def measure(pool: Pool, copy: float) -> list[dict[str, object]]:
    """Every case, printed as it comes."""
    rows: list[dict[str, object]] = []

    def row(
        batch: int, keys: str | int, name: str, us: float, size: int, rival: float | None, error: float | None
    ) -> None:
        rate = size / us / 1e3
        entry = {"batch": batch, "keys": keys, "attention": name, "us": us, "bytes": size, "gb_s": rate}
        rows.append(entry | {"of_copy": rate / copy, "times_sdpa": rival and rival / us, "error": error})
        print(
            f"{batch:5} {keys:>7} {name:12} {us:9.2f} us {size / 1e6:9.1f} MB {rate:7.0f} GB/s {rate / copy:6.1%}"
            f"{f'  {rival / us:5.2f}x' if rival else ''}{f'  error {error:.1e}' if error else ''}"
        )

    for batch, sizes in SIZES.items():
        for size in sizes:
            q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
            tokens = batch * KV_HEADS * size
            times = sdpa_times(pool, q, size)
            best = min(times.values())
            for name, us in times.items():
                row(batch, size, f"sdpa {name}", us, tokens * pool.token_bytes("bf16"), best, None)
            want = pool.sdpa(q, size)[0](0)[:, :, 0].float()  # type: ignore[index]
            for storage in pool.planes:
                call, count = pool.ours(storage, q, torch.full((batch, KV_HEADS), size))
                error = float((call(0)[0] - want).norm() / want.norm())  # type: ignore[index]
                us = microseconds(call, max(count, 10))
                row(batch, size, storage, us, tokens * pool.token_bytes(storage), best, error)
    lengths = torch.linspace(0.25, 1.75, KV_HEADS).mul(2**15).round().long()[None]
    q = torch.randn(1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    for storage in pool.planes:  # heads that hold 8k to 56k keys
        call, count = pool.ours(storage, q, lengths)
        us = microseconds(call, max(count, 10))
        row(1, "ragged", storage, us, int(lengths.sum()) * pool.token_bytes(storage), None, None)
    return rows


def commit() -> str | None:
    """The measured state, as git names it; None outside of a repository."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--commit", default=None, help="name of the measured state; git is asked without it")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_rate()
    print(f"copy {copy:.0f} GB/s")
    rows = measure(Pool(), copy)
    result = {
        "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or commit(),
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM},
        "copy_gb_s": copy,
        "rows": rows,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
