# SPDX-License-Identifier: Apache-2.0
"""Classifiers: every stem, padding, what is kept on disk, and what they refuse."""

import dataclasses

import pytest
import torch

from manyheads.errors import UserError
from manyheads.models.classifier import Classifier, ClassifierConfig
from manyheads.models.decoder import Decoder
from tolerance import SAME, assert_close, error, is_far

STEMS = {
    "embedding": ClassifierConfig(256, 16, 2, 2, length=24, classes=3),
    "conv": ClassifierConfig(0, 16, 2, 2, length=24, classes=3, stem="conv", channels=2, stride=4),
    "patches": ClassifierConfig(0, 16, 2, 2, length=24, classes=3, stem="patches", channels=1, stride=3),
}


def drawn(config, batch=2, length=None):
    generator = torch.Generator().manual_seed(batch)
    length = length or config.length * config.stride
    if config.stem == "embedding":
        return torch.randint(256, (batch, length), generator=generator)
    return torch.randn(batch, length, config.channels, generator=generator)


def made(config, spec="softmax"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(spec, config).eval()


@pytest.mark.parametrize("stem", STEMS)
def test_says_one_thing_of_a_sequence(stem):
    config = STEMS[stem]
    model, x = made(config), drawn(config)
    logits, states = model(x)
    assert logits.shape == (2, 3) and states == [None, None]
    assert_close(model(x[:1])[0], logits[:1], SAME)
    assert model.embed(x).shape == (2, 24, 16)
    left = 0 if config.stride == 1 else 1  # of a token that is not whole
    assert model.embed(x[:, : 23 * config.stride + left]).shape == (2, 23 + left, 16)
    order = torch.arange(x.shape[1]).flip(0)
    assert error(model(x[:, order])[0], logits) > 1e-4  # positions are told


@pytest.mark.parametrize("stem", STEMS)
def test_padding_changes_nothing(stem):
    config = STEMS[stem]
    model, x = made(config), drawn(config)
    short = 12 * config.stride
    mask = torch.arange(x.shape[1]) < torch.tensor([[short], [x.shape[1]]])
    wrong = x.clone()
    wrong[0, short:] = 7 if stem == "embedding" else float("nan")
    got = model(wrong, mask=mask)[0]
    assert_close(got[1], model(x)[0][1], SAME)
    alone = model(x[:1, :short])[0][0]
    assert_close(got[0], alone, SAME)
    assert is_far(model(x)[0][0], alone, SAME)  # control: padding read as tokens


@pytest.mark.parametrize("stem", STEMS)
def test_every_parameter_learns_and_is_kept(stem, tmp_path):
    config = STEMS[stem]
    model, x = made(config).train(), drawn(config, 3)
    torch.nn.functional.cross_entropy(model(x)[0], torch.tensor([0, 1, 2])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    model.save(tmp_path)
    other = Classifier.load(tmp_path)
    assert other.config == config and torch.equal(other(x)[0], model.eval()(x)[0])
    held = Classifier.matched("softmax", config, 20_000).parameters_held
    assert abs(held - 20_000) <= 400


def test_what_is_refused():
    config = STEMS["embedding"]
    model, x = made(config), drawn(config)
    with pytest.raises(UserError, match="no cu_seqlens"):
        model(x, cu_seqlens=torch.tensor([0, 24]))
    with pytest.raises(UserError, match="stride is for conv"):
        made(dataclasses.replace(config, stride=2))
    with pytest.raises(UserError, match="it is a layer of a Decoder"):
        made(config, "coca")
    with pytest.raises(UserError, match="it is a layer of an Encoder"):
        Decoder("mra", config)
