# SPDX-License-Identifier: Apache-2.0
"""Where the seconds of a kernel's first call go: a fresh process for each, with an empty Triton cache.

    python benchmarks/first_call.py [--json benchmarks/first_call.json] [--only NAME ...] [--seconds 300]

A process imports torch, starts CUDA (a matrix product and its backward pass), imports manyheads, then the kernel's
module (and with it Triton), and calls it: that call is ``first_s``. It is compared with the sum of what Triton reports
of its compilations, stage by stage (``ptx`` is LLVM, ``cubin`` is ptxas); kernels that are compiled in threads overlap,
so that the sum may be more than the call. ``modules`` are those that the call imported: a compiler that nobody asked
for shows here. ``again_s`` is the second call, ``other_s`` the first one at another length, which should compile
nothing. Results are written after each kernel.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[int], object]
NAMES = (
    "block_sparse", "block_sparse_tokens", "block_sparse_backward", "accumulated_attention", "row_statistics",
    "column_sum", "band", "pool", "decode_plain", "decode_int4", "decode_fp8", "int4_fp8_matmul", "lightning",
    "mlstm_backward",
)  # fmt: skip


def drawn(length: int, grad: bool = False, heads: int = 8) -> list[Any]:
    """q, k, v ``[1, heads, length, 128]``; k and v with half as many heads."""
    import torch

    made = [torch.ones(1, h, length, 128, device="cuda", dtype=torch.bfloat16) for h in (heads, heads // 2, heads // 2)]
    return [x.requires_grad_(grad) for x in made]


def block_sparse(tokens: bool = False, grad: bool = False) -> Run:
    """Forward, or forward and backward, over a window of blocks or of tokens."""
    import torch

    from manyheads.attention import patterns
    from manyheads.attention.sparse import block_sparse_attention

    made = {
        n: patterns.a_shape(n, n, 64, 256, block_k=1 if tokens else 128, device="cuda") for n in (2048, 3001)
    }  # fmt: skip

    def run(length: int) -> object:
        leaves = drawn(length, grad)
        out = block_sparse_attention(*leaves, made[length], scale=0.1, impl="triton")
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if grad else out

    return run


def probes(name: str) -> Run:
    """The statistics of attention weights."""
    import torch

    from manyheads.kernels import accumulated_attention as mass
    from manyheads.kernels import probe

    def run(length: int) -> object:
        q, k, _ = drawn(length)
        if name == "accumulated_attention":
            return mass.accumulated_attention(q, k, scale=0.1)
        lse = torch.zeros(q.shape[:3], device="cuda")
        if name == "row_statistics":
            return probe.row_statistics(q, k, scale=0.1, distance=True)
        if name == "column_sum":
            return probe.column_sum(q, k, lse, torch.ones(1, length, 2, device="cuda"), scale=0.1)
        if name == "band":
            return probe.band(q, k, lse, torch.ones(64, device="cuda"), scale=0.1)
        return probe.pool(q, k, lse, 32, scale=0.1)

    return run


def decode(codec: str) -> Run:
    """One query over a ragged cache."""
    import torch

    from manyheads.kernels.decode import decode_attention

    def run(length: int) -> object:
        planes: list[torch.Tensor] = []
        scales = {}
        for name in "kv":
            x = torch.zeros(8 * length, 128, device="cuda", dtype=torch.bfloat16)
            if codec != "plain":
                x = (
                    torch.zeros(8 * length, 64, device="cuda", dtype=torch.uint8)
                    if codec == "int4"
                    else x.to(torch.float8_e4m3fn)
                )
                scales[f"{name}_scale"] = torch.ones(8 * length, device="cuda", dtype=torch.bfloat16)
            planes.append(x)
        offsets = (torch.arange(8, device="cuda") * length)[None]
        lengths = torch.full((1, 8), length, device="cuda", dtype=torch.int32)
        q = torch.ones(1, 32, 128, device="cuda", dtype=torch.bfloat16)
        return decode_attention(q, *planes, offsets, lengths, scale=0.1, capacity=4096, **scales)

    return run


def matmul() -> Run:
    """FP8 activations times INT4 weights."""
    import torch

    from manyheads.kernels.int4_fp8 import int4_fp8_matmul

    def run(length: int) -> object:
        x = torch.ones(length, 2048, device="cuda").to(torch.float8_e4m3fn)
        codes = torch.zeros(1024, 1024, device="cuda", dtype=torch.uint8)
        sigma = torch.ones(1024, 16, device="cuda").to(torch.float8_e4m3fn)
        scale = torch.ones(length, device="cuda")
        return int4_fp8_matmul(x, scale, codes, sigma, group=128, factor=1.0, dtype=torch.bfloat16)

    return run


def recurrence(norm: str | None, grad: bool) -> Run:
    """Linear attention with decay."""
    import torch

    from manyheads.attention.recurrence import decay_attention

    def run(length: int) -> object:
        leaves = drawn(length, grad)
        gate = -torch.ones(1, 4, length, device="cuda") if norm else -torch.ones(4, device="cuda")
        floor = {"floor": torch.ones(1, 8, length, device="cuda")} if norm else {}
        out, _ = decay_attention(*leaves, gate, scale=0.1, norm=norm, impl="triton", **floor)  # type: ignore[arg-type]
        return torch.autograd.grad(out, leaves, torch.ones_like(out)) if grad else out

    return run


def runner(name: str) -> Run:
    """The call of a name; this imports the module of its kernel."""
    if name.startswith("block_sparse"):
        return block_sparse(tokens="tokens" in name, grad="backward" in name)
    if name.startswith("decode"):
        return decode(name.removeprefix("decode_"))
    if name == "int4_fp8_matmul":
        return matmul()
    if name in ("lightning", "mlstm_backward"):
        return recurrence("mlstm" if "mlstm" in name else None, "backward" in name)
    return probes(name)


def child(name: str) -> None:
    """In a process of its own: seconds of each step."""
    found: dict[str, Any] = {"kernel": name}
    begin = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal begin
        found[step] = time.perf_counter() - begin
        begin = time.perf_counter()

    import torch

    lap("import_torch_s")
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    torch.autograd.grad(x @ x, x, x)
    torch.cuda.synchronize()
    lap("start_cuda_s")
    import manyheads.kernels

    assert manyheads.kernels.available()
    lap("import_manyheads_s")
    run = runner(name)
    import triton

    torch.cuda.synchronize()
    lap("import_kernel_s")
    kernels: list[dict[str, Any]] = []

    def listen(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        stages = {stage: us / 1e6 for stage, us in times.lowering_stages}
        kernels.append({"name": metadata["name"] if isinstance(metadata, dict) else src.name, "cache_hit": cache_hit}
                       | {"frontend": times.ir_initialization / 1e6, **stages})  # fmt: skip

    triton.knobs.compilation.listener = listen
    before = set(sys.modules)
    begin = time.perf_counter()
    for step, length in (("first_s", 2048), ("again_s", 2048), ("other_s", 3001)):
        count = len(kernels)
        run(length)
        torch.cuda.synchronize()
        lap(step)
        found[step.replace("_s", "_compiled")] = len(kernels) - count
    found["kernels"] = kernels
    found["modules"] = len(set(sys.modules) - before)
    found["imports_compiler"] = "torch._dynamo" in sys.modules
    print(json.dumps(found))


def main() -> None:
    """A process for each kernel; print and write as they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES, help="kernels")
    parser.add_argument("--seconds", type=float, default=300, help="after which no process is begun")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    from decode import commit  # benchmarks/decode.py
    from manyheads.environment import environment

    rows: list[dict[str, Any]] = []
    result = {"environment": environment(), "commit": commit(), "rows": rows}
    end = time.monotonic() + options.seconds
    for name in options.only:
        if time.monotonic() > end:
            rows.append({"kernel": name, "error": "left out: out of time"})
            continue
        with tempfile.TemporaryDirectory() as cache:
            run = subprocess.run(
                [sys.executable, __file__, "--child", name], env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
        row = json.loads(run.stdout.splitlines()[-1]) if not run.returncode else {
            "kernel": name, "error": run.stderr.strip().splitlines()[-1]
        }  # fmt: skip
        rows.append(row)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if "error" in row:
            print(f"{name:24} {row['error']}", flush=True)
            continue
        steps = " ".join(f"{k.removesuffix('_s')} {v:.2f}" for k, v in row.items() if k.endswith("_s"))
        print(f"{name:24} {steps}; {row['modules']} modules, compiler {row['imports_compiler']}", flush=True)
        for kernel in row["kernels"]:
            print("   ", {k: round(v, 2) if isinstance(v, float) else v for k, v in kernel.items()}, flush=True)


if __name__ == "__main__":
    main()
