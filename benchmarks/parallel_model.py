# SPDX-License-Identifier: Apache-2.0
"""How far the model of shared attention is from published figures: residuals, and orders.

    python benchmarks/parallel_model.py [--draws 1] [--json benchmarks/parallel_model.json]

Nothing is measured here. Three tables of others, and one of ours:

- ZeCO (arXiv 2507.01004): milliseconds of an all-scan and an all-gather of states of 32 x 128 x 128 numbers in 16 bits
  among 8 to 256 H100. A latency and a bandwidth are fitted, alone and with a start-up and pieces of the scan.
- MagiAttention's figure of causal texts: TFLOP/s of an H100 among 8 to 64, 8,192 tokens each, 64 heads with 8 of keys,
  read off. Nothing is fitted; ``order`` is Kendall's tau of the methods at a number of devices.
- LoongTrain (arXiv 2406.18485): 32 A100, 131,072 tokens with 32 heads and 8 of keys: sharing heads among 8 is ahead
  of 1 and of 32. Nothing is fitted.
- Every exchange between two GPUs in ``parallel_gpu.json``, by the curve of a device in ``parallel_efficiency.json``,
  which is of one process. Nothing else is fitted.
"""

import argparse
import datetime
import json
from itertools import combinations, product
from pathlib import Path

import numpy as np

from manyheads.environment import commit, environment
from manyheads.parallel import pattern
from manyheads.parallel._cost import ASSUMED, CLUSTERS, Link, all_gather, best_pieces, chain, predict
from manyheads.parallel._counts import Shape, count
from manyheads.tasks.parallel._modelled import Setting, modelled, read_efficiency

RANKS = (8, 16, 32, 64, 128, 256)
STATE = 32 * 128 * 128 * 2
ZECO = {
    "all-scan": (0.226, 0.297, 0.448, 0.739, 1.272, 2.165), "all-gather": (0.375, 0.658, 1.616, 2.543, 4.350, 8.514),
}  # fmt: skip
NEAR = 0.2  # as a share, what a model may be off
FITTED = 32  # processes from which on the fit counts
MAGI = {  # by method of ours: TFLOP/s at 8, 16, 32, 64 devices, forward and backward
    "group_cast": ((387, 305, 275, 207), (335, 353, 325, 242)),
    "all_gather": ((288, 292, 240, 180), (179, 155, 104, 55)),
    "usp": ((260, 252, 255, 191), (325, 309, 284, 195)), "loongtrain": ((259, 252, 208, 193), (321, 253, 179, 171)),
    "ulysses": ((278, 198, 186, 163), (332, 294, 276, 248)), "ring": ((89, 68, 48, 28), (97, 86, 57, 29)),
}  # fmt: skip
OURS = {  # layout, exchange and processes that share heads, by the name of a row
    "group_cast": ("greedy", "group_cast", 1), "ring": ("zigzag", "ring", 1),
    "ring, by document": ("document", "ring", 1), "all_gather": ("greedy", "all_gather", 1),
    "ulysses": ("contiguous", "ring", 2),
}  # fmt: skip


def zeco(start: bool) -> dict[str, object]:
    """The best latency, bandwidth, start-up and pieces by the worst residual, and all residuals."""

    def times(link: Link, begin: float, pieces: int) -> dict[str, list[float]]:
        scan = [begin + chain(link, n, STATE, pieces or best_pieces(link, n, STATE)) for n in RANKS]
        return {"all-scan": scan, "all-gather": [begin + all_gather(link, n, STATE) for n in RANKS]}

    def off(found: dict[str, list[float]]) -> dict[str, list[float]]:
        return {name: [1e3 * a / b - 1 for a, b in zip(found[name], ZECO[name], strict=True)] for name in ZECO}

    def worst(given: tuple[float, float, float, int]) -> float:
        found = off(times(Link(*given[:2]), *given[2:]))
        return max(abs(r) for one in found.values() for r, n in zip(one, RANKS, strict=True) if n >= FITTED)

    grid = product(
        np.geomspace(1e-6, 2e-5, 25), np.geomspace(2e10, 6e10, 25), np.linspace(0, 4e-4, 9) if start else (0.0,),
        (0, 8, 16) if start else (0,),
    )  # fmt: skip
    best = min(grid, key=worst)
    rows = [
        {"collective": name, "ranks": n, "published_ms": ms, "residual": round(float(r), 3)}
        for name, one in off(times(Link(*best[:2]), *best[2:])).items()
        for n, ms, r in zip(RANKS, ZECO[name], one, strict=True)
    ]
    named = {
        "latency_us": 1e6 * best[0],
        "bandwidth_gbs": best[1] / 1e9,
        "start_ms": 1e3 * best[2],
        "pieces": best[3] or "best",
    }
    return {"fitted": {k: v if isinstance(v, str) else round(float(v), 3) for k, v in named.items()},
            "worst": round(float(worst(best)), 3), "rows": rows}  # fmt: skip


