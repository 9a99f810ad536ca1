# SPDX-License-Identifier: Apache-2.0
"""What was found, fit for JSON."""

import math
from typing import Any

import numpy as np
import torch

from ..lens import LensResult

__all__ = ["document_of", "plain_values"]


def document_of(found: LensResult) -> dict[str, Any]:
    """A result fit for JSON, without its maps."""
    return {
        "tables": {name: made.to_dict() for name, made in found.tables.items()},
        "series": {name: plain_values(rows) for name, rows in found.series.items()},
        "channels": {name: plain_values(values) for name, values in found.channels.items()},
        **({"steps": plain_values(found.steps)} if found.steps else {}),
        **({"curves": plain_values(found.curves)} if found.curves else {}),
        "records": {name: plain_values(rows) for name, rows in found.records.items()},
        "notes": list(found.notes),
    }


def plain_values(value: Any) -> Any:
    """Arrays and tensors as lists, NaN and infinity as None."""
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    if isinstance(value, np.ndarray | torch.Tensor | np.generic):
        return plain_values(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
