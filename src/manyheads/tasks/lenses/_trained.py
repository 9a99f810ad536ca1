# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train a small model first: an ordinary Llama, a unit for each training, and its progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ...experiment import Arm, RunContext, Task, WorkUnit, seeding
from ...training import TrainState

__all__ = ["TrainedTask", "llama", "told"]

_EVERY = 20  # steps between two reports of progress
_TRAINING = 0.9  # of the cost of a unit; the rest is judging


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTask(Task):
    """Base of the tasks that train: a unit for each seed, or for each seed and arm where arms are trained apart.

    Attributes:
        steps: of a training.
    """

    subject: ClassVar[str] = "trainable"
    apart: ClassVar[bool] = True  # whether every arm is a training of its own

    steps: int = 600

    def trained_arms(self, run: RunContext) -> list[Arm]:
        """Arms that this task is about."""
        return list(run.arms)

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.steps)
        if not self.apart:
            return [WorkUnit(self.key, f"{s}", cost, f"training, seed {s}", {"seed": s}) for s in run.seeds]
        return [
            WorkUnit(
                self.key, f"{seed}/{arm.key}", cost, f"training {arm.key}, seed {seed}", {"seed": seed, "arm": arm.key}
            )
            for seed in run.seeds
            for arm in self.trained_arms(run)
        ]  # fmt: skip


def told(run: RunContext, unit: WorkUnit, steps: int) -> Callable[[TrainState], None]:
    """An ``on_step`` that reports the share of the unit's cost that goes into ``steps`` of training."""

    def on_step(state: TrainState) -> None:
        if state.step % _EVERY == 0:
            run.advance(_EVERY * _TRAINING * unit.cost / steps)

    return on_step


def llama(run: RunContext, vocab: int, dim: int, layers: int, heads: int, seed: int, **config: Any) -> Any:
    """A Llama of transformers with random weights on the run's device: lenses meet it as they meet any other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seeding.number(run.seed, weights="llama", seed=seed))
    given: dict[str, Any] = {"intermediate_size": 2 * dim, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    made: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, bos_token_id=None, eos_token_id=None, pad_token_id=None, **given | config,
        )
    )  # fmt: skip
    return made.to(run.device)
