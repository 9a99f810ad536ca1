# SPDX-License-Identifier: Apache-2.0
"""Times that a paper reports of passing states on, and the alpha-beta model fitted to them.

ZeCO (arXiv 2507.01004) times its All-Scan and an all-gather of the states of 32 heads of 128 x 128 in bfloat16, 1 MiB,
on 8 to 256 H100. Up to 16 of them other links are in use, so that the model is fitted from 32 on: by a line for each,
``launch + (P - 1)(alpha + M / beta)`` of the all-gather, ``launch + (P - 2 + K)(alpha + M / (K beta))`` of the chain.
The paper does not say K; 16 stands here. Errors relative to the times are squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...parallel import _cost

__all__ = ["PUBLISHED", "Fit", "published_fit"]

SIZE, PIECES, FIRST = 2.0**20, 16, 32
# Milliseconds by number of processes.
PUBLISHED: dict[str, dict[int, float]] = {
    "chain": {8: 0.226, 16: 0.297, 32: 0.448, 64: 0.739, 128: 1.272, 256: 2.165},
    "all_gather": {8: 0.375, 16: 0.658, 32: 1.616, 64: 2.543, 128: 4.350, 256: 8.514},
}


@dataclass(frozen=True)
class Fit:
    """A link, and what each exchange takes beside its messages.

    Attributes:
        link: seconds and bytes per second.
        launch: ms, by exchange.
    """

    link: _cost.Link
    launch: dict[str, float]

    def time(self, exchange: str, count: int, mebibytes: float = 1.0) -> float:
        """Modelled milliseconds of an exchange, of the paper's ``chain``, or of a chain ``step by step``."""
        size = mebibytes * SIZE
        seconds = {
            "chain": lambda: _cost.chain(self.link, count, size, PIECES),
            "step by step": lambda: _cost.chain(self.link, count, size),
            "all_gather": lambda: _cost.all_gather(self.link, count, size),
            "doubling": lambda: _cost.doubling(self.link, count, size),
        }[exchange]()
        return 1e3 * seconds + self.launch["chain" if exchange == "step by step" else exchange]


def published_fit(without: int | None = None) -> Fit:
    """The model fitted to the published times, but for those of so many processes."""
    lines = {}
    for name, times in PUBLISHED.items():
        used = [(count, ms) for count, ms in times.items() if count >= FIRST and count != without]
        count, ms = (np.array(x, dtype=float) for x in zip(*used, strict=True))
        steps = count - 1 if name == "all_gather" else count - 2 + PIECES
        slope, launch = np.linalg.lstsq(np.stack([steps, np.ones_like(steps)], 1) / ms[:, None], ms / ms, rcond=None)[0]
        lines[name] = float(slope), float(launch)
    step, piece = lines["all_gather"][0], lines["chain"][0]  # alpha + M / beta, and alpha + M / (K beta)
    moved = (step - piece) / (1 - 1 / PIECES)
    link = _cost.Link(1e-3 * (step - moved), SIZE / (1e-3 * moved))
    if link.latency <= 0 or not math.isfinite(link.bandwidth):
        raise ValueError(f"the published times do not give a link: {link}")
    launch = {name: line[1] for name, line in lines.items()}
    return Fit(link, launch | {"doubling": max(launch.values())})
