# SPDX-License-Identifier: Apache-2.0
"""Keep every token: the yardstick of all cache strategies, bit-equal to the model's own cache.

Sliding-window layers still drop what no later query can see, as the model's own cache does.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from ..attention.budget import Budget
from ..errors import UserError
from ._strategy import EvictionStrategy

__all__ = ["Full"]


@dataclass(frozen=True, kw_only=True)
class Full(EvictionStrategy):
    """Keep every token."""

    has_budget: ClassVar[bool] = False

    budget: Budget = field(default=1.0, metadata={"help": "always 1.0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0 or isinstance(self.budget, int):
            raise UserError(f"full keeps every token: its budget is 1.0, not {self.budget}")
