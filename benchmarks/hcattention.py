# SPDX-License-Identifier: Apache-2.0
"""HCAttention from 128k to 4,000,000 tokens on one GPU with 80 GB to spend, beside resident attention and offloading.

    python benchmarks/hcattention.py [--json benchmarks/hcattention.json] [--limit 150]

The attention of Llama-3-8B: 32 layers, 32 query heads, 8 key/value heads, 128 channels, batch 1, bfloat16. Weights are
not run; 16 GB of the 80 are set aside for them, and an arm that needs more on the device than the rest is not run.

What is random. Keys are Gaussian, coded by codebooks that k-means found on a sample; codes of the many tokens are drawn
at random, which gives logits of the same distribution without coding 4,000,000 tokens. How much a share of .9 of the
attention keeps is then a matter of the spread of the logits alone: 2.29 keeps the 15.6 % that the paper reports, 3.33
keeps 2 %. Half of a query's variance is common to the four query heads of a group. Kept and fetched shares are
measured. Values are whatever the host's memory holds after being filled with one chunk over and over.

What does not fit. The host here has 128 GiB. Values of 4,000,000 tokens in 32 layers take 262 GB in 16 bits and 131 GB
in FP8, so that no more than 16 GiB of host memory are held, page-locked, and layers take turns with them:
``layers_on_host`` says how many distinct layers there are, ``host_bytes`` what all would need. Codes of all 32 layers
are on the device, as are keys and values of the resident arm. ``fits`` says whether the bytes of all layers and
weights are within 80 GB; ``peak_bytes``, of the measurement, has in it what a step works with.

Seconds a token are those of 32 layers of a decoded token: coding the token that leaves the window, copying its value to
the host, attention. Offloading copies keys and values of a whole layer to the device for each layer and attends with
the library's kernel; with a second stream its copies could hide the attention, which is what the resident arm takes.
Prefill is counted apart: attention of one chunk of queries over all that comes before, which is on the host, with its
copies, and coding a chunk of keys. The time of a whole prompt is reckoned from these, the attention of an average chunk
taking half of the last one's.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyheads.attention import offloaded, product_codes
from manyheads.attention.offloaded import HostRows
from manyheads.caches.hcattention._coded import CodedTokens
from manyheads.environment import environment

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 32
CONTEXTS = (131072, 262144, 524288, 1048576, 2097152, 4_000_000)
BUDGET, WEIGHTS = 80 * 10**9, 16 * 10**9
POOL = 2**34  # bytes of host memory
SPREADS = {"15.6 %": 2.29, "2 %": 3.33}
SINKS, RECENT, ROOM, CHUNK, TOP_P = 4, 32, 64, 4096, 0.9
SCALE = DIM**-0.5


class Run:
    """What all arms share: the device, host memory, and the time that is left."""

    def __init__(self, device: str, pool: int, limit: float, layers: int) -> None:
        self.device, self.layers, self.end = torch.device(device), layers, time.monotonic() + limit
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        begun = time.perf_counter()
        self.pool = torch.empty(pool, dtype=torch.uint8, pin_memory=device == "cuda")
        self.pool_seconds = time.perf_counter() - begun
        some = torch.randn(2**20).to(self.dtype).view(torch.uint8)
        for start in range(0, pool, len(some)):
            part = self.pool[start : start + len(some)]
            part.copy_(some[: len(part)])
        self.made = torch.Generator(device).manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.made, device=self.device).to(self.dtype)

    def on_host(self, tokens: int, parts: int) -> list[list[Tensor]]:
        """For as many layers as the pool holds, ``parts`` tensors ``[tokens, 1, Hkv, d]``."""
        each = tokens * KV_HEADS * DIM * self.dtype.itemsize
        count = min(self.layers, len(self.pool) // (each * parts))
        shape = (tokens, 1, KV_HEADS, DIM)

        def part(i: int) -> Tensor:
            return self.pool[i * each : (i + 1) * each].view(self.dtype).view(shape)

        return [[part(i * parts + j) for j in range(parts)] for i in range(count)]

    def sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable[[], object], rounds: int) -> float:
        """Of one call, after one that is not counted."""
        call()
        begun = self.sync()
        for _ in range(rounds):
            call()
        return (self.sync() - begun) / rounds

    def queries(self, spread: float) -> Tensor:
        """``[1, H, d]`` whose logits over Gaussian keys have this spread, half of the variance shared in a group."""
        shared = self.draw(1, KV_HEADS, 1, DIM).float().expand(-1, -1, HEADS // KV_HEADS, -1)
        own = self.draw(1, KV_HEADS, HEADS // KV_HEADS, DIM).float()
        return ((shared + own) * (spread / (SCALE * (2 * DIM) ** 0.5))).flatten(1, 2).to(self.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query over keys ``[1, Hkv, S, d]``: the library's kernel on a GPU."""
    if not q.is_cuda:
        return scaled_dot_product_attention(q[:, :, None], k, v, scale=SCALE, enable_gqa=True)[:, :, 0]
    from manyheads.kernels.decode import decode_attention

    size = k.shape[2]
    offsets = torch.arange(KV_HEADS, device=q.device)[None] * size
    lengths = torch.full((1, KV_HEADS), size, dtype=torch.int32, device=q.device)
    flat = (x.reshape(-1, DIM) for x in (k, v))
    return decode_attention(q, *flat, offsets, lengths, scale=SCALE, capacity=size)[0]


