# SPDX-License-Identifier: Apache-2.0
"""INT4 weights times FP8 activations on a GPU, beside cuBLAS in bf16, torch's FP8 product and torchao, in one run.

    python benchmarks/fireq_linear.py [--json benchmarks/fireq_linear.json]

Linear layers of Llama-3-8B, 1 to 4,096 tokens. Every call is timed inside a CUDA graph of many, and reads another copy
of the weight than the calls before it, so that the L2 cache holds none. ``matmul`` rows have their inputs rounded
already; ``linear`` rows begin and end in bf16. The limit of a row is the longer of two times: its bytes (weight with
scales, inputs, outputs) at the rate of torch's device-to-device copy, measured in the same run, and its operations at
the device's dense peak in that format, where the device is known. Ratios are to cuBLAS in bf16 of the same shape. What
torchao cannot do here is a row with the reason. Takes about a minute, most of it compilation.
"""

import argparse
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decode import COLD, Call, commit, copy_rate, microseconds  # benchmarks/decode.py
from manyheads.attention import int4_fp8
from manyheads.attention.codec import FP8
from manyheads.environment import environment

LAYERS = {"up": (14_336, 4096), "down": (4096, 14_336), "qkv": (6144, 4096)}
TOKENS = (1, 16, 64, 256, 1024, 4096)
PEAKS = {"H100": {"bf16": 989e12, "fp8": 1979e12}, "H200": {"bf16": 989e12, "fp8": 1979e12}}  # dense, NVIDIA
AO = {
    "torchao int4": ("Int4WeightOnlyConfig", "bf16"),
    "torchao fp8": ("Float8DynamicActivationFloat8WeightConfig", "fp8"),
    "torchao fp8 x int4": ("Float8DynamicActivationInt4WeightConfig", "fp8"),
}

Arm = tuple[str, str, int, Callable[[Tensor], Call]]  # name, format of the product, bytes of a weight, make the call


def cycled(items: list[Any], use: Callable[[Any], object]) -> Call:
    """Call ``i`` uses item ``i``, over and over."""
    return lambda i: use(items[i % len(items)])


