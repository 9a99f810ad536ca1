# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay on a GPU: our kernels beside flash-linear-attention and torch's SDPA, in the same run.

    python benchmarks/decay_attention.py [--json benchmarks/decay_attention.json] [--minutes 6] [--tune]

16 heads of 128 channels in bfloat16, the same number of tokens in rows of 256 to 32k, then one row of 131,072 and of a
million. Every time is taken twice: of calls as the host issues them (``forward_ms``, ``both_ms``), in which a small
call waits for the host, and of a replayed CUDA graph (``..._graph_ms``), which is the device's time. Beside them stands
the least that memory allows: tensors that must be read or written once (4 forward, 11 with the backward pass), at the
rate of torch's device-to-device copy measured in the same run. Peers get the same scale and the same decay (that of
Lightning Attention's paper, layer 0), and the errors of their output and gradients against float64 stand in the
results, as ours do. ``gla`` are gates for each token, ``mlstm`` gates and the normaliser; SDPA is causal softmax
attention by FlashAttention, another function, quadratic in the length; while decoding it reads as many keys as the row
says. Ours are called cold by a fresh process with an empty Triton cache, after CUDA and autograd have started; a peer's
cold call is its first one here, compilation and tuning included, over 1,024 tokens. A peer that has not begun when
``--minutes`` are over is left out.
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from decode import commit, copy_rate, microseconds  # benchmarks/decode.py
from manyheads.attention.recurrence import DecayState, decay_attention, quadratic
from manyheads.environment import environment
from manyheads.kernels import _passes

HEADS, DIM = 16, 128
SCALE = DIM**-0.5
SHAPES = [
    (128, 2**8),
    (64, 2**9),
    (32, 2**10),
    (16, 2**11),
    (8, 2**12),
    (4, 2**13),
    (2, 2**14),
    (1, 2**15),
    (1, 2**17),
    (1, 2**20),
]
SOFTMAX_UP_TO = GRAPHS_UP_TO = 2**15
KEYS = (2**8, 2**10, 2**12, 2**14, 2**16)  # that SDPA decodes over
COLD = 256 * 2**20  # bytes that are read before any byte is read again; L2 caches hold 50 to 130 MB

Attention = Callable[..., Tensor]


@cache
def slopes() -> Tensor:
    """Log decay of each head, as the paper of Lightning Attention and FLA have it in the first layer."""
    return -8 / HEADS * torch.arange(HEADS, device="cuda", dtype=torch.float32)


