# SPDX-License-Identifier: Apache-2.0
"""A mixer that sees the future is refused before any training, and none that is honest."""

from dataclasses import dataclass

import pytest
import torch

from manyheads.comparison_train import mixers
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.strategy import Mixer
from manyheads.tasks.training._decoders import check_causal, perturb_zero_params
from manyheads.tasks.training.byte_lm import ByteLM

from .conftest import SOFTMAX, TEXT, values


class Cheat(torch.nn.Module):
    """A mean over the past, and one over everything, the future included, behind a gate that may start shut."""

    def __init__(self, config, gate):
        super().__init__()
        self.out_proj = torch.nn.Linear(config.dim, config.dim, bias=False)
        self.gate = torch.nn.Parameter(torch.full((config.dim,), gate))

    def forward(self, x, *, mask=None, state=None, cu_seqlens=None):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.out_proj(past + self.gate * x.mean(1, keepdim=True)), state


@dataclass(frozen=True, kw_only=True)
class Peeks(Mixer):
    gate: float = 0.1

    def build(self, config):
        return Cheat(config, self.gate)


@dataclass(frozen=True, kw_only=True)
class Honest(Mixer):
    def build(self, config):
        mixer = Cheat(config, 0.0)
        mixer.register_buffer("gate", mixer._parameters.pop("gate").detach())
        return mixer


@pytest.mark.parametrize("gate", [0.1, 0.0])
def test_a_mixer_that_sees_the_future_is_refused(measured, tmp_path, gate):
    own = {"mine": Peeks(gate=gate)}
    with pytest.raises(UserError, match="mine is not causal"):
        measured(ByteLM(**TEXT), arms=(SOFTMAX, Arm("mine")), data={"strategies": own})
    assert not (tmp_path / "run" / "models").exists()


def test_an_honest_mixer_of_ones_own_is_trained(measured):
    results = measured(ByteLM(**TEXT), arms=(SOFTMAX, Arm("mine")), data={"strategies": {"mine": Honest()}})
    assert len(values(results, "token_nll", "mine")) == 4


def test_no_mixer_of_ours_sees_the_future():
    ids = torch.randint(0, 256, (2, 64))
    for spec, strategy in mixers().items():
        config = DecoderConfig(256, dim=32, layers=4, heads=2, length=64)
        model = Decoder.matched(strategy, config, 120_000).eval()
        perturb_zero_params(model)
        check_causal(model, ids, spec)


class Tips(torch.nn.Module):
    """In float32 alone, or always, what stands behind changes what stands before."""

    def __init__(self, inner, always):
        super().__init__()
        self.inner, self.always = inner, always

    def forward(self, x, **given):
        y, state = self.inner(x, **given)
        return (y + 1e-2 * y.mean(1, keepdim=True) if self.always or y.dtype == torch.float32 else y), state


def test_a_choice_that_tips_by_rounding_is_no_leak():
    model = Decoder("softmax", DecoderConfig(256, dim=16, layers=1, heads=2, length=16))
    mixer, ids = model.blocks[0].mixer, torch.randint(0, 256, (2, 16))
    model.blocks[0].mixer = Tips(mixer, always=False)
    check_causal(model, ids, "tips")
    model.blocks[0].mixer = Tips(mixer, always=True)
    with pytest.raises(UserError, match="not causal"):
        check_causal(model, ids, "leaks")
