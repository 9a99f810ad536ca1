# SPDX-License-Identifier: Apache-2.0
"""Every strategy that is a ``Mixer``, as a mixer and as a whole model, keeps what the protocol promises."""

import pytest
import torch

from oracles import mixers
from oracles.mixers import CONSTANT, SPECS


@pytest.mark.parametrize("oracle", mixers.ORACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_a_mixer(spec, oracle):
    for layer in (0, 1):
        oracle(mixers.mixer(spec, layer))


@pytest.mark.parametrize("oracle", mixers.ORACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_a_decoder(spec, oracle):
    oracle(mixers.decoder(spec), 1e-8)  # differences at rounding level grow through layers and norms


@pytest.mark.parametrize("spec", CONSTANT)
def test_constant_state(spec):
    mixers.state_is_constant(mixers.mixer(spec))


def test_grouped_heads():
    for oracle in mixers.ORACLES:
        oracle(mixers.mixer("softmax", kv_heads=2))


@pytest.mark.parametrize("how", mixers.WRONG)
@pytest.mark.parametrize("spec", ["softmax", "tnl_lightning"])
def test_control_wrong_mixers_fail(spec, how):
    wrong = mixers.Wrong(mixers.mixer(spec), how)
    for oracle in mixers.WRONG[how]:
        with pytest.raises(AssertionError):
            oracle(wrong)


def test_control_a_growing_state():
    with pytest.raises(AssertionError, match="grows"):
        mixers.state_is_constant(mixers.mixer("softmax"))


@pytest.mark.parametrize("spec", SPECS)
def test_states_detach(spec):
    """Training in pieces: a detached state holds no graph, one that is not does."""
    module = mixers.mixer(spec).requires_grad_(True)
    x = torch.randn(1, 5, mixers.DIM, dtype=torch.float64)
    _, state = module(x[:, :4])
    for _ in range(2):
        module(x[:, 4:], state=state.detach())[0].sum().backward()
    module(x[:, 4:], state=state)[0].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        module(x[:, 4:], state=state)[0].sum().backward()
