# SPDX-License-Identifier: Apache-2.0
"""What compression costs on a CPU: seconds of a prompt and milliseconds of a token, beside the whole cache, in turn.

    python benchmarks/hedge_speed.py --model HuggingFaceTB/SmolLM2-135M-Instruct --json benchmarks/hedge_speed.json

Every round runs every arm once, so that whatever else runs slows them alike; one thread, processor time, medians.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ARMS = ("full", "fp8", "snapkv:budget=0.25", "hedge:budget=0.25", "hedge:budget=0.25,bits=k8v4", "kvzip:budget=0.25")


def measure(model: Any, ids: torch.Tensor, arms: list[str], rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Medians of each arm, and their ratios to the first."""
    import manyheads
    from manyheads.integrations.cache import cache_arguments
    from manyheads.integrations.transformers import new_cache

    prompt: dict[str, list[float]] = {arm: [] for arm in arms}
    token: dict[str, list[float]] = {arm: [] for arm in arms}
    with torch.inference_mode(), manyheads.use(model):
        for turn in range(rounds + 1):  # the first is not counted
            for arm in arms:
                more = cache_arguments(model, new_cache(model, manyheads.parse(arm)))
                start = time.process_time()
                model(input_ids=ids, logits_to_keep=1, **more)
                seconds = [time.process_time() - start]
                for _ in range(tokens + 2):
                    start = time.process_time()
                    model(input_ids=ids[:, -1:], **more)
                    seconds.append(time.process_time() - start)
                if turn:
                    prompt[arm].append(seconds[0])
                    token[arm] += seconds[3:]
    rows = []
    for arm in arms:
        s, ms = statistics.median(prompt[arm]), 1000 * statistics.median(token[arm])
        base = statistics.median(prompt[arms[0]]), 1000 * statistics.median(token[arms[0]])
        rows.append({"arm": arm, "prompt_s": s, "prompt_ratio": s / base[0], "token_ms": ms,
                     "token_ratio": ms / base[1], "lowest_prompt_s": min(prompt[arm])})  # fmt: skip
    return rows


def main() -> None:
    """Measure, print, and write the file."""
    from manyheads import models
    from manyheads.data.texts import corpus
    from manyheads.environment import commit, environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name, known name or folder")
    parser.add_argument("--arms", default=";".join(ARMS), help="specs, parted by semicolons; ratios are to the first")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = models.load(given.model)
    ids = torch.tensor([tokenizer.encode(corpus("essays")[0].content)[: given.length]])
    rows = measure(model, ids, given.arms.split(";"), given.rounds, given.tokens)
    for row in rows:
        print(*(f"{x:.3f}" if isinstance(x, float) else x for x in row.values()))
    if given.json:
        about = {
            "command": " ".join(["python", "benchmarks/hedge_speed.py", *sys.argv[1:]]), "model": given.model,
            "dtype": str(model.dtype), "length": ids.shape[1], "rounds": given.rounds, "threads": 1,
            "clock": "processor time of the process", "date": datetime.date.today().isoformat(), "commit": commit(),
            "environment": environment(),
        }  # fmt: skip
        given.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
