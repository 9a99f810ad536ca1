# SPDX-License-Identifier: Apache-2.0
"""Auctions with what each is worth and the highest other bid: simulated, or of a log of real ones.

``simulated``  values from 0 to 1, uniform; other bids Beta(2, 3), so that their distribution is known
``ipinyou``    156,063 auctions for advertisements of iPinYou's campaign 2997, in the order of time: prices paid (in 300
               units), and values by the chance of a click that a model told, 0.35 for the mean
"""

from typing import Any

import numpy as np

__all__ = ["beta_2_3", "logged", "simulated"]

_HIGHEST, _MEAN_VALUE = 300.0, 0.35


def beta_2_3(x: Any) -> Any:
    """Distribution function of Beta(2, 3) at ``x`` from 0 to 1."""
    x = np.asarray(x, float)
    return 6 * x**2 - 8 * x**3 + 3 * x**4


def simulated(runs: int, rounds: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Values and other bids ``[runs, rounds]``."""
    return rng.random((runs, rounds)), rng.beta(2, 3, (runs, rounds))


def logged(rounds: int) -> tuple[Any, Any]:
    """Values and other bids ``[runs, rounds]``: as many runs as the log holds one after the other.

    Raises:
        UserError: the file cannot be had.
    """
    from . import files

    table = np.array([line.split() for line in files.text("ipinyou-2997").splitlines()], float)  # click, price, chance
    runs = len(table) // rounds
    values = (_MEAN_VALUE * table[:, 2] / table[:, 2].mean()).clip(max=1)
    kept = [one[: runs * rounds].reshape(runs, rounds) for one in (values, table[:, 1] / _HIGHEST)]
    return kept[0], kept[1]
