# SPDX-License-Identifier: Apache-2.0
"""Attention of a long prompt on a GPU: DHSA and its rivals beside flash attention, in the same run.

    python benchmarks/dhsa_prefill.py [--json benchmarks/dhsa_prefill.json] [--heads 32] [--kv-heads 8] [--budget 2048]

One layer's attention in bfloat16 over random queries and keys of 128 channels, 8k to 128k tokens. Whole time of
``attend`` (choosing and reading), the choice alone (``choose_ms``), and the reading of a list that is there already
(``read_ms``); flash attention is ``scaled_dot_product_attention`` with ``is_causal``. ``pairs`` is the share of causal
pairs that is read, which is the limit of the reading where pairs cost what they cost in flash attention. The learned
boundaries are those of an untrained predictor: its time does not depend on its weights. Medians, each call waited for.
``crossover`` is the first length from which on the whole call is faster than flash attention.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from manyheads import parse
from manyheads.attention.block_pattern import Rule
from manyheads.attention.sparse import block_sparse_attention
from manyheads.call import AttentionCall, Site
from manyheads.environment import commit, environment
from manyheads.mixers._sparse import SparseAttention
from manyheads.mixers.dhsa import Boundaries
from manyheads.mixers.dhsa.boundaries import BoundaryConfig, BoundaryNet

DIM = 128
LENGTHS = tuple(2**n for n in range(13, 18))


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measured(spec: str, call: AttentionCall, repeats: int) -> dict[str, Any]:
    """Times of one strategy, and the pairs that it reads."""
    strategy = parse(spec)
    assert isinstance(strategy, SparseAttention)
    ((_, _, _, row),) = strategy.rows(call)
    pattern = strategy.pattern(row)
    few, keys, scale = row.queries.shape[1], row.keys.shape[1], call.scale

    def read() -> None:
        block_sparse_attention(call.q[:, :, :few], call.k[:, :, :keys], call.v[:, :, :keys], pattern, scale=scale)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = milliseconds(lambda: strategy.attend(call), repeats)
    return {
        "spec": spec.partition(",boundaries")[0] + (", learned" if "boundaries" in spec else ""), "ms": whole,
        "choose_ms": milliseconds(lambda: strategy.pattern(row), repeats), "read_ms": milliseconds(read, repeats),
        "pairs": pattern.density(Rule()), "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }  # fmt: skip


def main() -> None:
    """Measure all lengths, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    site, rows = Site("layer", 0, 0, "self", True, given.heads, given.kv_heads), []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        Boundaries(BoundaryNet(BoundaryConfig(channels=given.kv_heads * DIM)), {}).save(folder)
        for length in given.lengths:
            torch.manual_seed(0)
            q, k, v = (
                torch.randn(1, heads, length, DIM, device="cuda", dtype=torch.bfloat16)
                for heads in (given.heads, given.kv_heads, given.kv_heads)
            )
            call = AttentionCall(site, q, k, v, DIM**-0.5, is_causal=True)
            wide = [x.repeat_interleave(given.heads // given.kv_heads, 1) for x in (k, v)]
            dense = milliseconds(
                lambda q=q, wide=wide: scaled_dot_product_attention(q, *wide, is_causal=True),  # type: ignore[misc]
                given.repeats,
            )
            specs = [f"dhsa:budget={given.budget}", f"dhsa:budget={given.budget},boundaries={folder}"]
            specs += [f"dhsa:budget={given.budget},index=kv", f"dhsa.rival:by=vertical_slash,budget={given.budget}"]
            for spec in specs:
                found = {"length": length, "flash_ms": dense, **measured(spec, call, given.repeats)}
                rows.append({**found, "of_flash": found["ms"] / dense})
                print(json.dumps(rows[-1]), flush=True)
    crossover = {
        spec: min((r["length"] for r in rows if r["spec"] == spec and r["of_flash"] < 1), default=None)
        for spec in dict.fromkeys(row["spec"] for row in rows)
    }
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key not in ("json", "lengths")}
        today = datetime.date.today().isoformat()
        about = {"date": today, "environment": environment(), "commit": commit(), **settings}
        given.json.write_text(json.dumps({**about, "crossover": crossover, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
