# SPDX-License-Identifier: Apache-2.0
"""What looking costs: a forward with lenses beside the same forward without, and beside one that returns its maps.

    python benchmarks/lenses.py cpu [--json benchmarks/lenses.json] [--transformer-lens PYTHON]
    python benchmarks/lenses.py gpu [--json benchmarks/lenses.json]

The lenses are ``active_dormant`` (sinks, logit gaps, drained values, peaks), ``reasoning_rhythm`` (spans of heads, two
bands), ``strategy_attention`` (mass on a span) and the entropy of every row, all in one forward, at every layer.

On the CPU: a random Llama of 6 layers and 16 heads, float32, each case in a process of its own. Memory is the peak of
the resident set during the forward above what the process held before it. TransformerLens runs where an interpreter
that has it is named; it keeps the patterns of all heads, which is what its users compute such figures from.

On a GPU: the shape of Llama-3-8B with random weights, bfloat16, of as many layers as asked for. Every case runs twice
and the second run counts (at the greatest length the only one: the shorter have warmed it up); memory is the peak of
what torch's allocator held, weights included.
"""

import argparse
import datetime
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = {"cpu": (1024, 2048, 4096), "gpu": (4096, 32768, 131072)}
VOCABULARY = 1000
LENSES = ("active_dormant", "reasoning_rhythm", "strategy_attention")
MIB = 2**20

Row = dict[str, Any]


