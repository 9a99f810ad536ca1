# SPDX-License-Identifier: Apache-2.0
"""Hand-written GPU kernels. Only the submodules import Triton, so this package is imported anywhere at no cost.

Each kernel has a twin in plain torch, which says what it computes: ``decode`` -> ``attention.ragged``,
``block_sparse`` -> ``attention.sparse_twin`` and, where tiles have bits, ``parallel._partial``,
``accumulated_attention`` -> ``attention.accumulated_attention``, ``probe`` -> ``calls.statistics``, ``recurrence`` ->
``attention.recurrence``, ``product_codes`` -> ``attention.product_codes`` and ``attention.offloaded``. The kernels are
taken where :func:`available` says so.
"""

from importlib.util import find_spec

import torch

__all__ = ["available", "decode_takes"]


def available() -> bool:
    """Whether the kernels can run: Triton is installed and there is a CUDA device."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def decode_takes(keys: torch.Tensor) -> bool:
    """Whether the decode kernel runs over keys of this device and head dimension."""
    return keys.is_cuda and keys.shape[-1] in (32, 64, 128, 256) and available()
