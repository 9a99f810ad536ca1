# SPDX-License-Identifier: Apache-2.0
"""Widths at which models are of one size."""

import pytest
import torch
from torch import nn

from manyheads.errors import UserError
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.training.matching import matched_width, parameters_of


def linear(width):
    return nn.Sequential(nn.Linear(10, width), nn.Linear(width, 10))


def quadratic(width):
    return nn.Sequential(nn.Linear(10, width), nn.Linear(width, width), nn.Linear(width, 10))


@pytest.mark.parametrize("build", [linear, quadratic])
def test_no_other_width_is_closer(build):
    for wanted in (2345, 70_000):
        found = matched_width(build, wanted)
        off = {width: abs(parameters_of(build(width)) - wanted) for width in (found - 1, found, found + 1)}
        assert min(off, key=off.get) == found and off[found] < max(off.values())


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(UserError, match="thing cannot be brought to 20 parameters within 2%"):
        matched_width(linear, 20, name="thing")
    with pytest.raises(UserError, match="at any width"):
        matched_width(lambda width: nn.Linear(3, 3), 50)


def test_nothing_is_allocated_and_shared_parameters_count_once():
    devices = []

    def build(width):
        model = linear(width)
        devices.append(model[0].weight.device.type)
        return model

    matched_width(build, 5000)
    assert set(devices) == {"meta"}
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert parameters_of(tied) == 20


@pytest.mark.parametrize("strategy", ["softmax", "blalm_mlstm", "coca"])
def test_decoders_meet_on_one_size(strategy):
    torch.manual_seed(0)
    model = Decoder.matched(strategy, DecoderConfig(64, 32, 2, 2), 60_000)
    assert abs(model.parameters_held - 60_000) <= 100  # half a channel of two layers is 96


def test_of_experts_those_count_that_a_token_meets():
    experts = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10))
    experts.active_share = 0.25
    model = nn.Sequential(nn.Linear(10, 10), experts)
    assert parameters_of(model) == 110 + round(430 / 4)
    experts.active_share = 1.0
    assert parameters_of(model) == 110 + 430
