# SPDX-License-Identifier: Apache-2.0
"""The picture of docs/decoding.md: samplers as curves on chains of letters, exact, of the same draw as the claim's.

python docs/_generate/frontier.py  # writes docs/frontier.svg
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from manyheads import claims
from manyheads.experiment import RunContext
from manyheads.report.plots import Panel, Series, lines

SHOWN = ("nucleus", "top-k", "temperature")
ALT = "Loss against entropy of nucleus, top-k and temperature, normalised locally and globally; distortion against mass"


def main() -> None:
    """Measure the chains of the claim and draw them."""
    plan = claims.load("lnd").experiment.at("cpu")
    task = next(task for task in plan.tasks if task.key == "chain_frontier")
    run, values = RunContext(plan.subject, plan.arms), defaultdict[tuple[str, str], dict[Any, list[float]]](dict)
    for row in task.measure(run, task.units(run)[0]):
        values[row.metric, row.arm].setdefault(row.at.get("setting"), []).append(row.value)

    def line(arm: str, x: str, y: str) -> Series:
        mean = {name: [sum(v) / len(v) for v in values[name, arm].values()] for name in (x, y)}
        return Series(arm, mean[x], mean[y])

    arms = [f"{cut}, {law}" for cut in SHOWN for law in ("local", "global")]
    local = [f"{cut}, local" for cut in ("nucleus", "top-k")]
    picture = lines(
        [
            Panel([line(arm, "entropy", "nll") for arm in arms], "Loss", "entropy, nats per letter", "nats per letter"),
            Panel([line(arm, "mass", "distortion") for arm in [local[0], "", local[1]] if arm], "Distortion",
                  "mean mass kept", "nats per letter", log="y"),
        ],
        ALT,
    )  # fmt: skip
    Path(__file__).resolve().parents[1].joinpath("frontier.svg").write_text(alone(picture), encoding="utf-8")


def alone(picture: str) -> str:
    """A picture that no page gives its colours to."""
    for name, colour in (("ink", "#1c2126"), ("faint", "#b9c1c8"), ("paper", "#ffffff")):
        picture = picture.replace(f"var(--{name})", colour)
    start = picture.index(">") + 1
    opened = picture[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f'{opened}<rect width="100%" height="100%" fill="#ffffff"/>{picture[start:]}\n'


if __name__ == "__main__":
    main()
