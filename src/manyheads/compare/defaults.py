# SPDX-License-Identifier: Apache-2.0
"""What a comparison does unless told otherwise; the command line reads it for its help, so nothing is imported."""

__all__ = ["BUDGETS", "LENGTHS", "SAMPLES", "STRATEGIES"]

# hedge at one budget, and asking a quarter of its queries again: on a CPU they are what it costs.
STRATEGIES = ("full", "random", "streaming_llm", "snapkv", "keydiff", "hedge:window_size=128,budget=0.1")
BUDGETS: tuple[float, ...] = (0.5, 0.25, 0.1)
LENGTHS = (1024, 2048)
SAMPLES = 6
