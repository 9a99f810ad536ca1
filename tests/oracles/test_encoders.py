# SPDX-License-Identifier: Apache-2.0
"""Every mixer that sees both sides, as a mixer and as a whole model, keeps what the protocol promises."""

import pytest
import torch

from manyheads.errors import UserError
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.models.encoder import Encoder
from oracles import encoders, mixers
from oracles.encoders import SPECS
from tolerance import error

CONFIG = DecoderConfig(29, dim=32, layers=2, heads=4, length=64)
IDS = torch.randint(29, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("oracle", encoders.ORACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_a_mixer(spec, oracle):
    for kv_heads in (mixers.HEADS, 2):
        oracle(encoders.mixer(spec, kv_heads=kv_heads), 1e-6 if "t5" in spec else 1e-10)


@pytest.mark.parametrize("oracle", encoders.ORACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SPECS)
def test_an_encoder(spec, oracle):
    oracle(encoders.encoder(spec), 1e-8)  # differences at rounding level grow through layers and norms


@pytest.mark.parametrize("spec", SPECS)
def test_gradients(spec):
    encoders.gradients_are_right(spec)


@pytest.mark.parametrize("how", encoders.WRONG)
@pytest.mark.parametrize("spec", ["softmax", "longt5_tglobal:radius=6,block=4"])
def test_control_wrong_mixers_fail(spec, how):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        encoders.WRONG[how](encoders.Wrong(encoders.mixer(spec), how))


@pytest.mark.parametrize("spec", ["softmax", "longt5_tglobal:radius=6,block=4"])
def test_control_a_causal_mixer_is_found(spec):
    with pytest.raises(AssertionError, match="token 21"):
        encoders.sees_both_sides(encoders.Blind(encoders.mixer(spec)))


@pytest.mark.parametrize("spec", SPECS)
def test_saved_loaded_and_matched(spec, tmp_path):
    model = Encoder(spec, CONFIG).eval()
    model.save(tmp_path)
    other = Encoder.load(tmp_path)
    assert isinstance(other, Encoder) and torch.equal(other(IDS)[0], model(IDS)[0])
    assert error(Encoder(spec, CONFIG).eval()(IDS)[0], model(IDS)[0]) > 1e-2  # control: other weights
    held = Encoder.matched(spec, CONFIG, 200_000).parameters_held
    assert abs(held - 200_000) <= 0.02 * 200_000


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_learns(spec):
    model = encoders.encoder(spec).requires_grad_(True).train()
    (model(IDS)[0].square().mean() + model.auxiliary_loss()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_direction_is_checked():
    with pytest.raises(UserError, match="longt5_tglobal is bidirectional: it is a layer of an Encoder"):
        Decoder("longt5_tglobal", CONFIG)
    with pytest.raises(UserError, match="coca is causal: it is a layer of a Decoder"):
        Encoder("coca", CONFIG)
    with pytest.raises(UserError, match="ALiBi"):
        Encoder("softmax:position=alibi", CONFIG)
    assert not hasattr(Encoder, "generate")