def lightning(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Decay of each head."""
    return decay_attention(q, k, v, slopes(), scale=SCALE, impl="triton")[0]


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, _: Tensor) -> Tensor:
    """A gate for each token."""
    return decay_attention(q, k, v, g, scale=SCALE, impl="triton")[0]


def mlstm(q: Tensor, k: Tensor, v: Tensor, g: Tensor, floor: Tensor) -> Tensor:
    """A gate for each token, and mLSTM's normaliser."""
    return decay_attention(q, k, v, g, scale=SCALE, norm="mlstm", floor=floor, impl="triton")[0]


def fla_lightning(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """The peer of ``lightning``."""
    from fla.ops.lightning_attn import chunk_lightning_attn

    wide = [x.transpose(1, 2) for x in (q, k, v)]
    return chunk_lightning_attn(*wide, layer_idx=0, num_layers=1, scale=SCALE)[0].transpose(1, 2)


def fla_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, _: Tensor) -> Tensor:
    """The peer of ``gla``."""
    from fla.ops.simple_gla import chunk_simple_gla

    wide = [x.transpose(1, 2) for x in (q, k, v)]
    return chunk_simple_gla(*wide, g=g.transpose(1, 2), scale=SCALE)[0].transpose(1, 2)


def softmax(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Causal softmax attention: another function, what a transformer would take."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=SCALE)


OURS: dict[str, Attention] = {"lightning": lightning, "gla": gla, "mlstm": mlstm}
PEERS: dict[str, Attention] = {"sdpa flash": softmax, "fla lightning": fla_lightning, "fla gla": fla_gla}


def reason(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def inputs(batch: int, length: int) -> list[Tensor]:
    """q, k, v as a projection leaves them (heads inside tokens), gates, mLSTM's floor; all with gradients."""
    wide = [torch.randn(batch, length, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
    g = torch.nn.functional.logsigmoid(torch.randn(batch, length, HEADS, device="cuda") + 4)
    floor = torch.rand(batch, HEADS, length, device="cuda") + 0.5
    return [x.requires_grad_() for x in (*(x.transpose(1, 2) for x in wide), g.transpose(1, 2), floor)]


def forward(call: Attention, leaves: list[Tensor]) -> Callable[[int], object]:
    """A forward pass alone."""

    def run(_: int) -> object:
        with torch.no_grad():
            return call(*leaves)

    return run


def both(call: Attention, leaves: list[Tensor], grad: Tensor) -> Callable[[int], object]:
    """A forward and a backward pass."""

    def run(_: int) -> object:
        return torch.autograd.grad(call(*leaves), leaves, grad, allow_unused=True)

    return run


def milliseconds(call: Callable[[int], object], rounds: int) -> float:
    """Median over calls that follow each other as the host issues them."""
    for i in range(3):
        call(i)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for i in range(rounds):
        call(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def truth(name: str, leaves: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Output and gradients of the definition in float64; softmax attention has none here."""
    high = [x.detach().double().requires_grad_() for x in leaves]
    q, k, v, g, floor = high
    given = {"norm": "mlstm", "floor": floor} if "mlstm" in name else {}
    gate = slopes()[: q.shape[1]].double() if "lightning" in name else g
    out, _ = quadratic(q, k, v, gate, scale=SCALE, **given)  # type: ignore[arg-type]
    return [out, *torch.autograd.grad(out, high, grad.double(), allow_unused=True)]


def errors(name: str, call: Attention) -> tuple[dict[str, float] | None, float]:
    """Relative errors of output and gradients over 1,024 tokens, and seconds of this first call of its kind."""
    leaves = inputs(1, 1024)
    grad = torch.randn(1, HEADS, 1024, DIM, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    out = call(*leaves)
    made = [out, *torch.autograd.grad(out, leaves, grad, allow_unused=True)]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if "sdpa" in name:
        return None, seconds
    return {
        label: float((got.detach().double() - want.detach()).norm() / want.detach().norm())
        for label, got, want in zip(("out", "q", "k", "v", "g", "floor"), made, truth(name, leaves, grad), strict=True)
        if got is not None and want is not None
    }, seconds


def peak(call: Callable[[int], object]) -> int | None:
    """Bytes that a call allocates at its peak, what it returns included; before any graph has memory of its own.

    None for a peer that fails.
    """
    try:
        call(0)
    except Exception as error:
        print(reason(error))
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call(0)
    return torch.cuda.max_memory_allocated() - held


def begin(deadline: float, rows: list[dict[str, object]]) -> dict[str, dict[str, float] | None]:
    """First call of every attention: those that can be measured, with their errors."""
    able: dict[str, dict[str, float] | None] = {}
    for name, call in (OURS | PEERS).items():
        row: dict[str, object] = {"kind": "cold", "attention": name}
        if name in PEERS and time.monotonic() > deadline:
            row["error"] = "left out: out of time"
        else:
            try:
                able[name], row["first_s"] = errors(name, call)
            except Exception as error:  # a peer that is missing or refuses is a result, not an end
                row["error"] = reason(error)
        if name in PEERS:
            rows.append(row)
        print(name, row.get("error") or f"{row['first_s']:.1f} s", able.get(name))
    return able


def lengths(copy: float, deadline: float, rows: list[dict[str, object]]) -> None:
    """Forward, and forward with backward: time, share of the bytes' bound, peak memory."""
    able = begin(deadline, rows)
    for batch, length in SHAPES:
        leaves = inputs(batch, length)
        grad = torch.randn(batch, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
        unit = batch * HEADS * length * DIM * 2
        rounds = 20 if batch * length <= 2**15 else 10 if length <= 2**17 else 4
        calls = {
            name: (forward(call, leaves), both(call, leaves, grad))
            for name, call in (OURS | PEERS).items()
            if name in able and not ("sdpa" in name and length > SOFTMAX_UP_TO)
        }
        peaks = {name: peak(run) for name, (_, run) in calls.items()}
        for name, (once, run) in calls.items():
            row: dict[str, object] = {"kind": "length", "attention": name, "batch": batch, "length": length}
            rows.append(row)
            if (held := peaks[name]) is None:
                row["error"] = "does not run at this size"
                continue
            try:
                row |= {"forward_ms": milliseconds(once, rounds), "both_ms": (total := milliseconds(run, rounds))}
                if length <= GRAPHS_UP_TO:
                    row["forward_graph_ms"] = microseconds(once, 5) / 1e3
                    row["both_graph_ms"] = total = microseconds(run, 5) / 1e3
            except Exception as error:
                row["error"] = reason(error)
            row |= {
                "tokens_s": batch * length / total * 1e3, "bound_forward_ms": 4 * unit / copy / 1e6,
                "bound_both_ms": 11 * unit / copy / 1e6, "peak_bytes": held, "tensor_bytes": unit,
                "errors": able[name],
            }  # fmt: skip
            print(f"{batch:3} x {length:7} {name:14}", *(
                f"{key.removesuffix('_ms')} {value:.3f}" for key, value in row.items() if key.endswith("_ms")
            ), f"{held / unit:.1f} tensors {row.get('error', '')}")  # fmt: skip
        del leaves, grad, calls


def softmax_decoding(batch: int, copy: float, rows: list[dict[str, object]]) -> None:
    """One token of softmax attention over KEYS keys."""
    for keys in KEYS:
        size = 2 * batch * HEADS * keys * DIM * 2
        pool = max(1, COLD // size)
        q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(pool, batch, HEADS, keys, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        with torch.no_grad():
            us = microseconds(lambda i: softmax(q, k[i % pool], v[i % pool]), max(pool, 4))  # noqa: B023
        rows.append(
            {"kind": "step", "attention": "sdpa flash", "batch": batch, "keys": keys, "bytes": size, "us": us}
            | {"bound_us": size / copy / 1e3}
        )
        print(f"step batch {batch:3} sdpa {keys:6} keys {us:8.2f} us (bound {size / copy / 1e3:.2f})")


def decoding(copy: float, rows: list[dict[str, object]]) -> None:
    """One token: the state is read and written. Calls take other states than those before, so that L2 holds none."""
    for batch in (1, 8, 64):
        pool = 64 // batch * 4
        states = torch.randn(pool, batch, HEADS, DIM, DIM, device="cuda")
        q, k, v = (torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        g = -torch.rand(batch, HEADS, 1, device="cuda")
        size = 2 * states[0].nbytes

        def ours(i: int, impl: str = "triton") -> object:
            state = DecayState(states[i % pool])  # noqa: B023
            return decay_attention(q, k, v, g, scale=SCALE, state=state, impl=impl)  # type: ignore[arg-type] # noqa: B023

        def fla(i: int) -> object:
            from fla.ops.simple_gla import fused_recurrent_simple_gla

            wide = [x.transpose(1, 2) for x in (q, k, v, g)]  # noqa: B023
            return fused_recurrent_simple_gla(
                *wide[:3], g=wide[3], scale=SCALE, initial_state=states[i % pool], output_final_state=True  # noqa: B023
            )  # fmt: skip

        calls = {"ours": ours, "torch": lambda i: ours(i, "torch"), "fla recurrent": fla}
        for name, call in calls.items():
            row: dict[str, object] = {"kind": "step", "attention": name, "batch": batch, "bytes": size}
            try:
                with torch.no_grad():
                    row["us"] = us = microseconds(call, pool)
                row["bound_us"] = size / copy / 1e3
                print(f"step batch {batch:3} {name:14} {us:8.2f} us (bound {size / copy / 1e3:.2f})")
            except Exception as error:
                row["error"] = reason(error)
                print(row)
            rows.append(row)
        if batch <= 8:
            softmax_decoding(batch, copy, rows)


def cold_call(name: str) -> None:
    """In a process of its own: seconds of the first forward and backward pass, and of the first at another length."""
    x = torch.ones(8, 8, device="cuda", requires_grad=True)
    torch.autograd.grad(x @ x, x, x)  # its first call imports sympy, whatever is differentiated
    call = OURS[name]
    times = []
    for length in (2048, 3001, 2048):
        leaves = inputs(1, length)
        grad = torch.ones(1, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        both(call, leaves, grad)(0)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    print(json.dumps(times))


def cold(rows: list[dict[str, object]]) -> None:
    """First calls of ours, compilation included."""
    for name in OURS:
        row: dict[str, object] = {"kind": "cold", "attention": name}
        with tempfile.TemporaryDirectory() as cache:
            run = subprocess.run(
                [sys.executable, __file__, "--cold", name], env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True, text=True,
            )  # fmt: skip
        if run.returncode:
            row["error"] = run.stderr.strip().splitlines()[-1]
        else:
            row["first_s"], row["new_length_s"], row["again_s"] = json.loads(run.stdout.splitlines()[-1])
        rows.append(row)
        print(row)


def tune() -> None:
    """Times of other configurations of the pass for the output; for whoever chooses the table in kernels/_passes.py."""
    known, config = _passes._config, _passes._Config
    leaves = inputs(4, 2**13)
    grad = torch.randn(4, HEADS, 2**13, DIM, device="cuda", dtype=torch.bfloat16)
    for other in ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2)):

        def chosen(x: int, dtype: torch.dtype, out: bool, plain: bool = True, made: Any = other) -> Any:
            return config(*made) if out else known(x, dtype, out, plain)

        _passes._config = chosen
        times = [microseconds(both(call, leaves, grad), 5) / 1e3 for call in OURS.values()]
        print(other, *(f"{name} {t:.3f}" for name, t in zip(OURS, times, strict=True)))
    _passes._config = known


def main() -> None:
    """Measure, print, write after every section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--commit", default=None, help="name of the measured state; git is asked without it")
    parser.add_argument("--minutes", type=float, default=6, help="after which peers are left out")
    parser.add_argument("--tune", action="store_true", help="time other configurations instead")
    parser.add_argument("--cold", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.cold:
        cold_call(options.cold)
        return
    if options.tune:
        tune()
        return
    deadline = time.monotonic() + 60 * options.minutes
    copy = copy_rate()
    print(f"copy {copy:.0f} GB/s")
    rows: list[dict[str, object]] = []
    result = {
        "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or commit(),
        "shape": {"heads": HEADS, "head_dim": DIM, "dtype": "bfloat16"},
        "copy_gb_s": copy,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a peer's first call is a cold one
        for section in (partial(decoding, copy), cold, partial(lengths, copy, deadline)):
            section(rows)
            torch.cuda.empty_cache()
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