def arms(weight: Tensor) -> Iterator[Arm | tuple[str, str]]:
    """Everything that computes ``x W^T``, or a name and why it does not."""
    bf16 = [weight.clone() for _ in range(-(-COLD // weight.nbytes))]
    yield "cuBLAS bf16", "bf16", weight.nbytes, lambda x: cycled(bf16, lambda w: nn.functional.linear(x, w))

    rows, columns = weight.shape
    eight = [weight.to(torch.float8_e4m3fn) for _ in range(-(-COLD // weight.numel()))]
    ones = torch.ones(1, rows, device="cuda")

    def scaled_mm(x: Tensor) -> Call:
        codes, scale = FP8.encode(x)
        token = scale.float()[:, None].contiguous()
        return cycled(
            eight,
            lambda w: torch._scaled_mm(codes, w.T, scale_a=token, scale_b=ones, out_dtype=torch.bfloat16),
        )

    yield "torch fp8, matmul", "fp8", weight.numel(), scaled_mm
    for table in ("fp8", "exact"):
        first = int4_fp8.encode(weight, table=table, smoothing="mean" if table == "fp8" else "none")
        copies = [first] + [
            int4_fp8.PackedWeight(
                first.codes.clone(), first.scale.clone(), first.factors, first.shift, columns, first.group, table
            )
            for _ in range(-(-COLD // first.nbytes) - 1)
        ]

        def matmul(x: Tensor, copies: list[Any] = copies) -> Call:
            codes, scale = FP8.encode(x)
            return cycled(copies, lambda w: int4_fp8.multiply(codes, scale, w, torch.bfloat16, "kernel"))

        def linear(x: Tensor, copies: list[Any] = copies) -> Call:
            return cycled(copies, lambda w: int4_fp8.linear(x, w, impl="kernel"))

        yield f"ours, table {table}, matmul", "fp8", first.nbytes, matmul
        if table == "fp8":
            yield "ours, table fp8, linear", "fp8", first.nbytes, linear
    for name in AO:
        yield torchao(name, weight)


def torchao(name: str, weight: Tensor) -> Arm | tuple[str, str]:
    """A layer as torchao makes it, or why there is none."""
    try:
        import torchao.quantization as ao

        config, kind = AO[name]
        rows, columns = weight.shape
        layers = []
        for _ in range(-(-COLD // (weight.numel() // (1 if name == "torchao fp8" else 2)))):
            layer = nn.Linear(columns, rows, bias=False, device="cuda", dtype=torch.bfloat16)
            layer.weight.data.copy_(weight)
            model = nn.Sequential(layer)
            ao.quantize_(model, getattr(ao, config)())
            layers.append(model)
        layers[0](torch.zeros(16, columns, device="cuda", dtype=torch.bfloat16))
    except Exception as error:  # of any kind: it depends on versions of torch, torchao and what they were built for
        line = (str(error).strip().splitlines() or [""])[0]
        return name, f"{type(error).__name__}: {line}"
    size = weight.numel() if name == "torchao fp8" else weight.numel() // 2
    return name, kind, size, lambda x: cycled(layers, lambda model: model(x))


def peak(kind: str) -> float | None:
    """Operations per second of this device, where it is known."""
    found = [rates[kind] for name, rates in PEAKS.items() if name in torch.cuda.get_device_name()]
    return found[0] if found else None


def error(weight: Tensor) -> dict[str, float]:
    """Relative error of the kernel against float64, and of the whole layer against bf16, on 64 tokens."""
    x = torch.randn(64, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    packed = int4_fp8.encode(weight, smoothing="mean")
    assert packed.factors is not None
    codes, scale = FP8.encode(x.float() / packed.factors)
    want = int4_fp8.multiply_reference(codes, scale, packed)
    got = int4_fp8.multiply(codes, scale, packed, torch.float32, "kernel").double()
    whole = nn.functional.linear(x.double(), weight.double())
    layer = int4_fp8.linear(x, packed).double()
    return {
        "kernel": float((got - want).norm() / want.norm()), "layer": float((layer - whole).norm() / whole.norm()),
    }  # fmt: skip


@torch.inference_mode()
def measure(copy: float) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """A row for every layer, number of tokens and way to compute it; errors by layer."""
    rows: list[dict[str, Any]] = []
    errors = {}
    for layer, (outputs, inputs) in LAYERS.items():
        weight = torch.randn(outputs, inputs, device="cuda").bfloat16() * 0.02
        errors[layer] = error(weight)
        base: dict[int, float] = {}
        for arm in arms(weight):
            if len(arm) == 2:
                rows.append({"layer": layer, "arm": arm[0], "reason": arm[1]})
                continue
            name, kind, size, make = arm
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
                entry: dict[str, Any] = {"layer": layer, "arm": name, "tokens": tokens, "weight_bytes": size}
                try:
                    us = microseconds(make(x), 10, rounds=5)
                except Exception as problem:  # a shape that a peer does not take
                    rows.append({**entry, "reason": str(problem).splitlines()[0]})
                    continue
                wide = 1 if name.endswith("matmul") and name != "cuBLAS bf16" else 2
                moved = size + tokens * (inputs * wide + 2 * outputs)
                limit = moved / copy / 1e3
                if (rate := peak(kind)) is not None:
                    limit = max(limit, 2e6 * tokens * inputs * outputs / rate)
                base.setdefault(tokens, us)  # cuBLAS comes first
                rows.append({
                    **entry, "us": round(us, 2), "limit_us": round(limit, 2), "bytes": moved,
                    "times_faster_than_bf16": round(base[tokens] / us, 3),
                })  # fmt: skip
                print(f"{layer:5} {tokens:5} {name:28} {us:9.1f} us, limit {limit:8.1f}, {base[tokens] / us:5.2f}x")
        del weight
        torch.cuda.empty_cache()
    return rows, errors


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--commit", default=None, help="name of the measured state; git is asked without it")
    options = parser.parse_args()
    torch.manual_seed(0)
    copy = copy_rate()
    print(f"copy {copy:.0f} GB/s")
    rows, errors = measure(copy)
    result = {
        "environment": environment(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or commit(), "layers": LAYERS, "copy_gb_s": copy, "relative_error": errors,
        "rows": rows,
    }  # fmt: skip
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