def resident(run: Run, context: int) -> Iterator[dict[str, Any]]:
    """Keys and values of all layers on the device."""
    needed = 2 * run.layers * context * KV_HEADS * DIM * run.dtype.itemsize
    row = {"arm": "resident", "context": context, "device_bytes": needed, "host_bytes": 0}
    if needed + WEIGHTS > BUDGET:
        yield {**row, "fits": False}
        return
    caches = [[run.draw(1, KV_HEADS, context, DIM) for _ in "kv"] for _ in range(run.layers)]
    q = run.queries(2.29)
    taken = run.seconds(lambda: [attend(q, k, v) for k, v in caches], 3)
    yield {**row, "fits": True, "seconds_per_token": taken}


def whole_layers(run: Run, context: int) -> Iterator[dict[str, Any]]:
    """Keys and values of all layers on the host, one layer at a time copied to the device."""
    held = run.on_host(context, 2)
    k, v = (torch.empty(1, KV_HEADS, context, DIM, device=run.device, dtype=run.dtype) for _ in "kv")
    q = run.queries(2.29)

    def layer(i: int) -> None:
        for target, source in zip((k, v), held[i % len(held)], strict=True):
            target.view(-1).copy_(source.view(-1), non_blocking=True)
        attend(q, k, v)

    taken = run.seconds(lambda: [layer(i) for i in range(run.layers)], 1)
    yield {
        "arm": "whole-layer offloading", "context": context, "device_bytes": k.nbytes + v.nbytes,
        "host_bytes": run.layers * (k.nbytes + v.nbytes), "fits": k.nbytes + v.nbytes + WEIGHTS <= BUDGET,
        "layers_on_host": len(held), "seconds_per_token": taken,
    }  # fmt: skip


def hcattention(run: Run, context: int, groups: int, host: bool = False) -> Iterator[dict[str, Any]]:
    """Codes of all layers on the device, values on the host."""
    sample = run.draw(1, KV_HEADS, 8192, DIM)
    books = product_codes.fit(sample, groups, 256, iterations=5)
    held = run.on_host(context + ROOM, 1)
    layers = []
    for i in range(run.layers):
        values = HostRows.__new__(HostRows)
        values.device, values.data, values.size = run.device, held[i % len(held)][0], context - RECENT
        tail = run.draw(1, KV_HEADS, RECENT, DIM), run.draw(1, KV_HEADS, RECENT, DIM)
        tokens = CodedTokens.empty(books, tail, RECENT, SINKS, values, fp8=False)
        shape = (1, KV_HEADS, groups, context + ROOM)
        tokens.codes = torch.randint(256, shape, dtype=torch.uint8, device=run.device, generator=run.made)
        tokens.coded = context - RECENT
        layers.append(tokens)
    device = sum(x.nbytes for tokens in layers for x in (tokens.codes, *tokens.recent, *tokens.sinks))
    device += run.layers * books.nbytes
    row = {
        "arm": f"hcattention, {groups} sub-vectors" + (", summed on the host" if host else ""), "context": context,
        "device_bytes": device, "host_bytes": run.layers * held[0][0].nbytes, "fits": device + WEIGHTS <= BUDGET,
        "layers_on_host": len(held),
    }  # fmt: skip
    new = run.draw(1, KV_HEADS, 1, DIM), run.draw(1, KV_HEADS, 1, DIM)
    for name, spread in SPREADS.items():
        q, found = run.queries(spread), []

        def layer(tokens: CodedTokens, q: Tensor = q, found: list[Tensor] = found) -> None:
            tokens.take(new)
            k, v, seen, first = tokens.exact(None)
            got = offloaded.decode_attention(
                q, tokens.codes, tokens.centroids, tokens.values, k, v, count=tokens.coded, scale=SCALE,
                exact_mask=seen, first=first, top_p=TOP_P, host=host,
            )  # fmt: skip
            found.append(got.fetched)

        taken = run.seconds(lambda layer=layer: [layer(tokens) for tokens in layers], 1 if host else 3)
        share = float(torch.stack(found[-run.layers :]).float().mean()) / context
        yield {
            **row,
            "kept_aimed_at": name,
            "fetched_share": share,
            "seconds_per_token": taken,
            **steps(run, layers, q),
        }