def magi(draws: int) -> dict[str, object]:
    """Modelled TFLOP/s, means over draws, beside published ones."""
    rows, order = [], []
    for i, ranks in enumerate((8, 16, 32, 64)):
        rates: dict[str, list[tuple[float, float]]] = {}
        for draw in range(draws):
            setting = Setting(ranks=ranks, tokens=8192 * ranks, seed=draw)
            for row in modelled(setting, ["document_causal"], MAGI):
                back = 2.5 / (3.5 / row["rate_back"] - 1 / row["rate"])  # rates of both passes and of the first
                rates.setdefault(row["method"], []).append((row["rate"], back))
        for way, name in enumerate(("forward", "backward")):
            found = {method: float(np.mean([pair[way] for pair in pairs])) for method, pairs in rates.items()}
            told = {method: MAGI[method][way][i] for method in MAGI}
            rows += [
                {"ranks": ranks, "way": name, "method": m, "published": told[m], "modelled": round(found[m], 1),
                 "residual": round(found[m] / told[m] - 1, 3)}
                for m in MAGI
            ]  # fmt: skip
            signs = [np.sign(found[a] - found[b]) * np.sign(told[a] - told[b]) for a, b in combinations(MAGI, 2)]
            order.append({"ranks": ranks, "way": name, "tau": round(float(np.mean(signs)), 3)})
            print(ranks, name, {m: (told[m], round(found[m])) for m in MAGI}, "tau", order[-1]["tau"], flush=True)
    return {"rows": rows, "order": order}


def loongtrain() -> list[dict[str, object]]:
    """Milliseconds of a layer's attention, forward and backward, by processes that share heads and length."""
    rows = []
    for tokens, heads in product((1 << 17, 1 << 20), (1, 2, 4, 8, 16, 32)):
        counts = count(pattern("causal", tokens), 32, "zigzag", Shape(32, 8, 128), "ring", heads)
        ms = 1e3 * predict(counts, CLUSTERS["a100"]).slowest()
        rows.append({"tokens": tokens, "heads": heads, "ms": round(ms, 3), "sent": counts.total() // 32})
        print(rows[-1], flush=True)
    return rows


def measured(folder: Path) -> list[dict[str, object]]:
    """Seconds of two GPUs, modelled and measured, of a forward pass and of both."""
    curve = read_efficiency(folder / "parallel_efficiency.json")
    given = json.loads((folder / "parallel_gpu.json").read_text("utf-8"))
    shape, rows = Shape(*(given["shape"][name] for name in ("heads", "kv_heads", "dim"))), []
    for row in given["rows"]:
        if (how := OURS.get(row["way"])) is None:
            continue
        counts = count(pattern(row["mask"], row["tokens"], 1), given["processes"], how[0], shape, *how[1:])
        found = predict(counts, CLUSTERS["h100"], curve)
        told = {name: row[f"{name}_s"]["median"] for name in ("forward", "both")}
        off = {name: found.slowest(name == "both") / told[name] - 1 for name in told}
        rows.append(
            {"tokens": row["tokens"], "mask": row["mask"], "way": row["way"]}
            | {name: round(1e3 * value, 3) for name, value in told.items()}
            | {f"{name}_off": round(float(value), 3) for name, value in off.items()}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Model, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    about = {"date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment()}
    made = about | {"efficiency": ASSUMED.source, "draws": given.draws, "zeco": zeco(False), "zeco_start": zeco(True)}
    print(made["zeco"], made["zeco_start"], sep="\n", flush=True)
    made |= {"loongtrain": loongtrain(), "magi": magi(given.draws)}
    rows = measured(Path(__file__).parent)
    near = {name: sum(abs(row[f"{name}_off"]) <= NEAR for row in rows) for name in ("forward", "both")}
    made["two_gpus"] = {"rows": rows, "near": near, "of": len(rows)}
    if given.json:
        given.json.write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
