# SPDX-License-Identifier: Apache-2.0
"""Gates for ``fastkvzip``, trained on KVzip's scores of a frozen model: minutes on a GPU.

python -m manyheads.recipes.fastkvzip --model MODEL --out FOLDER [--text prose] [--pieces 256] [--rank N] [--others N]
"""

import sys

from manyheads.caches.fastkvzip import SinkGates

from ._kvzip_scores import run

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    return run("fastkvzip", SinkGates, ["rank", "others"], arguments)


if __name__ == "__main__":
    sys.exit(main())
