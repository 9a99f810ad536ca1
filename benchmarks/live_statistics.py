# SPDX-License-Identifier: Apache-2.0
"""What statistics cost while a model reads and writes, beside whole maps and beside TransformerLens, in one run.

    python benchmarks/live_statistics.py [--json benchmarks/live_statistics.json] [--profile FILE]
    python benchmarks/live_statistics.py --small          # on the CPU, to see that it runs

A Llama of the shape of Llama-3-8B with random weights, bfloat16, of few layers: all that is compared is done once a
layer. Reading: a forward over the prompt, plain; with ``head_statistics`` (entropy, greatest logit, weight on the first
and the newest token, top place of every head); with four lenses together (``active_dormant``, ``reasoning_rhythm``,
``strategy_attention``, ``head_statistics``); returning its maps, where they fit; and under TransformerLens with all
patterns kept, where it can be imported. Writing: greedy tokens one by one behind a cache of that length, plain and with
the same lenses. Every figure is the median of runs in turns; extra memory is the peak of what torch's allocator held
above the peak of the plain run. ``waits`` counts how often the host waited for the device while 70 tokens were written,
its argmax included. ``device_seconds`` are those of the kernels alone, by torch's profiler, in a run that is not timed:
a sixteenth of those of 16 tokens that wait, and a 64th of those of the look at a block of 64. A model that is written
in Python is bound by the host while it writes, which hides work of the device, and the ratio ``device_times_plain`` is
that of a program that no host holds back. Lenses are opened before the clock starts (some milliseconds, once), and
closed before it stops.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LENSES = {
    "head_statistics": ("head_statistics",),
    "four_lenses": ("active_dormant", "reasoning_rhythm", "strategy_attention", "head_statistics"),
}
VOCABULARY, HEADS, KV_HEADS = 1000, 32, 8
PROFILED = 16  # tokens
MIB = 2**20
Row = dict[str, Any]


def build(layers: int, small: bool) -> LlamaForCausalLM:
    """The model: of Llama-3-8B's shape with a small vocabulary, or a small one for the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256 if small else 4096, intermediate_size=512 if small else 14336, num_hidden_layers=layers,
        num_attention_heads=8 if small else HEADS, num_key_value_heads=2 if small else KV_HEADS, vocab_size=VOCABULARY,
        max_position_embeddings=2**18, rope_theta=500000.0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
    try:
        with torch.device("cpu" if small else "cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def looked(model: Any, names: tuple[str, ...], length: int) -> Any:
    """The model under lenses; under none where no names are given."""
    import manyheads
    from manyheads.lens import TokenSpans

    if not names:
        return nullcontext()
    roles = TokenSpans({"system": [[(1, 41)]], "response": [[(length // 2, 2**20)]]})
    return manyheads.watch(model, *names, roles=roles)


class Timer:
    """Seconds and peak memory of calls, on either device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, run: Callable[[], Any]) -> tuple[float, int]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        kept = run()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        del kept
        return seconds, torch.cuda.max_memory_allocated() if self.cuda else 0


def in_turns(
    cases: dict[str, Callable[[], Callable[[], Any]]], timer: Timer, runs: int, warm: bool = True
) -> dict[str, Row]:
    """Medians of the cases, run in turns; each makes ready what is timed. What fails says how."""
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    for turn in range(runs + warm):
        for name, prepare in cases.items():
            if name in failed:
                continue
            try:
                found = timer(prepare())
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
                continue
            except Exception as error:  # the other cases go on
                failed[name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
                continue
            if turn >= warm:
                times[name].append(found)
    rows: dict[str, Row] = {}
    if "plain" in failed:
        return {"plain": {"error": failed["plain"]}}
    base = statistics.median(s for s, _ in times["plain"])
    floor = max(peak for _, peak in times["plain"])
    for name, found in times.items():
        if name in failed:
            rows[name] = {"error": failed[name]}
            continue
        seconds = [s for s, _ in found]
        rows[name] = {
            "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "runs": len(found),
            "times_plain": round(statistics.median(seconds) / base, 3),
            "extra_mib": round((max(peak for _, peak in found) - floor) / MIB, 1),
        }  # fmt: skip
    return rows


def transformer_lens(model: LlamaForCausalLM) -> Callable[[torch.Tensor], Any]:
    """A forward of the same model under TransformerLens that keeps the patterns of all layers."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge.bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:  # it reads config and tokenizer by name
        model.config.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2", pad_token="3")
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer)

    def forward(ids: torch.Tensor) -> Any:
        with torch.no_grad():
            return bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))

    return forward


def reading(model: LlamaForCausalLM, length: int, timer: Timer, runs: int, warm: bool) -> dict[str, Row]:
    """Forwards over a prompt."""
    device = next(model.parameters()).device
    ids = torch.randint(0, VOCABULARY, (1, length), device=device)

    def plain(maps: bool = False) -> Any:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False, output_attentions=maps)

    def under(names: tuple[str, ...]) -> Callable[[], Any]:
        seen = looked(model, names, length)
        seen.__enter__()

        def run() -> Any:
            plain()
            seen.__exit__(None, None, None)
            return seen

        return run

    def maps() -> Any:
        model.set_attn_implementation("eager")
        try:
            return plain(True)
        finally:
            model.set_attn_implementation("sdpa")

    cases: dict[str, Callable[[], Callable[[], Any]]] = {"plain": lambda: plain}
    cases |= {name: lambda names=names: under(names) for name, names in LENSES.items()}
    bytes_of_maps = model.config.num_hidden_layers * model.config.num_attention_heads * length**2 * 2
    if bytes_of_maps < 30 * 2**30:
        cases["maps"] = lambda: maps
    return in_turns(cases, timer, runs, warm) | (
        {} if "maps" in cases else {"maps": {"error": f"{bytes_of_maps / 2**30:.0f} GiB of maps do not fit"}}
    )


def filled(model: LlamaForCausalLM, length: int) -> DynamicCache:
    """A cache of random keys and values."""
    config, like = model.config, next(model.parameters())
    cache = DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(like.new_empty(shape).normal_(), like.new_empty(shape).normal_(), layer)
    return cache


def device_seconds(run: Callable[[], Any]) -> float:
    """Seconds of the device's kernels in ``run``, as the profiler tells them."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e6


def writing(model: LlamaForCausalLM, length: int, tokens: int, timer: Timer, runs: int) -> dict[str, Row]:
    """Greedy tokens, one by one, behind a cache; the time is of one token."""
    from manyheads.lens.waiting import BLOCK

    device = next(model.parameters()).device
    ids = torch.randint(0, VOCABULARY, (1, 1), device=device)

    def add(cache: DynamicCache, count: int) -> None:
        token = ids
        with torch.no_grad():
            for _ in range(count):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    def write(name: str, count: int = tokens) -> Callable[[], Any]:
        cache, seen = [filled(model, length)], looked(model, LENSES.get(name, ()), length)
        seen.__enter__()

        def run() -> Any:
            add(cache[0], count)
            seen.__exit__(None, None, None)
            cache.clear()
            return seen

        return run

    def busy(name: str) -> float:
        """Seconds of the device for a token, in one more run."""
        cache = filled(model, length)
        with looked(model, LENSES.get(name, ()), length) as seen:
            add(cache, BLOCK - PROFILED)
            waiting = device_seconds(lambda: add(cache, PROFILED))
            looking = 0.0 if seen is None else device_seconds(seen.settle)
        return waiting / PROFILED + looking / BLOCK

    def counted(name: str) -> int:
        """How often the host waits, as torch tells in one more run."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                write(name, BLOCK + 6)()
            return sum("synchroniz" in str(each.message) for each in said)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    names = ("plain", *LENSES)
    rows = in_turns({name: lambda name=name: write(name) for name in names}, timer, runs)
    if timer.cuda:
        torch.cuda.empty_cache()
    for name, row in rows.items():
        if "seconds" in row:
            row |= {f"{key}_per_token": row[key] / tokens for key in ("seconds", "least", "most")}
        if timer.cuda and "seconds" in row:
            row |= {"waits": counted(name), "device_seconds_per_token": (on_device := busy(name))}
            row["device_times_plain"] = round(on_device / rows["plain"]["device_seconds_per_token"], 3)
    return rows


def profiled(model: LlamaForCausalLM, length: int, path: Path) -> None:
    """Where the time of four lenses goes: kernels and operators of one forward."""
    from torch.profiler import ProfilerActivity, profile

    device = next(model.parameters()).device
    ids = torch.randint(0, VOCABULARY, (1, length), device=device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    text = []
    for names in ((), LENSES["head_statistics"], LENSES["four_lenses"]):
        with looked(model, names, length), torch.no_grad(), profile(activities=kinds) as found:
            model(ids, logits_to_keep=1, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
        events = found.key_averages()
        launches = sum(e.count for e in events if "LaunchKernel" in e.key)
        text.append(f"\n== reading {length} with {names or 'nothing'}: {launches} launches")
        orders = ["self_cpu_time_total", *(["self_cuda_time_total"] if device.type == "cuda" else [])]
        text += [events.table(sort_by=order, row_limit=22, max_name_column_width=70) for order in orders]
    path.write_text("\n".join(text), encoding="utf-8")


def listed(length: int, found: dict[str, Row]) -> list[Row]:
    """Rows for the file, which are printed, too."""
    rows = [{"length": length, "case": name, **row} for name, row in found.items()]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    from manyheads.environment import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where results go; beside this file on a GPU")
    parser.add_argument("--small", action="store_true", help="short texts and a small model, on the CPU")
    parser.add_argument("--layers", type=int, default=8, help="of the model")
    parser.add_argument("--profile", type=Path, default=None, help="write a profile of reading to this file, too")
    options = parser.parse_args()
    small = options.small
    begun = time.perf_counter()
    model = build(2 if small else options.layers, small)
    device = next(model.parameters()).device
    timer = Timer(device)
    result: Row = {"layers": model.config.num_hidden_layers, "lenses": LENSES, "reading": [], "writing": []}
    path = options.json or (None if small else Path(__file__).with_suffix(".json"))

    def store() -> None:
        """Write what is known so far."""
        result["total_seconds"] = round(time.perf_counter() - begun, 1)
        if path is not None:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result |= {"environment": environment(), "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    # (what, tokens before, tokens written or 0, runs, whether one more comes first): the most wanted come first
    plan = [(64, 70, 2, True), (64, 0, 2, True), (256, 70, 2, True), (256, 0, 2, True)]
    if not small:
        plan = [(4096, 128, 3, True), (4096, 0, 7, True), (131072, 128, 2, True), (131072, 0, 1, False)]
        plan += [(32768, 0, 1, True)]
    for length, tokens, runs, warm in plan:
        made = writing(model, length, tokens, timer, runs) if tokens else reading(model, length, timer, runs, warm)
        result["writing" if tokens else "reading"] += listed(length, made)
        store()
    if options.profile is not None:
        profiled(model, 64 if small else 4096, options.profile)
    if find_spec("transformer_lens") is not None:  # last, since it puts hooks of its own on the model
        length = 64 if small else 4096
        ids = torch.randint(0, VOCABULARY, (1, length), device=device)
        model.set_attn_implementation("eager")
        forward = transformer_lens(model)
        floor = next(row["seconds"] for row in result["reading"] if row["length"] == length and row["case"] == "plain")
        seconds = statistics.median(timer(lambda: forward(ids))[0] for _ in range(4))
        found = {"seconds": seconds, "times_plain": round(seconds / floor, 3), "version": version("transformer-lens")}
        result["reading"] += listed(length, {"transformer_lens": found})
    store()
    print(f"{result['total_seconds']} s in all")


if __name__ == "__main__":
    main()
