# SPDX-License-Identifier: Apache-2.0
"""One training loop for everything that is trained, and what goes with it: budgets, optimisers, schedules, checkpoints.

state = fit(model, get_batch, loss, budget="10m", optimizers=optimizers_of(model, 3e-3), schedule=decay("cosine"))
"""

from .budget import Budget, Unit
from .checkpoint import Checkpoint
from .fit import BatchFn, Diverged, TrainState, fit
from .flow import train_flow
from .language import masked_nll, masked_token_loss, next_token_loss, token_nll, train_lm
from .matching import matched_width
from .optimizers import Muon, OptimizerName, optimizers_of
from .schedules import Schedule, decay

__all__ = [
    "BatchFn", "Budget", "Checkpoint", "Diverged", "Muon", "OptimizerName", "Schedule", "TrainState", "Unit",
    "decay", "fit", "masked_nll", "masked_token_loss", "matched_width", "next_token_loss", "optimizers_of",
    "token_nll", "train_flow", "train_lm",
]  # fmt: skip
