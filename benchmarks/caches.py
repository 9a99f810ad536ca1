# SPDX-License-Identifier: Apache-2.0
"""Prompt, peak memory, cache bytes and time per token at long context: manyheads, transformers' own caches, kvpress.

The model has Llama-3-8B's shape and random weights (bfloat16): speed and memory do not depend on what they say. Every
row is measured in one process on one GPU, beside the bytes that bound it. Needs a GPU with 80 GB:

    python benchmarks/caches.py --json benchmarks/caches.json

kvpress 0.5.5 needs transformers below 5.3, which manyheads does not run on: give it a folder of its own, made by
``pip install --target peer kvpress==0.5.5``, and its rows are measured by a second process:

    python benchmarks/caches.py --peer peer --json benchmarks/caches.json

Decoding is greedy. Ours goes through ``manyheads.integrations.decoding.decode`` (``compiled`` says whether its step was
compiled before it was captured; that takes a minute a row), StaticCache through ``generate``, which compiles it, its
own overhead included; the others run the bare model in a loop without waiting for a token, and without cuDNN's
attention, which would prepare itself anew for every length (76 ms per token instead of 29 for kvpress on an H100).
"""

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

SLOTS = 8192  # 12.5 % of 65,536
NEW = 96  # tokens decoded
WARM = 32  # of them not timed: compilation and capture
CHUNK = 4096
KEPT = ("snapkv", "fireq+snapkv")


