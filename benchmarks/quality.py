# SPDX-License-Identifier: Apache-2.0
"""Every cache strategy at equal bytes on the shipped model: needle (unseen, seen), several, chained, loss.

    python benchmarks/quality.py --device cuda --lengths 2048,4096 --samples 96 --json benchmarks/quality.json

The rows are those of ``manyheads compare``. Bytes are shares of what the whole cache takes in 16 bits: strategies that
keep tokens keep that share of them; the packed ones keep as many more as their codes leave room for. The text is the
half of the standard library's files whose names have an odd CRC-32: on the other half hedge's constants were chosen.
"""

import argparse
import datetime
import json
import multiprocessing
import re
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import Progress

# Figures of the tasks, by their names in the file.
FIGURES = {
    "needle_unseen": "niah_single.query_agnostic", "needle_seen": "niah_single.query_aware",
    "several": "niah_multikey.multikey", "chained": "variable_tracking.tracked", "loss": "perplexity.token_nll",
}  # fmt: skip
TASKS = ("perplexity", "niah_single", "niah_multikey", "variable_tracking")
TOKENS = (
    "random", "streaming_llm", "knorm", "keydiff", "snapkv", "pyramidkv", "adakv", "h2o", "tova", "lagkv",
    "expected_attention", "hashevict", "d2o", "graphkv", "hedge:bits=none",
)  # fmt: skip
PACKED = ("keydiff", "snapkv", "adakv", "expected_attention")


def packed(share: float, length: int, width: int = 64, window: int = 64) -> float:
    """Share of the tokens that INT4 with ``window`` recent ones in 16 bits holds in ``share`` of the bytes."""
    code = 2 * (width // 2 + 2) + 4  # key and value, their scales, a position
    recent = (window + 1) * (4 * width + 4)
    tokens = (share * length * 4 * width - recent - 6 * width - 72) / code + window
    return min(1.0, tokens / length)


def strategies(share: float, length: int) -> list[str]:
    """Specs of all arms that fit in ``share`` of the bytes."""
    found = [f"{spec}{',' if ':' in spec else ':'}budget={share}" for spec in (*TOKENS, "hedge")]
    if (tokens := packed(share, length)) >= 1:
        return [*found, "fireq"]
    if tokens * length > 100:
        found += [f"fireq:base={base},budget={tokens:.6f}" for base in PACKED]
    return found


def measure(length: int, share: float, samples: int, seed: int, device: str, only: list[str] | None) -> dict[str, Any]:
    """Figures of every arm at one length and share of the bytes."""
    from manyheads.comparison import compare
    from manyheads.data.texts import standard_library
    from manyheads.environment import environment
    from manyheads.models import load_default
    from manyheads.report.summary import Summary

    model, tokenizer = load_default(device)
    texts = [text for text in standard_library() if zlib.crc32(text.name.encode()) % 2]
    with tempfile.TemporaryDirectory() as folder:
        specs = [s for s in strategies(share, length) if only is None or re.split("[:,]budget", s)[0] in only]
        results = compare(model, tokenizer, texts, specs, [], TASKS, lengths=[length], samples=samples, seed=seed,
                          out=folder)  # fmt: skip
        document = Summary(results).document()
    whole = document["arms"][0]["bytes"]
    arms = [
        {
            "arm": arm["arm"], "kept": arm["bytes"] / whole,
            "figures": {name: arm["figures"][key]["estimate"] for name, key in FIGURES.items()},
        }
        for arm in document["arms"]
    ]  # fmt: skip
    return {"length": length, "share": share, "samples": samples, "seed": seed, "device": device,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "environment": environment(),
            "arms": arms}  # fmt: skip


def store(run: dict[str, Any], path: Path) -> None:
    """Add a run to the file, in place of an earlier one of the same length, share and device."""
    from manyheads.files import write_atomically

    def case(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["length"], -run["share"], run["device"]

    old = json.loads(path.read_text())["runs"] if path.exists() else []
    run = {**run, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
    runs = sorted([run, *(r for r in old if case(r) != case(run))], key=case)
    write_atomically(path, json.dumps({"runs": runs}, separators=(",", ":")) + "\n")


def table(runs: list[dict[str, Any]], length: int) -> str:
    """The figures of one length in Markdown, an arm to a line."""
    lines = ["| arm | bytes | unseen | seen | several | chained | loss |", "|---|---|---|---|---|---|---|"]
    for run in sorted((run for run in runs if run["length"] == length), key=lambda run: -run["share"]):
        for arm in run["arms"]:
            found = [arm["figures"].get(name, {"value": float("nan")})["value"] for name in FIGURES]
            cells = [f"{value:.{3 if name == 'loss' else 2}f}" for name, value in zip(FIGURES, found, strict=True)]
            lines.append(f"| {arm['arm']} | {arm['kept']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048", help="tokens of a context")
    parser.add_argument("--shares", default="0.5,0.25,0.1,0.05", help="of the bytes of the 16-bit cache")
    parser.add_argument("--only", help="some of the strategies, without their budgets, parted by semicolons")
    parser.add_argument("--samples", type=int, default=24, help="contexts per task and length")
    parser.add_argument("--seed", type=int, default=8001)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="lengths and shares measured side by side")
    parser.add_argument("--json", type=Path, help="file to add the rows to")
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    jobs = [(length, float(share)) for share in given.shares.split(",") for length in lengths]
    only = given.only.split(";") if given.only else None
    runs: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with Progress() as bar, ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        todo = bar.add_task("lengths and shares", total=len(jobs))
        running = [pool.submit(measure, *job, given.samples, given.seed, given.device, only) for job in jobs]
        for done in as_completed(running):
            runs.append(done.result())
            bar.advance(todo)
            if given.json:
                store(done.result(), given.json)
    for length in lengths:
        print(f"\n{length} tokens\n\n{table(runs, length)}")


if __name__ == "__main__":
    main()
