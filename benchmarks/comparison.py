# SPDX-License-Identifier: Apache-2.0
"""Seconds of a whole ``manyheads compare``, of this checkout and of another one, in turns on one machine.

    python benchmarks/comparison.py --model smollm2-135m-instruct --device cuda [--other DIR] [--json FILE]

14 strategies at one and at three budgets, contexts of 2,000, 4,000 and 7,500 tokens, 12 of each; each command is a
process of its own, from its start to its table, alone on the machine. ``--other`` is a checkout of an earlier state. A
command is cut off after ``--limit`` seconds; its row then says ``cut_off``, and ``seconds`` is a lower bound.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from decode import commit  # benchmarks/decode.py
from manyheads.environment import environment

STRATEGIES = (
    "random,streaming_llm,snapkv,keydiff,hedge,h2o,tova,knorm,lagkv,pyramidkv,adakv,expected_attention,d2o,hashevict"
)
BUDGETS = ("0.25", "0.5,0.25,0.1")


def timed(source: Path, model: str, device: str, budgets: str, workers: int, limit: float) -> dict[str, Any]:
    """One comparison by the package in ``source``."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "manyheads", "compare", "--model", model, "--device", device, "--strategies",
            STRATEGIES, "--budgets", budgets, "--lengths", "2000,4000,7500", "--samples", "12", "--out", f"{out}/run",
            *(["--workers", str(workers)] if workers > 1 else []),
        ]  # fmt: skip
        start = time.perf_counter()
        try:
            subprocess.run(
                command,
                env=os.environ | {"PYTHONPATH": str(source)},
                stdout=subprocess.DEVNULL,
                timeout=limit,
                check=True,
            )
            cut_off = False
        except subprocess.TimeoutExpired:
            cut_off = True
    seconds = round(time.perf_counter() - start, 1)
    return {"budgets": len(budgets.split(",")), "workers": workers, "seconds": seconds, "cut_off": cut_off}


def main() -> None:
    """Time the commands that were asked for, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--other", type=Path, help="src of another checkout, timed at one budget")
    parser.add_argument("--limit", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    own, rows = Path(__file__).resolve().parents[1] / "src", []
    jobs = [("this", own, BUDGETS[0], 1), *([("other", given.other, BUDGETS[0], 1)] if given.other else [])]
    jobs += [("this", own, BUDGETS[1], workers) for workers in dict.fromkeys((1, given.workers))]
    for code, source, budgets, workers in jobs:
        rows.append({"code": code} | timed(source, given.model, given.device, budgets, workers, given.limit))
        print(rows[-1], flush=True)
    found = {
        "date": datetime.date.today().isoformat(), "commit": commit(), "model": given.model,
        "environment": environment(), "rows": rows,
    }  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
