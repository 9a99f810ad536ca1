# SPDX-License-Identifier: Apache-2.0
"""HCAttention end to end: 4,000,000 tokens read and decoded on one GPU with 80 GB to spend, and what else could do it.

    python benchmarks/hcattention.py [--tokens 4000000] [--only hcattention] [--json benchmarks/hcattention.json]
    python benchmarks/hcattention.py --device cpu --tokens 4096 --layers 2 --small

The network has Llama-3-8B's shape, all of it: 32 layers of width 4096 with 32 query heads, 8 key/value heads of 128
channels and an MLP of 14336, a vocabulary of 128,256, random weights in bfloat16, as transformers runs it. Random
tokens are read in chunks by the library's ``prefill`` into ``hcattention:prompt=blocks,values=int4``; at each stop some
are decoded by the model's own forward through the same cache, and stay there. PyTorch may take no more of the GPU than
``--budget``, 80 GB, less 1 GB for what it does not count.

What was not done. Exact attention over 4,000,000 tokens costs 4e18 operations for the prompt alone. It is read over
blocks instead: each token sees the first 128, the 2,048 before it, and 8 blocks of 128 that mean keys and queries pick
for its chunk. All the rest of the network is as it is. ``exact prefill, reckoned`` says from a measured rate of causal
attention what exact reading would add. Decoding leaves nothing out: every step scores all tokens.

What is random. Random weights give logits without structure, so how many tokens hold nine tenths of the attention is
not what a trained model has; it is set. Queries of each layer are multiplied by a number (``factors``) so that a head's
logits have a standard deviation of ``spread`` over keys: were they Gaussian, 2.29 would keep the 15.6 % of tokens that
the paper reports for Llama-3-8B, and 3.33 keeps 2 %. The share that a head keeps (in three layers) and the share of the
values that a group of heads fetches (in all) are measured. The prompt is read with the first.

Beside it, in the same network and by the same forward: ``resident`` holds keys and values in bfloat16 on the device, at
stops that fit in the budget and at the largest length that does; ``whole-layer offloading`` holds them in page-locked
host memory and copies a layer's while the one before is computed, into two buffers. Their keys and values are
synthetic, and host memory is what ``--pool`` says: layers take turns, ``layers_on_host`` says how many there really
are. ``network alone`` is a token without a context, which all of them contain.

Seconds a token are medians; the first token after a prompt, which codes the window that was exact for it, is left out.
Rows are written as they come, so a run that is cut off keeps them; what is beside is then measured only where it lacks.
"""

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads
from hcattention_peers import Offload, Peer, Spread, attend
from manyheads import parse
from manyheads.attention import offloaded, product_codes
from manyheads.call import AttentionCall
from manyheads.environment import environment
from manyheads.integrations.transformers import cache_arguments, new_cache, prefill

STOPS = (131072, 524288, 1048576, 2097152, 4_000_000)
SPREADS = (3.33, 2.29)  # the last one is that of the prompt
TOP_P, COUNTED = 0.9, 10**9  # bytes of the budget that PyTorch does not count


class Late(Exception):
    """Nothing more is to be begun."""


