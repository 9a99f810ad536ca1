# SPDX-License-Identifier: Apache-2.0
"""How many sums a language model works out rightly after it was trained on rewards, with credit by token.

A model of this size solves next to none in its own way, so it imitates worked sums first, until a share of its
responses is right; from there a copy is trained under each arm on the same problems with as many responses, and solves
problems that no training met. ``options`` of an arm: ``credit``, as in ``manyheads.recipes.reasoning_rhythm``; an arm
without is the model as training finds it.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from ...experiment import CausalLM, Metric, Row, RunContext, WorkUnit, seeding
from ...training import decay
from ..text._text_task import model_of
from ._chat import base_model
from ._trained import TrainedTask, told

if TYPE_CHECKING:
    from ...recipes.reasoning_rhythm import Problem
    from ...training.policy_gradient import Rollout

__all__ = ["RewardedSums"]

_PARTS = 5  # of a training, in which its rewards are shown
_UPDATES = 2  # steps on the responses of a rollout
_LOOKED = 32  # problems on which it is looked whether the imitation is enough


@dataclass(frozen=True, kw_only=True)
class RewardedSums(TrainedTask):
    """A value for each problem, and under each seed: the imitation is one for all, draws and training are the seed's.

    Attributes:
        steps: of a training, two on each rollout.
        prompts, group: of a rollout, and responses to each.
        tokens: of a response at most.
        lr: of training.
        largest: number in a sum of three.
        problems, answers: that are judged, and responses drawn to each.
        warm, warm_steps, warm_lr: share of right responses at which the imitation of worked sums ends, its most steps,
            of 16 sums each, and its rate.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("solved", "responses that are right", higher=True, kind="share"),
        Metric("solved_greedily", "greedy responses that are right", higher=True, kind="share"),
        Metric("reward", "right responses while it was trained", higher=True, kind="share"),
        Metric("length", "tokens of a response"),
    )

    steps: int = 60
    prompts: int = 16
    group: int = 8
    tokens: int = 48
    lr: float = 1e-5
    largest: int = 99
    problems: int = 128
    answers: int = 4
    warm: float = 0.4
    warm_steps: int = 200
    warm_lr: float = 5e-5

    def unsupported_reason(self, run: RunContext) -> str | None:
        return base_model(cast(CausalLM, run.subject), "no turn of its own to answer in")

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...recipes.reasoning_rhythm import prompts_of, rhythm_credit, right
        from ...training.policy_gradient import sample, train_policy

        seed, arm, tokenizer = unit.params["seed"], run.arm_of(unit), cast(CausalLM, run.subject).tokenizer
        model = copy.deepcopy(model_of(run)).float()
        model.load_state_dict(run.kept(("warm", self), lambda: self._warm(run)))
        test = self._drawn(run, "test", self.problems)
        rollouts: list[Row] = []
        if "credit" in arm.options:
            taken = {problem.question for problem in test}

            def draw(number: int) -> Any:
                made = self._drawn(run, "training", 2 * self.prompts, seed=seed, number=number)
                others = [problem for problem in made if problem.question not in taken]
                return prompts_of(tokenizer, others[: self.prompts])

            def on_rollout(number: int, rollout: Rollout) -> None:
                part = 1 + number * _PARTS * _UPDATES // self.steps
                value = float(rollout.rewards.mean())
                rollouts.append(self.row("reward", arm, value, f"{number}", seed=seed, at={"part": part}))

            train_policy(
                model, draw, budget=self.steps, lr=self.lr, group=self.group, length=self.tokens, updates=_UPDATES,
                credit=rhythm_credit(arm.options["credit"], seed=seed), seed=self._seed(run, "training", seed),
                schedule=decay("none", warmup=4), on_rollout=on_rollout, on_step=told(run, unit, self.steps),
            )  # fmt: skip
        yield from rollouts
        prompts, asked = prompts_of(tokenizer, test), self._seed(run, "test", seed)
        shares = right(model, prompts, self.tokens, draws=self.answers, seed=asked)
        yield from self.each("solved", arm, shares.tolist(), seed=seed)
        greedily = right(model, prompts, self.tokens, draws=1, temperature=0.0)
        yield from self.each("solved_greedily", arm, greedily.tolist(), seed=seed)
        few = sample(model, prompts[:_LOOKED], 1, self.tokens, seed=asked)
        yield from self.each("length", arm, few.response.sum(1).tolist(), seed=seed)

    def _drawn(self, run: RunContext, use: str, count: int, **axes: int) -> list[Problem]:
        from ...recipes.reasoning_rhythm import drawn_sums

        return drawn_sums(count, run.rng(sums=use, **axes), largest=self.largest)

    def _seed(self, run: RunContext, use: str, seed: int) -> int:
        return seeding.number(run.seed, responses=use, seed=seed)

    def _warm(self, run: RunContext) -> dict[str, Tensor]:
        """Weights after the imitation, the same in all processes of a run, whichever made them."""
        from safetensors.torch import load_file, save_file

        base = None if run.folder is None else Path(run.folder)
        place = base and base / "imitated sums"
        if place is None or not place.exists():
            weights = self._imitated(run)
            if base is None or place is None:
                return weights
            draft = Path(tempfile.mkdtemp(prefix=".", dir=base))
            save_file(weights, draft / "model.safetensors")
            try:
                draft.rename(place)
            except OSError:  # another process was quicker
                shutil.rmtree(draft)
        return load_file(place / "model.safetensors")

    def _imitated(self, run: RunContext) -> dict[str, Tensor]:
        from ...recipes.reasoning_rhythm import warm_up

        model = copy.deepcopy(model_of(run)).float()
        warm_up(
            model, cast(CausalLM, run.subject).tokenizer,
            lambda number: self._drawn(run, "imitation", 16, number=number),
            self._drawn(run, "looked", _LOOKED), until=self.warm, most=self.warm_steps, lr=self.warm_lr,
            length=self.tokens, seed=self._seed(run, "looked", 0),
        )  # fmt: skip
        return {name: x.detach().cpu().clone().contiguous() for name, x in model.state_dict().items()}
