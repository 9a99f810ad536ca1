# SPDX-License-Identifier: Apache-2.0
"""Attention on several devices: how tokens are shared among processes, and what these exchange."""

from ._context import EXCHANGES, ContextParallel, World
from ._frames import FrameParallel, Traffic
from ._gradients import sum_gradients
from ._kept import keep_attention
from ._layouts import LAYOUTS, Layout, balance, layout
from ._ledger import Ledger
from ._masks import PATTERNS, AttnMask, AttnSlice, pattern
from ._processes import Processes

__all__ = [
    "EXCHANGES", "LAYOUTS", "PATTERNS", "AttnMask", "AttnSlice", "ContextParallel", "FrameParallel", "Layout", "Ledger",
    "Processes", "Traffic", "World", "balance", "keep_attention", "layout", "pattern", "sum_gradients",
]  # fmt: skip
