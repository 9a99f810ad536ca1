# SPDX-License-Identifier: Apache-2.0
"""The mixer that a cost model chooses."""

import dataclasses

import pytest
import torch

from manyheads.call import MixerConfig
from manyheads.costs import Layer, Setting, card, family, ranked
from manyheads.errors import UserError
from manyheads.mixers.efficient_attention_survey import EfficientAttentionSurvey
from manyheads.mixers.softmax import Softmax
from manyheads.mixers.tnl_lightning import TNLMixer
from manyheads.spec import parse

CONFIG = MixerConfig(dim=32, num_heads=2, num_kv_heads=2, head_dim=16, layer=1, num_layers=2, length=64)


def test_short_texts_get_softmax_and_long_ones_a_state():
    short = EfficientAttentionSurvey(card="h100").chosen(CONFIG)
    long = EfficientAttentionSurvey(card="h100", tokens=1 << 20).chosen(CONFIG)
    assert short is family("full") and long.group == "linear"
    assert EfficientAttentionSurvey(card="h100").chosen(dataclasses.replace(CONFIG, length=1 << 20)) is long


def test_it_is_the_first_of_the_ranking_that_has_a_mixer():
    for what in ("train", "prefill", "decode"):
        chosen = EfficientAttentionSurvey(what=what, tokens=4096).chosen(CONFIG)
        layer = Layer(length=4096, heads=2, kv_heads=2, head_dim=16, itemsize=4)
        names = [one.entry.name for one in ranked(Setting(layer=layer, card=card("cpu", 4), what=what))]
        mixers = [name for name in names if family(name).category == "mixers" and name != "block_sparse"]
        assert chosen.name == mixers[0] != mixers[-1]


def test_it_builds_what_it_chooses():
    x = torch.randn(2, 10, 32)
    outs = []
    for made in (EfficientAttentionSurvey(), Softmax(), parse("tnl_lightning")):
        torch.manual_seed(0)
        outs.append(made.build(CONFIG)(x)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    long = EfficientAttentionSurvey(tokens=1 << 20, what="decode").build(dataclasses.replace(CONFIG, num_heads=4))
    assert type(long).__module__ != "manyheads.mixers.softmax" and not isinstance(long, Softmax | type(TNLMixer))


def test_encoders_get_what_sees_both_sides():
    for tokens in (0, 1 << 20):
        config = dataclasses.replace(CONFIG, causal=False)
        chosen = EfficientAttentionSurvey(tokens=tokens).chosen(config)
        assert "bidirectional" in type(parse(chosen.spec)).directions
        EfficientAttentionSurvey(tokens=tokens).build(config)


def test_mistakes():
    for wrong, said in (({"what": "sleep"}, "train, prefill"), ({"tokens": -1}, "length")):
        with pytest.raises(UserError, match=said):
            EfficientAttentionSurvey(**wrong)
    with pytest.raises(UserError, match="no card"):
        EfficientAttentionSurvey(card="h99").build(CONFIG)
