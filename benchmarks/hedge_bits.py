# SPDX-License-Identifier: Apache-2.0
"""Hedge by bits at equal bytes on a published model: what INT4, FP8 keys with INT4 values, and FP8 lose.

    python benchmarks/hedge_bits.py --model HuggingFaceTB/SmolLM2-135M-Instruct --json benchmarks/hedge_bits.json

Contexts are those of ``manyheads compare``; so are the tasks: loss of what goes on, and a needle that is asked for
after compression (``query_agnostic``) or stands asked in the prompt (``query_aware``). Every figure is a difference
paired by context, to the whole cache (``than`` is ``full``) and to the other formats at the same bytes. A run that was
cut off goes on with the same ``--out``. The threshold of ``hedge:bits=auto`` is read off this file.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

BITS = ("int4", "k8v4", "fp8")
METRICS = ("token_nll", "query_agnostic", "query_aware")


def differences(results: Any, lengths: list[int], budgets: list[float], bits: list[str]) -> list[dict[str, Any]]:
    """A row for each metric, length, budget, format and what it is compared with."""
    from manyheads.report.summary import Summary

    summary = Summary(results)
    arms = {(arm.budget, b): arm for arm in summary.arms[1:] for b in bits if f"bits={b}" in arm.key}
    whole = summary.held(summary.base)
    rows = []
    for one in summary.measured:
        if one.metric.name not in METRICS:
            continue
        for length in lengths:
            where = {"length": length}
            full = summary.estimate(one, summary.base, where)
            for budget in budgets:
                for place, b in enumerate(bits):
                    arm = arms[budget, b]
                    others = [("full", summary.base), *((o, arms[budget, o]) for o in bits[:place])]
                    for name, other in others:
                        found = summary.delta(one, arm, where, than=other)
                        held = [row.bytes for row in summary.rows(one, arm, where) if row.bytes]
                        base = [row.bytes for row in summary.rows(one, summary.base, where) if row.bytes]
                        rows.append({
                            "metric": one.metric.name, "length": length, "budget": budget, "bits": b, "than": name,
                            "difference": found.value, "low": found.low, "high": found.high, "n": found.n,
                            "interval": found.interval, "full": full.value,
                            "bytes_of_full": sum(held) / len(held) * len(base) / sum(base) if held and base else None,
                        })  # fmt: skip
    if not rows or not whole:
        raise SystemExit("nothing was measured")
    return rows


def main() -> None:
    """Measure on one model, print, and write its figures into the file."""
    from manyheads import models
    from manyheads.comparison import compare
    from manyheads.data.texts import corpus
    from manyheads.environment import commit, environment
    from manyheads.files import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name, known name or folder")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--lengths", default="1024,2048")
    parser.add_argument("--budgets", default="0.5,0.25,0.1")
    parser.add_argument("--bits", default=",".join(BITS))
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("hedge-bits"), help="folder of the run, to go on with")
    parser.add_argument("--json", type=Path, help="file to put the figures of this model into")
    given = parser.parse_args()
    lengths = [int(x) for x in given.lengths.split(",")]
    budgets, bits = [float(x) for x in given.budgets.split(",")], given.bits.split(",")
    model, tokenizer = models.load(given.model, given.device)
    results = compare(
        model, tokenizer, corpus(given.text), [f"hedge:bits={b}" for b in bits], budgets,
        ["perplexity", "niah_single"], lengths=lengths, samples=given.samples, seed=given.seed, out=given.out,
    )  # fmt: skip
    rows = differences(results, lengths, budgets, bits)
    for row in rows:
        print(*row.values())
    if given.json:
        name = Path(given.model).name.lower()
        kept = json.loads(given.json.read_text())["models"] if given.json.exists() else {}
        command = " ".join(["python", "benchmarks/hedge_bits.py", *sys.argv[1:]])
        kept[name] = {
            "command": command, "commit": commit(), "date": datetime.date.today().isoformat(),
            "environment": environment(), "dtype": str(model.dtype), "text": given.text, "rows": rows,
        }  # fmt: skip
        write_atomically(given.json, json.dumps({"models": kept}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
