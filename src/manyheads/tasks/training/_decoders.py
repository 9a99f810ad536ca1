# SPDX-License-Identifier: Apache-2.0
"""Models of arms: made alike, proven to see no future (without that a loss means nothing), and timed as they are."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...experiment import Arm, RunContext, Task, WorkUnit, seeding
from ...models.decoder import Decoder, DecoderConfig, TokenModel
from ...strategy import Strategy

__all__ = [
    "UntrainedTask", "check_causal", "check_rows", "decoder_of", "mixer_of", "model_of", "now", "perturb_zero_params",
]  # fmt: skip

M = TypeVar("M", bound=TokenModel)

_LEAK = 1e-5  # of the largest change that the tokens make to their own predictions; without a leak there is none at all


def mixer_of(run: RunContext, arm: Arm) -> Strategy:
    """The arm's mixer: of its spec, or the caller's own, which the run's ``data["strategies"]`` holds by key."""
    own: Strategy | None = run.data.get("strategies", {}).get(arm.key)
    return arm.strategy if own is None else own


def decoder_of(run: RunContext, arm: Arm, config: DecoderConfig, parameters: int, seed: int = 0) -> Decoder:
    """The arm's decoder with its first weights, see :func:`model_of`."""
    return model_of(Decoder, run, arm, config, parameters, seed)


def model_of(kind: type[M], run: RunContext, arm: Arm, config: DecoderConfig, parameters: int, seed: int = 0) -> M:
    """The arm's model with its first weights, on the run's device; no global generator is moved on.

    Args:
        kind: decoder or encoder.
        run: of the task.
        arm: whose mixer it has.
        config: of the model.
        parameters: that it is brought to; 0 for those of the baseline's as ``config`` has it.
        seed: of the first weights.
    """

    def of_baseline() -> int:
        with torch.device("meta"):
            return kind(mixer_of(run, run.baseline), config).parameters_held

    parameters = parameters or run.kept(("parameters", kind, config), of_baseline)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.number(run.seed, weights=seed))
        return kind.matched(mixer_of(run, arm), config, parameters).to(run.device)


@torch.no_grad()
def check_causal(model: TokenModel, ids: Tensor, name: str) -> None:
    """Change tokens ``ids [B, T]`` from some place on: no prediction before it may change.

    Raises:
        UserError: one does.
    """
    training = model.training
    model.eval()
    # What a model merges or chooses can tip where sums are only rounded otherwise; a leak remains in float64.
    if _leak(model, ids) is not None and (cut := _leak(copy.deepcopy(model).double(), ids)) is not None:
        raise UserError(
            f"{name} is not causal: tokens from position {cut} on change predictions before it, "
            "so its loss would mean nothing; mend its mixer or leave it out"
        )
    model.train(training)


def _leak(model: TokenModel, ids: Tensor) -> int | None:
    """The position from which other tokens change what is predicted before it by more than rounding."""
    before, _ = model(ids)
    for cut in {1, ids.shape[1] // 3, ids.shape[1] - 1}:
        other = ids.clone()
        other[:, cut:] = _others(ids[:, cut:], model.config.vocab)
        change = (model(other)[0] - before).abs()
        if not bool(change[:, :cut].amax() <= _LEAK * change[:, cut:].amax()):
            return cut
    return None


@torch.no_grad()
def check_rows(model: TokenModel, ids: Tensor, name: str) -> None:
    """Change a sequence of ``ids [B, T]`` (or values), B at least 2: what is said of the others may not change.

    An encoder may see both sides of what is hidden, but not another window of the same text.

    Raises:
        UserError: it does.
    """
    training = model.training
    model.eval()
    if _row_leaks(model, ids) and _row_leaks(copy.deepcopy(model).double(), ids):
        raise UserError(
            f"{name} lets the sequences of a batch see each other, so its loss would mean nothing; mend its mixer or "
            "leave it out"
        )
    model.train(training)


def _row_leaks(model: TokenModel, ids: Tensor) -> bool:
    """Whether another first sequence changes what is said of the others by more than rounding."""
    if ids.is_floating_point():
        ids = ids.to(next(model.parameters()).dtype)
    other = ids.clone()
    if ids.is_floating_point():
        other[0] = 1 - 2 * other[0]
    else:
        other[0] = _others(ids[0], model.config.vocab)
    change = (model(other)[0] - model(ids)[0]).abs()
    return not bool(change[1:].amax() <= _LEAK * change[:1].amax())


def _others(ids: Tensor, vocab: int) -> Tensor:
    """Another token in the place of each of ``ids [..., T]``, at neighbouring places by another step."""
    return (ids + 1 + torch.arange(ids.shape[-1], device=ids.device) % 7) % vocab


def perturb_zero_params(model: nn.Module) -> None:
    """Give parameters that start at zero a value, so that a path they close cannot hide a leak."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.5)


@dataclass(frozen=True, kw_only=True)
class UntrainedTask(Task):
    """Base of tasks on models with their first weights, all arms in turn: whatever else runs slows them alike.

    Attributes:
        vocab, dim, layers, heads, parameters: of every decoder; 0 parameters for as many as the
            baseline's has with an ordinary feed-forward width.
        length: trained context, which some strategies depend on.
        only: names of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True
    kind: ClassVar[type[TokenModel]] = Decoder  # what is measured

    vocab: int = 256
    dim: int = 64
    layers: int = 2
    heads: int = 2
    parameters: int = 0
    length: int = 256
    only: tuple[str, ...] = ()

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "all", self.cost(run), self.name.replace("_", " "))]

    def cost(self, run: RunContext) -> float:
        """Of the one unit, in training tokens."""
        raise NotImplementedError

    def measured(self, run: RunContext) -> list[Arm]:
        """Arms that are measured."""
        arms = [arm for arm in run.arms if not {"weights_of", "optimizer"} & set(arm.options)]
        return [arm for arm in arms if not self.only or arm.name in self.only]

    @property
    def config(self) -> DecoderConfig:
        """Of a model, before its feed-forward width is fitted."""
        return DecoderConfig(self.vocab, self.dim, self.layers, self.heads, length=self.length)

    def models(self, run: RunContext) -> dict[str, TokenModel]:
        """A model of every arm, by key."""
        return {arm.key: model_of(self.kind, run, arm, self.config, self.parameters) for arm in self.measured(run)}


def now(run: RunContext) -> float:
    """The time when the device has done its work."""
    run.synchronise()
    return time.perf_counter()
