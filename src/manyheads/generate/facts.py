# SPDX-License-Identifier: Apache-2.0
"""What was asked of a pipeline, and what each arm cost and changed."""

from collections.abc import Sequence
from typing import Any

import diffusers

from ..environment import environment
from .rows import Row
from .run import Made, Settings

__all__ = ["facts"]


def facts(made: Sequence[Made], rows: Sequence[Row], settings: Settings, pipe: Any) -> dict[str, Any]:
    """What was asked and what each arm cost and changed, of JSON's types.

    ``mean_difference`` (0 to 1) and ``psnr`` (dB) are to the baseline; ``psnr`` is None for the same images.
    """
    base = made[0]
    return {
        "pipeline": type(pipe).__name__,
        "steps": settings.steps, "guidance": settings.guidance, "size": settings.size,
        "rows": [
            {"seed": r.seed, "prompt": r.prompt, "source": r.source, "class": r.number} for r in rows
        ],
        "arms": [
            {
                "arm": each.arm.name, "strategies": [s.spec for s in each.arm.strategies],
                "seconds": each.seconds, "ratio": each.seconds / base.seconds,
                "denoiser_calls": each.calls, "denoiser_rows": each.passed,
                "mean_difference": each.difference(base), "psnr": each.psnr(base),
                "peak_bytes": each.peak, "kept_bytes": each.kept,
            }
            for each in made
        ],
        "environment": environment() | {"diffusers": diffusers.__version__},
    }  # fmt: skip
