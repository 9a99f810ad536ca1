# SPDX-License-Identifier: Apache-2.0
"""Arms of an experiment: a strategy at a budget, or the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError

if TYPE_CHECKING:
    from ..strategy import Strategy

__all__ = ["BASELINE", "Arm", "BudgetUnit", "over"]

BudgetUnit = Literal["slots", "bytes", "parameters", "seconds", "steps", "none"]
BASELINE = "full"


@dataclass(frozen=True)
class Arm:
    """A strategy at a budget.

    Attributes:
        name: of the strategy in this experiment, common to all its budgets.
        spec: of the strategy without its budget; empty where the subject runs as it is. Several that act together are
            joined by `` + ``.
        budget: the value of the strategy's field ``budget``; None where it has none.
        options: how the subject is trained or run under this arm where that is no part of the strategy: an optimizer,
            a number of steps, another implementation of the same mathematics.
    """

    name: str
    spec: str = ""
    budget: int | float | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Name in rows, unique in a run."""
        if self.budget is None:
            return self.name
        return f"{self.name}{',' if ':' in self.name else ':'}budget={self.budget!r}"

    @property
    def full_spec(self) -> str:
        """The spec with the budget in it."""
        if self.budget is None or not self.spec:
            return self.spec
        return f"{self.spec}{',' if ':' in self.spec else ':'}budget={self.budget!r}"

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """What acts, in the order of the spec; nothing for the plain subject."""
        return _parsed(self.full_spec) if self.spec else ()

    @property
    def strategy(self) -> Strategy:
        """The one strategy that acts.

        Raises:
            UserError: none does, or several do.
        """
        if len(self.strategies) != 1:
            raise UserError(f"the arm {self.key!r} is {self.spec or 'the plain subject'}, not one strategy")
        return self.strategies[0]

    def described(self) -> dict[str, Any]:
        """The arm as ``run.json`` has it."""
        return {
            "key": self.key, "name": self.name, "spec": self.full_spec, "budget": self.budget,
            "options": dict(self.options),
        }  # fmt: skip


def over(arms: Mapping[str, str] | Iterable[str], budget: Iterable[int | float] | None = None) -> tuple[Arm, ...]:
    """Arms of named specs, each at every budget; without names a spec is its own name.

    Args:
        arms: spec by name, or specs.
        budget: values of the field ``budget``; None for one arm each, as it is.
    """
    named = dict(arms) if isinstance(arms, Mapping) else {spec: spec for spec in arms}
    if budget is None:
        return tuple(Arm(name, spec) for name, spec in named.items())
    return tuple(Arm(name, spec, value) for name, spec in named.items() for value in budget)


@cache
def _parsed(text: str) -> tuple[Strategy, ...]:
    """Strategies of a spec; tasks ask for those of an arm at every forward."""
    from ..spec import parse, split_together

    return tuple(parse(part) for part in split_together(text))