def small(attn: str) -> LlamaForCausalLM:
    """The random Llama of the CPU's figures: 6 layers, 16 query heads, 4 key/value heads, 32 channels a head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=8192, attn_implementation=attn,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def large(layers: int) -> LlamaForCausalLM:
    """The shape of Llama-3-8B with a small vocabulary, on the GPU."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=VOCABULARY, max_position_embeddings=131072, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def look(model: LlamaForCausalLM, ids: torch.Tensor) -> list[Any]:
    """One forward with all lenses; what they found."""
    import manyheads
    from manyheads.calls.statistics import Entropy, Statistic
    from manyheads.lens import AttentionView, Lens, LensResult, RunningMean, TokenSpans, table

    @dataclass(frozen=True, kw_only=True)
    class Entropies(Lens):
        """Mean entropy of the rows of each head."""

        def statistics(self, view: AttentionView) -> dict[str, Statistic]:
            return {"entropy": Entropy()}

        def update(self, view: AttentionView, found: dict[str, Any]) -> None:
            total = found["entropy"].masked_fill(~view.valid[:, None], 0).sum(-1)
            view.memory.setdefault("entropy", RunningMean()).add(total, view.valid.sum(1)[:, None], view.fresh)

        def compute(self, sites: Sequence[Any]) -> LensResult:
            return LensResult({"entropy": table("entropy", sites, "entropy")})

    length = ids.shape[1]
    roles = TokenSpans({"system": [[(1, 41)]], "response": [[(length // 2, length)]]})
    with manyheads.watch(model, *LENSES, Entropies(), roles=roles) as seen, torch.no_grad():
        model(ids, logits_to_keep=1, use_cache=False)
    return [seen] if ids.is_cuda else [seen.compute(i) for i in range(4)]


def patterns(model: LlamaForCausalLM, ids: torch.Tensor) -> Any:
    """The patterns of all layers, as TransformerLens gives them for a transformers model."""
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


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def one(case: str, length: int) -> Row:
    """One case on the CPU, in this process."""
    torch.set_num_threads(1)
    model = small("eager" if case in ("maps", "transformer_lens") else "sdpa")
    bridge = patterns(model, torch.zeros(1, 1)) if case == "transformer_lens" else None

    def forward(ids: torch.Tensor) -> Any:
        if bridge is not None:
            return bridge(ids)
        if case == "lenses":
            return look(model, ids)
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False, output_attentions=case == "maps")

    forward(torch.randint(0, VOCABULARY, (1, 64)))
    ids = torch.randint(0, VOCABULARY, (1, length))
    gc.collect()
    before, start = _status("VmRSS"), time.perf_counter()
    kept = forward(ids)
    seconds = time.perf_counter() - start
    row: Row = {"seconds": round(seconds, 2), "extra_peak_mib": round((_status("VmHWM") - before) / MIB)}
    if case == "transformer_lens":
        from importlib.metadata import version

        import transformer_lens  # noqa: F401

        row["version"] = version("transformer-lens")
        assert len(kept[1]) == 6, "a pattern of every layer was asked for"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 >= before
    return row


def cpu(result: Row, path: Path, python: str | None) -> None:
    """Every case and length in a process of its own; the median of three runs."""
    rows: list[Row] = []
    for length in LENGTHS["cpu"]:
        for case in ("plain", "lenses", "maps", "transformer_lens"):
            runner = python if case == "transformer_lens" else sys.executable
            if runner is None:
                result["cpu_notes"] = "TransformerLens was not measured: no interpreter that has it was named"
                continue
            runs, error = [], ""
            for _ in range(3):
                call = [runner, __file__, "one", "--case", case, "--length", str(length)]
                done = subprocess.run(call, capture_output=True, text=True, timeout=900)
                if done.returncode:
                    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
                    break
                runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            row: Row = {"case": case, "length": length, "runs": len(runs)}
            if error:
                row["error"] = error
            else:
                row |= runs[0] | {k: statistics.median(r[k] for r in runs) for k in ("seconds", "extra_peak_mib")}
            rows.append(row)
            print(row, flush=True)
        result["cpu"] = rows
        write(result, path, "cpu")


def _timed(call: Any, runs: int) -> Row:
    """The last of some runs: seconds and peak memory."""
    row: Row = {}
    for _ in range(runs):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = call()
        torch.cuda.synchronize()
        row = {"seconds": round(time.perf_counter() - start, 3)}
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        del kept
    return row


def gpu(result: Row, path: Path, layers: int) -> None:
    """Every case at every length where it fits."""
    model = large(layers)
    rows: list[Row] = []
    result["gpu_layers"] = layers
    for length in LENGTHS["gpu"]:
        ids = torch.randint(0, VOCABULARY, (1, length), device="cuda")

        def plain(maps: bool = False, ids: torch.Tensor = ids) -> Any:
            with torch.no_grad():
                return model(ids, logits_to_keep=1, use_cache=False, output_attentions=maps)

        def lenses(ids: torch.Tensor = ids) -> Any:
            return look(model, ids)

        def maps() -> Any:
            model.set_attn_implementation("eager")
            try:
                return plain(True)
            finally:
                model.set_attn_implementation("sdpa")

        base = 0.0
        fits = layers * 32 * length**2 * 2 < 0.6 * torch.cuda.get_device_properties(0).total_memory
        for name, call in (("plain", plain), ("lenses", lenses), *((("maps", maps),) if fits else ())):
            try:
                row = {"case": name, "length": length, **_timed(call, 1 if length == LENGTHS["gpu"][-1] else 2)}
            except torch.OutOfMemoryError:
                row = {"case": name, "length": length, "error": "out of memory"}
            if name == "plain":
                base = row["seconds"]
            elif "seconds" in row:
                row["times_plain"] = round(row["seconds"] / base, 2)
            rows.append(row)
            print(row, flush=True)
        if not fits:
            need = layers * 32 * length**2 * 2 / 2**30
            rows.append({"case": "maps", "length": length, "error": f"{need:.0f} GiB of maps do not fit"})
            print(rows[-1], flush=True)
        result["gpu"] = rows
        write(result, path, "gpu")


def write(result: Row, path: Path, section: str) -> None:
    """Store what is known so far; the other section stays as it is."""
    from manyheads.environment import environment

    result[f"{section}_environment"] = environment()
    result[f"{section}_date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["cpu", "gpu", "one"], help="what to measure")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--transformer-lens", default=None, help="an interpreter that has TransformerLens")
    parser.add_argument("--layers", type=int, default=32, help="layers of the GPU's model")
    parser.add_argument("--case", default="plain", help="for one: plain, lenses, maps or transformer_lens")
    parser.add_argument("--length", type=int, default=1024, help="for one: tokens")
    options = parser.parse_args()
    if options.section == "one":
        print(json.dumps(one(options.case, options.length)))
        return
    result: Row = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    result["lenses"] = [*LENSES, "entropy"]
    if options.section == "cpu":
        cpu(result, options.json, options.transformer_lens)
    else:
        gpu(result, options.json, options.layers)


if __name__ == "__main__":
    main()
