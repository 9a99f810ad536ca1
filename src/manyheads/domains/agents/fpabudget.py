# SPDX-License-Identifier: Apache-2.0
r"""Learning to Bid in Repeated First-Price Auctions with Budgets (arXiv 2304.13477). No attention, and no training.

T auctions, of which each is worth ``v_t`` in [0, 1]; who bids ``b`` not below the highest other bid ``d_t`` wins it and
pays ``b``. All payments together are at most ``B = rho T``. The other bids come from a distribution G that is learned:

    b_t          = argmax_b  (v_t - (1 + lambda_t) b) G~_t(b)          0 where that exceeds what is left of B
    lambda_t+1   = max(0, lambda_t - eta (rho - b_t G~_t(b_t))),       eta = C / sqrt(T), lambda_1 = 0

``lambda`` is the price of a unit of budget. With full information G~_t is the empirical distribution of d_1 .. d_t-1.
Where only the winning bid is told (``feedback=one_sided``), a lost auction tells d, a won one that d <= b. Whether
``d_s <= x`` is known for all ``x >= b_s`` either way, so that

    G~_t(x) = sum_{s < t: b_s <= x} 1{d_s <= x} / N(x),    N(x) = #{s < t: b_s <= x}

plus ``optimism sqrt(ln T / N)``, at most 1. Low bids tell of all higher ones; a first bid is 0. The estimate and its
optimism are a reading of the specification's: the paper's second algorithm was not at hand. Bids are those of a grid of
``levels`` steps from 0 to 1, the lowest of those that are equally good.

``relative`` divides the step by rho: payments are a few hundredths where budgets are tight, and with C = 1 lambda does
not get to where it should be in some ten thousand auctions. The paper says of C no more than that it is a constant; by
default it is ``0.1 / rho``. ``step=0`` spends without a price of the budget, and
``rule=shading`` bids ``v / (1 + lambda)``, as is right in second-price auctions, with the same lambda: controls, beside
``rule=random``, a bid drawn between 0 and v.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...errors import UserError
from ...recipe import Procedure

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Fpabudget", "best_bids"]


def best_bids(values: Any, price: Any, chance: Any) -> Any:
    """Levels ``[S]`` of the bids ``argmax_b (v - (1 + lambda) b) G(b)`` for values and lambdas ``[S]``.

    Args:
        values, price: v and lambda of each run.
        chance: G at each level ``[S, levels + 1]``, or of all runs ``[levels + 1]``.
    """
    import numpy as np

    grid = np.linspace(0, 1, np.shape(chance)[-1])
    return ((values[:, None] - (1 + price[:, None]) * grid) * chance).argmax(-1)


@dataclass(frozen=True, kw_only=True)
class Fpabudget(Procedure):
    """Bids in repeated first-price auctions under a budget, by a price of the budget and learned chances to win.

    Attributes:
        feedback: what is told of the other bids: all, or the winning bid alone.
        step: C, of the steps of lambda; 0 leaves it 0.
        relative: the step is divided by rho.
        optimism: what is added to chances that are little known; for ``one_sided``.
        levels: of bids above 0.
        rule: ``first_price``, or a control.
    """

    task: ClassVar[str] = "first_price_auctions"

    feedback: Literal["full", "one_sided"] = field(
        default="full", metadata={"help": "full: all other bids are told; one_sided: the winning bid alone"}
    )
    step: Annotated[float, Field(ge=0)] = field(default=0.1, metadata={"help": "C, of steps of the budget's price"})
    relative: bool = field(default=True, metadata={"help": "the step is divided by the budget of a round"})
    optimism: Annotated[float, Field(ge=0)] = field(default=0.0, metadata={"help": "for chances that are little known"})
    levels: Annotated[int, Field(ge=2)] = field(default=200, metadata={"help": "bids above 0"})
    rule: Literal["first_price", "shading", "random"] = field(
        default="first_price", metadata={"help": "first_price, or a control: shading, random"}
    )

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "played"):
            raise UserError(f"fpabudget: {task.name} has no auctions: give --task first_price_auctions")
        yield from task.played(lambda values, others, rho: self.bids(values, others, rho, rng))

    def bids(self, values: Any, others: Any, rho: float, rng: "np.random.Generator") -> Any:
        """Bids ``[S, T]`` in S runs of T auctions, each by what was told before it.

        Args:
            values, others: v and d, ``[S, T]``, from 0 to 1.
            rho: budget of a run by its auctions.
            rng: of random bids.
        """
        import numpy as np

        runs, rounds = values.shape
        eta = self.step / rounds**0.5 / (rho if self.relative else 1.0)
        grid, every = np.linspace(0, 1, self.levels + 1), np.arange(runs)
        price, left, made = np.zeros(runs), np.full(runs, rho * rounds), np.zeros((runs, rounds))
        won, known = (np.zeros((runs, self.levels + 1)) for _ in range(2))
        for t in range(rounds):
            chance = won / known.clip(min=1)
            if self.optimism and t:
                chance = chance + self.optimism * np.sqrt(np.log(rounds) / known.clip(min=1))
                chance = np.where(known > 0, chance, 1.0).clip(max=1)
            if self.rule == "first_price":
                at = best_bids(values[:, t], price, chance)
            else:
                wanted = values[:, t] / (1 + price) if self.rule == "shading" else values[:, t] * rng.random(runs)
                at = (wanted * self.levels + 1e-9).astype(int)
            at = np.where((grid[at] > left) | (values[:, t] <= 0), 0, at)
            bid, told = grid[at], chance[every, at]
            made[:, t] = bid
            paid = np.where(bid >= others[:, t], bid, 0.0)
            left = left - paid
            price = np.maximum(0, price - eta * (rho - bid * told))
            tells = (self.feedback == "full") | (grid >= bid[:, None])
            known += tells
            won += tells & (grid >= others[:, t, None])
        return made