class Bench:
    """The network, what it is given, and the report."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device, self.begun = given, torch.device(given.device), time.monotonic()
        self.cuda = self.device.type == "cuda"
        self.end = self.begun + given.limit
        if self.cuda:
            whole = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, (given.budget - COUNTED) / whole))
        small = given.small
        self.heads, self.kv_heads, self.dim = (4, 2, 16) if small else (32, 8, 128)
        config = LlamaConfig(
            hidden_size=self.heads * self.dim, intermediate_size=128 if small else 14336,
            vocab_size=256 if small else 128256,
            num_hidden_layers=given.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=2**23, rope_theta=500000.0,
        )  # fmt: skip
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with self.device:
            self.model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.weights = sum(p.nbytes for p in self.model.parameters())
        self.ids = torch.randint(config.vocab_size, (1, given.tokens + 64), device=self.device)
        self.factors, self.spread, self.path = [1.0] * given.layers, SPREADS[-1], given.json
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.q_proj.register_forward_hook(lambda _, __, q, i=i: q * (self.factors[i] * self.spread))
        self.report: dict[str, Any] = {}
        self.stops: list[int] = []

    def open_report(self) -> None:
        """Go on with what an earlier run of the same settings has measured."""
        setup = {
            "device": self.given.device, "shape": [self.given.layers, self.heads, self.kv_heads, self.dim],
            "budget_bytes": self.given.budget, "weights_bytes": self.weights, "strategy": self.given.spec,
            "chunk": self.given.chunk, "top_p": TOP_P,
        }  # fmt: skip
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        kept = before.get("rows", []) if all(before.get(name) == value for name, value in setup.items()) else []
        self.report = {"environment": environment(), **setup, "factors": self.factors, "not_run": [], "rows": kept}

    def add(self, row: dict[str, Any]) -> None:
        """Print and write a row; it replaces the one that had its place."""
        place = ("arm", "context", "spread")
        rows = [old for old in self.report["rows"] if any(old.get(name) != row.get(name) for name in place)]
        self.report["rows"] = [*rows, row]
        self.write(row)

    def write(self, news: dict[str, Any]) -> None:
        """Print what is new, and write all."""
        print(f"{time.monotonic() - self.begun:6.1f} s  {news}", flush=True)
        self.path.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")

    def has(self, arm: str, context: int) -> bool:
        """Whether a row is there already."""
        return any((row["arm"], row["context"]) == (arm, context) for row in self.report["rows"])

    def skip(self, arm: str, context: int, why: object) -> None:
        """Say what was not run."""
        self.report["not_run"].append({"arm": arm, "context": context, "why": str(why)[:300]})
        self.write(self.report["not_run"][-1])

    def in_time(self) -> None:
        """Raise where the time is over."""
        if time.monotonic() > self.end:
            raise Late("no time left")

    def decode(self, cache: Any, token: Tensor, count: int) -> list[float]:
        """Seconds of each of so many tokens, one after the other."""
        given, times = {**cache_arguments(self.model, cache), "logits_to_keep": 1}, []
        for _ in range(count):
            begun = time.perf_counter()
            token = self.model(input_ids=token.view(1, 1), **given).logits[0, -1].argmax()
            token.item()  # the model has come to its end
            times.append(time.perf_counter() - begun)
        return times

    def seconds(self, call: Callable[[], object], rounds: int = 3) -> float:
        """Of one call, after one that is not counted."""
        call()
        self.sync()
        begun = time.perf_counter()
        for _ in range(rounds):
            call()
        self.sync()
        return (time.perf_counter() - begun) / rounds

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """Give back what nothing holds: caches and calls refer to each other."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def memory(self) -> dict[str, int]:
        """Bytes on the device since the last question at most, and now in the eyes of the driver."""
        if not self.cuda:
            return {}
        free, whole = torch.cuda.mem_get_info()
        found = {"peak_bytes": torch.cuda.max_memory_allocated(), "driver_bytes": whole - free}
        torch.cuda.reset_peak_memory_stats()
        return found


