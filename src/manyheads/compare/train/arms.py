# SPDX-License-Identifier: Apache-2.0
"""Arms of a comparison by training: a token mixer each, models of one size, and the proof that none sees the future."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import catalog
from ...errors import UserError
from ...models.decoder import Decoder, DecoderConfig
from ...spec import parse, read
from ...strategy import Mixer, Strategy

__all__ = ["BASE", "Arm", "build", "check_causal", "default_strategies", "make_arms", "perturb_zero_params"]

BASE = "softmax"
_WISHED = ("softmax:window=64", "tnl_lightning", "minimax_hybrid:every=4", "blalm_mlstm", "coca")
_LEAK = 1e-5  # of the largest change that the tokens make to their own predictions; without a leak there is none at all


@dataclass(frozen=True)
class Arm:
    """A token mixer; ``key`` names it in rows and is unique in a run."""

    strategy: Strategy

    @property
    def key(self) -> str:
        return self.strategy.spec


def default_strategies() -> tuple[str, ...]:
    """Specs to compare when none are given: those of them whose strategy stands."""
    return BASE, *(spec for spec in _WISHED if catalog.get(read(spec).name).state != "planned")


def make_arms(specs: Iterable[str | Strategy]) -> list[Arm]:
    """Arms of ``specs``, softmax attention first, each once.

    Raises:
        UserError: unknown strategy or field, or a strategy that is no token mixer.
    """
    arms = {arm.key: arm for arm in (Arm(parse(spec)) for spec in (BASE, *specs))}
    for arm in arms.values():
        if not isinstance(arm.strategy, Mixer):
            raise UserError(f"{arm.key} is no token mixer: leave --train away to compare it on a model as it is")
    return list(arms.values())


def build(arm: Arm, config: DecoderConfig, parameters: int, seed: int, device: torch.device) -> Decoder:
    """The arm's decoder with its first weights, brought to so many ``parameters``; the global seed stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Decoder.matched(arm.strategy, config, parameters).to(device)


@torch.no_grad()
def check_causal(model: Decoder, ids: Tensor, name: str) -> None:
    """Change tokens ``ids [B, T]`` from some place on: no prediction before it may change.

    Raises:
        UserError: one does, so that the losses of this mixer would mean nothing.
    """
    training = model.training
    model.eval()
    before, _ = model(ids)
    for cut in {1, ids.shape[1] // 3, ids.shape[1] - 1}:
        other = ids.clone()
        other[:, cut:] = (other[:, cut:] + 1 + torch.arange(ids.shape[1] - cut, device=ids.device) % 7) % (
            model.config.vocab
        )
        change = (model(other)[0] - before).abs()
        if not bool(change[:, :cut].amax() <= _LEAK * change[:, cut:].amax()):
            raise UserError(
                f"{name} is not causal: tokens from position {cut} on change predictions before it, "
                "so its loss would mean nothing; mend its mixer or leave it out"
            )
    model.train(training)


def perturb_zero_params(model: nn.Module) -> None:
    """Give parameters that start at zero a value, so that a path they close cannot hide a leak."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.5)
