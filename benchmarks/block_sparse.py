# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on a GPU: our kernel beside dense SDPA and FlexAttention, in the same run.

    python benchmarks/block_sparse.py [--json benchmarks/block_sparse.json] [--seconds 150] [--tune]

16 heads of 128 channels in bfloat16, one row of 32,768 tokens, causal; blocks of 128 x 128 that are drawn at random for
each head, with the block of the query itself always among them. Times are medians of calls as the host issues them, and
follow each other closely. ``operator`` is :func:`block_sparse_attention` as a user calls it, with a pattern that was
used before; ``fresh`` is one whose lists have to be made first; ``kernel`` is our kernel whatever the pattern. ``way``
is what ran: ``gluon`` are the kernels for Hopper, and where they do, ``kernel`` is also timed with the Triton kernels.
Ratios are to the fastest of SDPA's flash and cuDNN,
of the same passes. The physical limit is that of the products (4 d numbers a pair forward, 14 d with
the backward pass) at the rate of torch's largest square matrix product, measured in the same run. FlexAttention is
compiled, with its Triton kernel and, where torch has one, with its FLASH backend. What has not begun when the seconds
are over is left out; results are written after each row.
"""

import argparse
import datetime
import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from decode import commit  # benchmarks/decode.py
from manyheads.attention import patterns
from manyheads.attention.block_pattern import BlockPattern, Rule
from manyheads.attention.flex_mask import block_mask
from manyheads.attention.sparse import Call, block_sparse_attention, choose
from manyheads.environment import environment
from manyheads.kernels import block_sparse, block_sparse_hopper

HEADS, DIM, LENGTH, BLOCK = 16, 128, 32768, 128
SCALE = DIM**-0.5
DENSITIES = (0.1, 1.0, 0.05, 0.25, 0.5, 0.75, 0.02)  # the one that is asked for first comes first
BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
TILES = {
    "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3),
                (128, 64, 4, 3), (64, 128, 4, 2), (128, 32, 8, 3), (128, 32, 4, 3)],
    "queries": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)],
    "keys": [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3),
             (128, 64, 8, 2)],
}  # fmt: skip

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(density: float) -> BlockPattern:
    """Random causal blocks, so many of all with those on the diagonal; 1 is all of them."""
    rows = LENGTH // BLOCK
    share = (density * (rows + 1) - 2) / (rows - 1)
    kept = torch.rand(1, HEADS, rows, rows, device="cuda") < share
    kept |= torch.eye(rows, dtype=torch.bool, device="cuda")
    return BlockPattern.from_blocks(kept.tril(), LENGTH, LENGTH)


def milliseconds(call: Callable[[], object], least: int = 5) -> float:
    """Median of calls that follow each other, for about half a second, after two that warm up."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    rounds = max(least, min(50, int(0.5 / (time.perf_counter() - begin))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def measured(attend: Attend, leaves: list[Tensor], grad: Tensor) -> dict[str, object]:
    """Milliseconds of a forward pass, and of a forward and a backward pass; or the error of a peer that refuses."""

    def forward() -> object:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    try:
        begin = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        first = time.perf_counter() - begin
        return {"forward_ms": milliseconds(forward), "both_ms": milliseconds(both), "first_call_s": first}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}


def dense(backend: SDPBackend) -> Attend:
    """Dense causal attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    return attend


def flex(pattern: BlockPattern, **options: Any) -> Attend:
    """FlexAttention, compiled; ``options`` of its kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(pattern, Rule())
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask, scale=SCALE, kernel_options=options or None)
        return out

    return attend


def without_hopper() -> Any:
    """While it is open, calls go to the Triton kernels."""
    return mock.patch.object(block_sparse_hopper, "refusal", lambda *_: "switched off")


def ways(density: float) -> dict[str, Callable[[], Attend]]:
    """What is timed at a density; each is made when its turn comes."""
    pattern = drawn(density)
    mask = pattern.blocks().float().tril().log()

    def fresh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = LENGTH // BLOCK
        made = BlockPattern.from_blocks(mask > -1, LENGTH, LENGTH, most=rows)
        return block_sparse_attention(q, k, v, made, scale=SCALE)

    return {
        "operator": lambda: lambda q, k, v: block_sparse_attention(q, k, v, pattern, scale=SCALE),
        "kernel": lambda: lambda q, k, v: block_sparse_attention(q, k, v, pattern, scale=SCALE, impl="triton"),
        "fresh": lambda: fresh,
        "flex": lambda: flex(pattern),
        "flex FLASH": lambda: flex(pattern, BACKEND="FLASH"),
    }