def calibrate(bench: Bench) -> None:
    """Factors that give logits the spread of the prompt, in two rounds: a layer's depends on those before it."""
    for _ in range(2):
        with manyheads.use(bench.model, Spread()):
            bench.model(input_ids=bench.ids[:, : min(2048, bench.ids.shape[1] // 4)], use_cache=False, logits_to_keep=1)
        bench.factors = [f * bench.spread / Spread.found[i] for i, f in enumerate(bench.factors)]


def spied(store: Any) -> None:
    """Have a store remember the last single query ``[1, H, d]``, and its scale."""
    plain = store.attend

    def attend(call: AttentionCall) -> Tensor | None:
        if call.q.shape[2] == 1:
            store.last = call.q[:, :, 0], call.scale
        return plain(call)  # type: ignore[no-any-return]

    store.attend = attend


def parts(bench: Bench, store: Any) -> dict[str, float]:
    """Share of tokens that a head of this layer keeps, and seconds of the steps of its attention."""
    tokens, (q, scale) = store.tokens, store.last
    table = product_codes.lookup_table(q, tokens.centroids, scale)
    need = torch.full(q.shape[:2], TOP_P, device=q.device)
    if not offloaded.kernel_takes(q, tokens.centroids):
        x = product_codes.table_logits(table, tokens.codes[..., : tokens.coded])
        lowest = product_codes.select(x, x.logsumexp(2), need)
        return {"kept_share": float((x >= lowest[..., None]).float().mean())}
    from manyheads.kernels import product_codes as fast

    x, lse = fast.table_logits(table, tokens.codes, tokens.coded)
    lowest = fast.select(x, lse, need)
    kept = [float((x[:, h] >= lowest[:, h, None]).float().mean()) for h in range(x.shape[1])]
    return {
        "kept_share": statistics.mean(kept),
        "seconds_logits": bench.seconds(lambda: fast.table_logits(table, tokens.codes, tokens.coded)),
        "seconds_select": bench.seconds(lambda: fast.select(x, lse, need)),
        "seconds_fetch": bench.seconds(lambda: fast.fetch(x, lse, lowest, tokens.values.data, tokens.value_scale)),
    }


def stop(bench: Bench, cache: Any, stores: list[Any], read: dict[str, float]) -> None:
    """Decode at a context, and say what lies where."""
    context = int(cache.get_seq_length()) + 1
    token = bench.ids[:, context - 1]
    held = {
        "weights": bench.weights, "codes": sum(s.tokens.codes.nbytes for s in stores),
        "value_scales": sum(s.tokens.value_scale.nbytes for s in stores if s.tokens.value_scale is not None),
        "block_sums": sum(s.tokens.sums.nbytes for s in stores),
        "codebooks": sum(s.tokens.centroids.nbytes for s in stores), "whole_cache": cache.bytes(),
    }  # fmt: skip
    used = sum(s.tokens.codes[..., 0].nbytes for s in stores) * context
    prompt = {**read, **{f"prompt_{name}": size for name, size in bench.memory().items()}}
    for spread in SPREADS:
        bench.spread = spread
        times = bench.decode(cache, token, bench.given.decode + 1)
        fetched = torch.stack([s.fetched.float().mean() for s in stores]).mean() / context
        some = [parts(bench, stores[i]) for i in sorted({0, len(stores) // 2, len(stores) - 1})]
        bench.add({
            "arm": "hcattention", "context": context, "spread": spread,
            "seconds_per_token": statistics.median(times[1:]), "seconds_tokens": times, "fetched_share": float(fetched),
            "mass": float(torch.stack([s.mass.mean() for s in stores]).mean()),
            **{name: statistics.mean(part[name] for part in some) for name in some[0]},
            "device_bytes": held, "codes_of_the_context_bytes": used, "host_bytes": cache.host_bytes(),
            **bench.memory(), "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **prompt,
        })  # fmt: skip


def hcattention(bench: Bench) -> None:
    """Read, and decode at every stop; where time runs out, at the length that was come to."""
    given = bench.given
    with manyheads.use(bench.model):
        cache = new_cache(bench.model, parse(given.spec))
        stores = [layer.store for layer in cache.layers]
        for store in stores:
            spied(store)
        read = {"seconds_reading": 0.0, "seconds_first_chunk": 0.0}
        for context in bench.stops:
            begun, late = time.perf_counter(), None

            def progress(_: int, begun: float = begun) -> None:
                if not read["seconds_first_chunk"]:  # has the host's memory allocated
                    bench.sync()
                    read["seconds_first_chunk"] = time.perf_counter() - begun
                bench.in_time()

            try:
                prefill(bench.model, bench.ids[:, :context], cache, chunk=given.chunk, progress=progress)
            except Late as error:
                late = error
            bench.sync()
            read["seconds_reading"] += time.perf_counter() - begun
            stop(bench, cache, stores, read)
            if late is not None:
                bench.skip("hcattention", context, late)
                return


def decoded(bench: Bench, answer: Callable[[int, AttentionCall], Tensor], context: int, count: int) -> dict[str, Any]:
    """Seconds a token of the network over such a cache."""
    bench.memory()
    with manyheads.use(bench.model):
        cache = new_cache(bench.model, Peer(answer=answer, context=context))
        times = bench.decode(cache, bench.ids[:, 0], count + 1)
    return {"seconds_per_token": statistics.median(times[1:]), "seconds_tokens": times, **bench.memory()}


def room(bench: Bench) -> int:
    """Bytes of the budget beside weights and what a step works with."""
    return int(bench.given.budget) - COUNTED - int(bench.weights) - 10**9


def resident(bench: Bench, context: int) -> None:
    """Keys and values of all layers on the device."""
    layers = bench.given.layers
    needed = 2 * layers * context * bench.kv_heads * bench.dim * bench.dtype.itemsize
    row = {"arm": "resident", "context": context, "kv_bytes": needed, "host_bytes": 0, "fits": needed <= room(bench)}
    if row["fits"]:
        shape = (1, bench.kv_heads, context, bench.dim)
        held = [
            [torch.empty(shape, dtype=bench.dtype, device=bench.device).normal_() for _ in "kv"] for _ in range(layers)
        ]
        row |= decoded(bench, lambda i, call: attend(call, *held[i]), context, bench.given.decode)
    bench.add(row)


def whole_layers(bench: Bench, pool: Tensor, context: int) -> None:
    """Keys and values of all layers on the host."""
    layer = 2 * context * bench.kv_heads * bench.dim * bench.dtype.itemsize
    row = {
        "arm": "whole-layer offloading", "context": context, "buffer_bytes": 2 * layer,
        "host_bytes": bench.given.layers * layer, "fits": 2 * layer <= room(bench),
    }  # fmt: skip
    if row["fits"]:
        held = Offload(pool, bench.given.layers, (2, 1, bench.kv_heads, context, bench.dim), bench.device)
        row["layers_on_host"] = len(held.host)
        row |= decoded(bench, held.answer, context, bench.given.decode if context <= 2**19 else 2)
    bench.add(row)


def exact_prefill(bench: Bench) -> None:
    """What exact reading would take, from the rate of causal attention over a part of it."""
    size = 256 if bench.given.small else 16384
    q = torch.randn(1, bench.heads, size, bench.dim, device=bench.device, dtype=bench.dtype)
    taken = bench.seconds(lambda: scaled_dot_product_attention(q, q, q, is_causal=True))
    rate = 2 * bench.heads * bench.dim * size**2 / taken  # two products over half of the pairs
    for context in bench.stops:
        operations = 2 * bench.given.layers * bench.heads * bench.dim * context**2
        bench.add({
            "arm": "exact prefill, reckoned", "context": context, "operations": operations,
            "operations_per_second": rate, "seconds_attention": operations / rate,
        })  # fmt: skip


def peers(bench: Bench) -> None:
    """All that is beside."""
    shares = 2 * bench.given.layers * bench.kv_heads * bench.dim * bench.dtype.itemsize
    largest = room(bench) // shares // 65536 * 65536
    lengths = [c for c in bench.stops if c < largest] + [min(largest, bench.stops[-1])]
    arms: list[tuple[str, int, Callable[[], None]]] = [
        ("resident", c, lambda c=c: resident(bench, c)) for c in sorted({*lengths, *bench.stops}) if c
    ]
    arms.append(("exact prefill, reckoned", bench.stops[-1], lambda: exact_prefill(bench)))
    held: list[Tensor] = []

    def offloading(context: int) -> None:
        if not held:
            begun = time.perf_counter()
            held.append(torch.zeros(bench.given.pool, dtype=bench.dtype, pin_memory=bench.cuda))
            bench.report["seconds_to_lock_the_pool"] = time.perf_counter() - begun
        whole_layers(bench, held[0], context)

    arms += [("whole-layer offloading", c, lambda c=c: offloading(c)) for c in bench.stops]
    for name, context, arm in arms:
        if bench.has(name, context):
            continue
        try:
            bench.in_time()
            arm()
        except (Late, RuntimeError) as error:
            bench.skip(name, context, error)
        bench.tidy()


def main() -> None:
    """Measure, print, write after every row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/hcattention.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=STOPS[-1], help="the longest context")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="a tiny width, to see that it runs")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the prompt that are read at once")
    parser.add_argument("--decode", type=int, default=8, help="tokens that are timed at a stop")
    parser.add_argument("--values", default="int4", help="whole, fp8 or int4")
    parser.add_argument("--budget", type=int, default=80 * 10**9, help="bytes on the device")
    parser.add_argument("--pool", type=int, default=2**33, help="numbers in host memory for layers that are offloaded")
    parser.add_argument("--limit", type=float, default=400, help="seconds, after which nothing more is begun")
    parser.add_argument("--only", choices=("hcattention", "peers"), help="one of the two; both if not given")
    given = parser.parse_args()
    if given.small:
        given.chunk, given.pool = min(given.chunk, 512), 2**20
    shape = "groups=4,local=256,picked=2,sinks=16,centroids=64" if given.small else "groups=32,sinks=128"
    given.spec = f"hcattention:prompt=blocks,values={given.values},capacity={given.tokens + 512},{shape},top_p={TOP_P}"
    bench = Bench(given)
    stops = (given.tokens // 4, given.tokens // 2) if given.small else STOPS
    bench.stops = sorted({*(c for c in stops if c < given.tokens), given.tokens})
    calibrate(bench)
    bench.open_report()
    alone = decoded(bench, lambda _, call: call.q[:, :, 0], 2, given.decode)
    bench.add({"arm": "network alone", "context": 1, **alone})
    for part in (hcattention, peers):
        if given.only not in (None, part.__name__):
            continue
        try:
            part(bench)
        except RuntimeError as error:  # out of memory: what else there is may fit
            bench.skip(part.__name__, given.tokens, error)
        bench.tidy()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