def steps(run: Run, layers: list[CodedTokens], q: Tensor) -> dict[str, Any]:
    """Seconds of the parts of a layer, and the share that a head keeps."""
    tokens = layers[0]
    table = product_codes.lookup_table(q, tokens.centroids, SCALE)
    if offloaded.kernel_takes(q, tokens.centroids):
        from manyheads.kernels import product_codes as fast

        def logits() -> tuple[Tensor, Tensor]:
            return fast.table_logits(table, tokens.codes, tokens.coded)

        x, lse = logits()
        need = torch.full_like(lse, TOP_P)
        lowest = fast.select(x, lse, need)
        parts = {
            "seconds_logits": run.seconds(logits, 3),
            "seconds_select": run.seconds(lambda: fast.select(x, lse, need), 3),
            "seconds_fetch": run.seconds(lambda: fast.fetch(x, lse, lowest, tokens.values.data), 3),
        }
    else:
        x, parts = product_codes.table_logits(table, tokens.codes[..., : tokens.coded]), {}
        lse = x.logsumexp(2)
        lowest = product_codes.select(x, lse, torch.full_like(lse, TOP_P))
    return {"kept_share": float((x >= lowest[..., None]).float().mean()), **parts}


def prefill(run: Run, context: int) -> Iterator[dict[str, Any]]:
    """The last chunk of a prompt over all that comes before it, from the host, and coding a chunk."""
    k, v = run.on_host(context, 2)[0]
    chunk = min(CHUNK, context)
    q = run.draw(1, HEADS, chunk, DIM)
    books = product_codes.fit(run.draw(1, KV_HEADS, 4096, DIM), DIM // 2, 256, iterations=2)

    def read(x: Tensor) -> Tensor:
        return x.to(run.device, non_blocking=True).permute(1, 2, 0, 3)

    copies = run.seconds(lambda: (read(k), read(v)), 1)
    on_device = read(k).contiguous(), read(v).contiguous()
    whole = run.seconds(lambda: scaled_dot_product_attention(q, *on_device, scale=SCALE, enable_gqa=True), 1)
    coding = run.seconds(lambda: product_codes.encode(on_device[0][:, :, :chunk], books), 1)
    chunks = -(-context // chunk)
    yield {
        "arm": "prefill", "context": context, "chunk": chunk, "seconds_copies_last": copies,
        "seconds_attention_last": whole, "seconds_coding": coding,
        "seconds_prompt_reckoned": run.layers * chunks * ((copies + whole) / 2 + coding),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write after every arm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/hcattention.json"))
    parser.add_argument("--limit", type=float, default=150, help="seconds, after which nothing more is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--pool", type=int, default=POOL, help="bytes of host memory")
    given = parser.parse_args()
    run = Run(given.device, given.pool, given.limit, given.layers)
    report: dict[str, Any] = {
        "environment": environment(), "shape": [given.layers, HEADS, KV_HEADS, DIM], "budget_bytes": BUDGET,
        "weights_bytes": WEIGHTS, "pool_bytes": given.pool, "seconds_to_lock_the_pool": run.pool_seconds,
        "top_p": TOP_P, "sinks": SINKS, "recent": RECENT, "not_run": [], "rows": [],
    }  # fmt: skip
    longest_first = sorted(given.contexts, key=lambda size: (size != max(given.contexts), size))
    for context in longest_first:  # the headline is measured whatever the rest takes
        arms: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "hcattention, 32": lambda context=context: hcattention(run, context, DIM // 4),
            "hcattention, 64": lambda context=context: hcattention(run, context, DIM // 2),
            "whole-layer offloading": lambda context=context: whole_layers(run, context),
            "resident": lambda context=context: resident(run, context),
            "prefill": lambda context=context: prefill(run, context),
        }
        if context == min(given.contexts):
            arms["summed on the host"] = lambda context=context: hcattention(run, context, DIM // 2, host=True)
        for name, arm in arms.items():
            try:
                if time.monotonic() > run.end:
                    raise TimeoutError("no time left")
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                for row in arm():
                    if run.device.type == "cuda":
                        row["peak_bytes"] = torch.cuda.max_memory_allocated()
                    report["rows"].append(row)
                    print(row, flush=True)
            except (TimeoutError, torch.OutOfMemoryError, RuntimeError, ValueError) as error:
                report["not_run"].append({"arm": name, "context": context, "why": f"{error}"[:300]})
                print(report["not_run"][-1], flush=True)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
