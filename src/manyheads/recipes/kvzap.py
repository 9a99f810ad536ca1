# SPDX-License-Identifier: Apache-2.0
"""Networks for ``kvzap``, trained on KVzip+'s scores of a frozen model: minutes on a GPU.

python -m manyheads.recipes.kvzap --model MODEL --out FOLDER [--text prose] [--pieces 256] [--hidden N]
"""

import sys

from manyheads.caches.kvzap import ScoreNetworks

from ._kvzip_scores import run

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    return run("kvzap", ScoreNetworks, ["hidden"], arguments)


if __name__ == "__main__":
    sys.exit(main())
