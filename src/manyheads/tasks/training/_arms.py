# SPDX-License-Identifier: Apache-2.0
"""Decoders of arms."""

import torch

from ...experiment import Arm, RunContext, seeding
from ...models.decoder import Decoder, DecoderConfig
from ...strategy import Strategy

__all__ = ["decoder_of", "mixer_of"]


def mixer_of(run: RunContext, arm: Arm) -> Strategy:
    """The arm's mixer: of its spec, or the caller's own, which the run's ``data["strategies"]`` holds by key."""
    own: Strategy | None = run.data.get("strategies", {}).get(arm.key)
    return arm.strategy if own is None else own


def decoder_of(run: RunContext, arm: Arm, config: DecoderConfig, parameters: int, seed: int = 0) -> Decoder:
    """The arm's decoder with its first weights, on the run's device; no global generator is moved on.

    Args:
        run: of the task.
        arm: whose mixer it has.
        config: of the decoder.
        parameters: that it is brought to; 0 for those of the baseline's as ``config`` has it.
        seed: of the first weights.
    """

    def of_baseline() -> int:
        with torch.device("meta"):
            return Decoder(mixer_of(run, run.baseline), config).parameters_held

    parameters = parameters or run.kept(("parameters", config), of_baseline)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.number(run.seed, weights=seed))
        return Decoder.matched(mixer_of(run, arm), config, parameters).to(run.device)
