# SPDX-License-Identifier: Apache-2.0
"""What share of a device's peak shared attention reaches, by the length of a piece: the curve of the cost model.

    python benchmarks/parallel_efficiency.py --peak 989 [--backend nccl] [--json benchmarks/parallel_efficiency.json]

One process attends within texts of one length, as many as fill ``--tokens``, by :class:`ContextParallel`. The share is
the true area's operations forward over the time's median, over ``--peak`` in TFLOP/s; ``back`` is what a backward pass
reaches of it at the longest length. The file is what
``manyheads parallel --model-only --efficiency FILE`` takes.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from statistics import median

import torch

from manyheads.environment import commit, environment
from manyheads.parallel import ContextParallel, Processes
from manyheads.parallel._cost import BACKWARD
from manyheads.parallel._masks import documents

HEADS, KV_HEADS, WIDTH = 32, 8, 128


def rate(world, length: int, tokens: int, rounds: int, cuda: bool) -> tuple[float, float]:
    """Operations per second within texts of a length, forward and backward."""
    mask = documents([length] * (tokens // length))
    shared = ContextParallel(world, mask, "contiguous", "all_gather")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    sizes = HEADS, KV_HEADS, KV_HEADS
    leaves = [torch.randn(1, h, mask.size, WIDTH, device=device, dtype=dtype, requires_grad=True) for h in sizes]

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    turns = []
    for _ in range(rounds + 1):
        start = now()
        out = shared.attend(*leaves)[0]
        middle = now()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        turns.append((middle - start, now() - middle))
    forward, back = (median(turn) for turn in zip(*turns[1:], strict=True))
    return 4 * mask.area * HEADS * WIDTH / forward, BACKWARD * 4 * mask.area * HEADS * WIDTH / back


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", type=float, required=True, help="TFLOP/s of dense products")
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    lengths = sorted(n for n in given.lengths if n <= given.tokens)
    shares = []
    with Processes(1, given.backend) as pool:
        for length in lengths:
            ((found, back),) = pool.run(rate, length, given.tokens, given.rounds, given.backend == "nccl")
            shares.append(found / given.peak / 1e12)
            print(f"{length:6}  {found / 1e12:8.2f} TFLOP/s  {shares[-1]:.3f}, back {back / found:.3f}", flush=True)
    about = {"date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment()}
    made = about | {
        "tokens": given.tokens,
        "peak": given.peak,
        "curve": {"lengths": lengths, "shares": shares, "back": back / found},
    }
    if given.json:
        given.json.write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
