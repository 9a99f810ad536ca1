# SPDX-License-Identifier: Apache-2.0
"""The one rule for random draws: a draw is named by the axes that share it.

``generator(seed, contexts="niah_single", length=1024)`` is the same in every process and at every call; arms see the
same contexts because no draw of a context names an arm, and two seeds differ because every draw begins with one.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["generator", "number", "torch_generator"]


def number(seed: int, /, **axes: str | int | float) -> int:
    """A 63-bit seed for the draw that ``axes`` name; their order does not matter."""
    import numpy as np

    names = [zlib.crc32(f"{name}={axes[name]}".encode()) for name in sorted(axes)]
    return int(np.random.SeedSequence([seed, *names]).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int, /, **axes: str | int | float) -> np.random.Generator:
    """NumPy's generator for the draw that ``axes`` name."""
    import numpy as np

    return np.random.default_rng(number(seed, **axes))


def torch_generator(seed: int, /, **axes: str | int | float) -> torch.Generator:
    """PyTorch's generator for the draw that ``axes`` name, on the CPU whatever the run is on."""
    import torch

    return torch.Generator().manual_seed(number(seed, **axes))