def product_rate() -> float:
    """FLOP/s of a large square product in bfloat16."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / milliseconds(lambda: a @ b) * 1e3


def errors(leaves: list[Tensor]) -> dict[str, float]:
    """Relative errors of the kernel in bfloat16 on the first 4,096 tokens of two heads, against float64."""
    length = 4096
    few = [x.detach()[:, :2, :length].contiguous().requires_grad_() for x in leaves]
    scores = torch.rand(1, 2, length // BLOCK, length // BLOCK, device="cuda")
    pattern = patterns.top_k(scores, 4, length, length)
    made = []
    for impl, dtype in (("triton", torch.bfloat16), ("torch", torch.float64)):
        x = [y.detach().to(dtype).requires_grad_() for y in few]
        out = block_sparse_attention(*x, pattern, scale=SCALE, impl=impl)  # type: ignore[arg-type]
        made.append([out, *torch.autograd.grad(out.sum(), x)])
    names = ("out", "q", "k", "v")
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, *made, strict=True)}


def tune(leaves: list[Tensor], grad: Tensor, deadline: float) -> None:
    """Times of other tiles of the Triton kernels at a tenth of the blocks, one at a time, for whoever chooses them."""
    pattern, known = drawn(0.1), block_sparse._config
    call = Call(pattern, Rule(), SCALE)
    x = [leaf.detach() for leaf in leaves]
    for kind, table in TILES.items():
        for tile in table:
            if time.monotonic() > deadline:
                print("out of time")
                return

            def chosen(name: str, width: int, itemsize: int, kind: str = kind, tile: Any = tile) -> Any:
                return block_sparse._Config(*tile) if name == kind else known(name, width, itemsize)

            block_sparse._config = chosen
            try:
                out, lse = block_sparse.forward(*x, call)
                if kind == "forward":
                    ms = milliseconds(lambda: block_sparse.forward(*x, call))
                else:
                    ms = milliseconds(lambda: block_sparse.backward(*x, call, out, lse, grad, None))  # noqa: B023
                print(kind, tile, f"{ms:.3f} ms", flush=True)
            except Exception as error:
                print(kind, tile, f"{type(error).__name__}: {str(error)[:100]}", flush=True)
    block_sparse._config = known


def main() -> None:
    """Measure, print, write after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--commit", default=None, help="name of the measured state; git is asked without it")
    parser.add_argument("--seconds", type=float, default=150, help="after which nothing more is begun")
    parser.add_argument("--tune", action="store_true", help="time other tiles instead")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds - 10
    torch.manual_seed(0)
    leaves = [torch.randn(1, HEADS, LENGTH, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in "qkv"]
    grad = torch.randn(1, HEADS, LENGTH, DIM, device="cuda", dtype=torch.bfloat16)
    if options.tune:
        with without_hopper():
            tune(leaves, grad, deadline)
        return
    rows: list[dict[str, object]] = []
    result: dict[str, object] = {
        "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or commit(),
        "shape": {"batch": 1, "heads": HEADS, "length": LENGTH, "head_dim": DIM, "block": BLOCK, "dtype": "bfloat16"},
        "product_flop_s": (rate := product_rate()),
        "errors": errors(leaves),
        "rows": rows,
    }
    print(f"products {rate / 1e12:.0f} TFLOP/s, errors {result['errors']}")
    best: dict[str, float] = {}

    def add(row: dict[str, object], share: float) -> None:
        pairs = share * HEADS * LENGTH * (LENGTH + 1) / 2
        row |= {"limit_forward_ms": 4 * DIM * pairs / rate * 1e3, "limit_both_ms": 14 * DIM * pairs / rate * 1e3}
        for kind in ("forward", "both"):
            if f"{kind}_ms" in row and f"{kind}_ms" in best:
                row[f"{kind}_to_dense"] = float(row[f"{kind}_ms"]) / best[f"{kind}_ms"]  # type: ignore[arg-type]
        rows.append(row)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    for name, backend in BACKENDS.items():
        row = {"attention": name, "density": 1.0, **measured(dense(backend), leaves, grad)}
        for kind in ("forward_ms", "both_ms"):
            if kind in row:
                best[kind] = min(best.get(kind, float("inf")), float(row[kind]))  # type: ignore[arg-type]
        add(row, 1.0)
    peers = {"flex", "flex FLASH"}  # at all densities after ours at all: the latter decide, the former compile slowly
    for late in (False, True):
        for density in DENSITIES if not late else (0.1, 0.5, 1.0, 0.02, 0.05, 0.25):
            made = ways(density)
            pattern = drawn(density)
            share = pattern.density(Rule())
            call = Call(pattern, Rule(), SCALE)
            ours = "gluon" if block_sparse_hopper.refusal(*leaves, call) is None else "triton"
            chosen = choose(*leaves, call).impl
            taken = ours if chosen == "triton" else chosen
            for name, way in (
                ("operator", taken), *(("kernel", way) for way in dict.fromkeys((ours, "triton"))), ("fresh", taken),
                ("flex", "flex"), ("flex FLASH", "flex"),
            ):  # fmt: skip
                if (name in peers) != late or time.monotonic() > deadline:
                    continue
                row = {"attention": name, "way": way, "density": density, "measured_density": share}
                with without_hopper() if (ours, way) == ("gluon", "triton") else nullcontext():
                    try:
                        row |= measured(made[name](), leaves, grad)
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                add(row, share)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
