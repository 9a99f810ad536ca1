# SPDX-License-Identifier: Apache-2.0
"""How evenly layouts share masks out among processes, and how many rows of keys each has to get from others.

    python benchmarks/layouts.py [--ranks 8] [--tokens 2048] [--draws 3] [--json benchmarks/layouts.json]

Pairs and rows are counted, nothing is timed: ``imbalance`` is the pairs of the busiest process over the mean, ``moved``
the rows that processes need from others over those that a ring moves. Means over draws of texts, prefixes and blocks.
"""

import argparse
import datetime
import json
from pathlib import Path

from manyheads.environment import commit, environment
from manyheads.parallel import LAYOUTS, PATTERNS, balance, layout, pattern


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of a process")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for name in PATTERNS:
        masks = [pattern(name, given.ranks * given.tokens, seed) for seed in range(given.draws)]
        for how in LAYOUTS:
            told = [balance(mask, layout(how, mask, given.ranks)) for mask in masks]
            mean = {key: sum(getattr(one, key) for one in told) / len(told) for key in ("imbalance", "moved")}
            rows.append({"mask": name, "layout": how} | {key: round(value, 4) for key, value in mean.items()})
            print(f"{name:16} {how:12} imbalance {mean['imbalance']:.3f}  moved {mean['moved']:.3f}", flush=True)
    about = {"date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment()}
    made = about | {"ranks": given.ranks, "tokens": given.tokens, "draws": given.draws, "rows": rows}
    if given.json:
        given.json.write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
