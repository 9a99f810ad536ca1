# SPDX-License-Identifier: Apache-2.0
"""``python -m manyheads``: the same command line as ``manyheads``."""

from manyheads.cli import main

if __name__ == "__main__":
    main()