@dataclass(frozen=True)
class Case:
    """One measurement."""

    arm: str
    context: int
    batch: int
    compiled: bool = True

    @property
    def slots(self) -> int:
        return min(SLOTS, self.context // 8)


def build() -> Any:
    """Llama-3-8B's shape with random weights on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=2**20 + 4096, rope_theta=500_000.0, eos_token_id=None,
        pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    config.dtype = torch.bfloat16
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model = model.to_empty(device="cuda").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to("cuda")
    model.generation_config.eos_token_id = None
    return model


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written bytes both counted."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    b.copy_(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * a.numel() / (start.elapsed_time(end) / 1e3)


class Clock:
    """A stopping criterion that never stops and notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        self.times.append(perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def per_token(self) -> float:
        """Median milliseconds between tokens, after the warm-up."""
        late = self.times[WARM:]
        return 1e3 * median(b - a for a, b in pairwise(late))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The value of ``work()`` and the seconds that it took."""
    torch.cuda.synchronize()
    start = perf_counter()
    value = work()
    torch.cuda.synchronize()
    return value, perf_counter() - start


def generated(model: Any, ids: torch.Tensor, cache: Any) -> float:
    """Milliseconds per token within ``generate``."""
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW, do_sample=False,
        stopping_criteria=[clock],
    )  # fmt: skip
    return clock.per_token()


def looped(model: Any, ids: torch.Tensor, cache: Any) -> float:
    """Milliseconds per token of a loop without host synchronisation."""
    token, place = ids[:, -1:], torch.tensor([[ids.shape[1] - 1]], device=ids.device)

    def run(count: int) -> None:
        nonlocal token, place
        for _ in range(count):
            logits = model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True).logits
            token, place = logits[:, -1:].argmax(-1), place + 1

    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with torch.no_grad():
            run(WARM)
            return 1e3 * timed(lambda: run(NEW - WARM))[1] / (NEW - WARM)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def held(cache: Any) -> int:
    """Bytes of the storages of a transformers cache."""
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if isinstance(x, torch.Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def ours(model: Any, case: Case, ids: torch.Tensor) -> dict[str, Any]:
    """A budget of slots, evicted chunk by chunk; compiled decoding."""
    import manyheads
    from manyheads.integrations.decoding import decode
    from manyheads.integrations.transformers import new_cache, prefill

    budget = f"budget={case.slots},schedule=chunk"
    spec = {"snapkv": f"snapkv:{budget}", "fireq+snapkv": f"fireq:base=snapkv,{budget}"}[case.arm]
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse(spec), room=NEW + 32)
        _, seconds = timed(lambda: prefill(model, ids, cache, CHUNK))
        size, peak = cache.bytes(), torch.cuda.max_memory_allocated() / 2**30
        looks: list[float] = []

        def look(_: int) -> None:
            torch.cuda.synchronize()
            looks.append(perf_counter())

        decode(model, ids, cache, NEW, progress=look, compiled=case.compiled)
        per_token = 1e3 * (looks[-1] - looks[0]) / (NEW - WARM)
        return {"prefill_s": seconds, "prefill_peak_gib": peak, "cache_bytes": size, "ms_per_token": per_token,
                "compiled": case.compiled}  # fmt: skip


def full(model: Any, case: Case, ids: torch.Tensor) -> dict[str, float]:
    """transformers' dynamic cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        _, seconds = timed(lambda: model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1))
    size = held(cache)
    return {"prefill_s": seconds, "cache_bytes": size, "ms_per_token": looped(model, ids, cache)}


def static(model: Any, case: Case, ids: torch.Tensor) -> dict[str, float]:
    """transformers' static cache of the whole length; compiled decoding."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=case.context + NEW)

    def read() -> None:
        with torch.no_grad():
            for piece in ids[:, :-1].split(CHUNK, 1):
                model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)

    _, seconds = timed(read)
    return {"prefill_s": seconds, "cache_bytes": held(cache), "ms_per_token": generated(model, ids, cache)}


def kvpress(model: Any, case: Case, ids: torch.Tensor) -> dict[str, float]:
    """The prompt in one forward, pruned after it."""
    from kvpress import SnapKVPress
    from transformers import DynamicCache

    press, cache = SnapKVPress(compression_ratio=1 - case.slots / case.context, window_size=32), DynamicCache()
    with torch.no_grad(), press(model):
        _, seconds = timed(lambda: model.model(ids[:, :-1], past_key_values=cache, use_cache=True))
    size = held(cache)
    return {"prefill_s": seconds, "cache_bytes": size, "ms_per_token": looped(model, ids, cache)}


ARMS: dict[str, Callable[[Any, Case, torch.Tensor], dict[str, Any]]] = {
    "snapkv": ours, "fireq+snapkv": ours, "transformers full": full, "transformers static": static, "kvpress": kvpress,
}  # fmt: skip


def cases(arms: list[str], contexts: list[int], batches: list[int], compiled: bool) -> list[Case]:
    """Every arm at every context and batch; the longest contexts at batch 1, and a million with a budget only."""
    found = []
    for batch in batches:
        for context in contexts:
            for arm in arms:
                if (batch > 1 and context > 32_768) or (context > 131_072 and arm not in KEPT[:1]):
                    continue
                if arm == "transformers static" and (batch > 1 or context not in (8192, 65_536)):
                    continue
                found.append(Case(arm, context, batch, compiled))
    return found


def measure(model: Any, case: Case) -> dict[str, Any]:
    """The row of one case; an arm that does not fit in memory says so."""
    gc.collect()  # the caches and graphs of the row before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator(device="cuda").manual_seed(case.context)
    ids = torch.randint(2, 128_000, (case.batch, case.context), device="cuda", generator=generator)
    row: dict[str, Any] = {"arm": case.arm, "context": case.context, "batch": case.batch}
    if case.arm in KEPT or case.arm == "kvpress":
        row["slots"] = case.slots
    try:
        row |= ARMS[case.arm](model, case, ids)
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def run(todo: list[Case], keep: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
    """Measure and print; ``keep`` is given the rows so far after each."""
    import transformers

    model = build()
    weights = (
        sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.numel() * 2
    )  # looked up, not read
    bandwidth = copy_bandwidth()
    rows = []
    for case in todo:
        row = measure(model, case) | {"transformers": transformers.__version__}
        if "ms_per_token" in row:
            row["limit_ms"] = 1e3 * (weights + row["cache_bytes"]) / bandwidth
        row["copy_bandwidth_gbs"] = bandwidth / 1e9
        rows.append(row)
        print(json.dumps(row), flush=True)
        keep(rows)
    return rows


def store(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to the file, in place of earlier ones of the same case."""
    from manyheads.environment import environment
    from manyheads.files import write_atomically

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["arm"], row["context"], row["batch"]

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {case(row) for row in rows}
    kept = [row for row in old if case(row) not in fresh]
    document = {"model": "Llama-3-8B shape, random weights, bfloat16",
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "environment": environment(),
                "rows": sorted([*kept, *rows], key=lambda row: (row["batch"], row["context"], row["arm"]))}  # fmt: skip
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS), help=f"some of {', '.join(ARMS)}")
    parser.add_argument("--contexts", default="8192,32768,65536,131072", help="tokens of a prompt")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--uncompiled", action="store_true", help="capture ours without compiling them")
    parser.add_argument("--peer", type=Path, help="folder that holds kvpress and its transformers")
    parser.add_argument("--json", type=Path, help="file to add the rows to")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # where the process of the peer writes
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device")
    arms, contexts = given.arms.split(","), [int(n) for n in given.contexts.split(",")]
    batches = [int(n) for n in given.batches.split(",")]
    if given.rows:
        run(cases(arms, contexts, batches, False), lambda rows: given.rows.write_text(json.dumps(rows)))
        return
    mine = cases([arm for arm in arms if arm != "kvpress"], contexts, batches, not given.uncompiled)
    if mine:
        run(mine, lambda rows: given.json and store(rows, given.json))
    if given.peer and "kvpress" in arms:
        torch.cuda.empty_cache()
        answer = given.json.with_suffix(".peer.json") if given.json else Path("peer.json")
        command = [sys.executable, __file__, "--arms", "kvpress", "--contexts", given.contexts, "--batches",
                   given.batches, "--rows", str(answer)]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(given.peer)})
        if given.json:
            store(json.loads(answer.read_text()), given.json)
        answer.unlink()


if __name__ == "__main__":
    main()
