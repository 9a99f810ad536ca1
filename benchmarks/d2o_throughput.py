# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of as many sequences as the same memory of cache holds: D2O beside the full cache, H2O and others.

    python benchmarks/d2o_throughput.py [--json benchmarks/d2o_throughput.json]

D2O's paper reports more than three times the throughput of the full cache, from the larger batch that fits. Here every
arm has the same bytes of cache (``--gib``) and the largest batch whose cache, measured after the prompt, stays within
them; all of them decode the same number of tokens. Eight layers of Llama-3-8B with random weights in bf16: speed does
not depend on what they say. ``full`` is transformers' DynamicCache. Eviction at every step is what the paper does; the
arms ``at the prompt`` evict once and show what the larger batch alone is worth. The limit of a row is what reading
weights and cache takes at the rate of a copy. cuDNN's attention is off for all.
"""

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import manyheads
from decode import commit, copy_rate  # benchmarks/decode.py
from manyheads.environment import environment
from manyheads.integrations.transformers import new_cache

PROMPT, NEW, WARM, LAYERS = 2048, 48, 8, 8
ARMS = {
    "full": "",
    "d2o": "d2o:budget=0.2",
    "d2o without merging": "d2o:merging=False,budget=0.2",
    "d2o at the prompt": "d2o:schedule=prefill,budget=0.2",
    "h2o": "h2o:sinks=4,recent_share=0.25,budget=0.2",
    "streaming_llm": "streaming_llm:schedule=step,budget=0.2",
    "snapkv at the prompt": "snapkv:budget=0.2",
}


def build() -> Any:
    """Layers of Llama-3-8B's shape with random weights."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=LAYERS,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2 * PROMPT, rope_theta=500_000.0,
        eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(default)
    return model


def held(cache: Any) -> int:
    """Bytes of keys, values and what an arm keeps beside them."""
    if hasattr(cache, "bytes"):
        return int(cache.bytes())
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def after_prompt(model: Any, spec: str, batch: int) -> tuple[Any, float]:
    """A cache that ``batch`` prompts were read into, and the seconds that it took."""
    ids = torch.randint(2, 30_000, (batch, PROMPT), device="cuda")
    cache = new_cache(model, manyheads.parse(spec)) if spec else DynamicCache(config=model.config)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(ids, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    return cache, time.perf_counter() - start


def largest(model: Any, spec: str, limit: int) -> int:
    """Rows whose cache stays within ``limit`` bytes, as four of them say, and as the whole batch confirms."""
    cache, _ = after_prompt(model, spec, 4)
    batch = max(1, limit // -(-held(cache) // 4))
    del cache
    while batch > 1:
        cache, _ = after_prompt(model, spec, batch)
        size = held(cache)
        del cache
        torch.cuda.empty_cache()
        if size <= limit:
            return batch
        batch = min(batch - 1, batch * limit // size)
    return batch


@torch.inference_mode()
def measure(model: Any, name: str, limit: int, copy: float) -> dict[str, Any]:
    """One row."""
    spec = ARMS[name]
    batch = largest(model, spec, limit)
    cache, prompt = after_prompt(model, spec, batch)
    size = held(cache)
    token = torch.randint(2, 30_000, (batch, 1), device="cuda")
    start = 0.0
    for i in range(NEW):
        if i == WARM:
            torch.cuda.synchronize()
            start = time.perf_counter()
        token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    torch.cuda.synchronize()
    step = (time.perf_counter() - start) / (NEW - WARM)
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "arm": name, "spec": spec, "batch": batch, "cache_bytes": size, "cache_bytes_at_end": held(cache),
        "prompt_s": round(prompt, 3), "ms_per_step": round(1e3 * step, 3), "tokens_per_s": round(batch / step, 1),
        "limit_ms": round((weights + size) / copy / 1e6, 3),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--commit", default=None, help="name of the measured state; git is asked without it")
    parser.add_argument("--gib", type=float, default=2.0, help="cache of every arm, GiB")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares itself anew for every length: tens of ms a step
    copy, model, rows = copy_rate(), build(), []
    with manyheads.use(model):
        for name in ARMS:
            torch.cuda.empty_cache()
            row = measure(model, name, int(options.gib * 2**30), copy)
            rows.append(row)
            row["times_full"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
            print(
                f"{name:22} batch {row['batch']:4} {row['ms_per_step']:8.2f} ms a step, {row['times_full']:5.2f}x full"
            )
    result = {
        "environment": environment(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": options.commit or commit(), "prompt": PROMPT, "new": NEW, "layers": LAYERS, "gib": options.gib,
        "copy_gb_s": copy, "rows": rows,
    }  # fmt: skip
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
