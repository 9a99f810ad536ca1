# SPDX-License-Identifier: Apache-2.0
"""A strategy that did not act at every site in every run says so when its port closes: once is not always."""

import re
import warnings

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

import manyheads
from manyheads import UserError
from manyheads.integrations import transformers as port
from oracles import models
from oracles.strategies import NoEdit, Sharpen, Watch

IDS = models.tokens(1, 12)


def said(model, run, *strategies):
    """What a port says that is open around ``run``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with manyheads.use(model, *strategies), torch.no_grad():
            run()
    return [str(warning.message) for warning in caught if "manyheads" not in str(warning.category)]


def switched(model):
    def run():
        model(IDS)
        model.set_attn_implementation("sdpa")
        model(IDS)

    return run


def partly_cached(model):
    def run():
        model.generate(IDS, max_new_tokens=3)
        model(IDS, use_cache=False)

    return run


def cut(model):
    def run():
        model(IDS)
        whole, model.model.layers = model.model.layers, model.model.layers[:1]
        model(IDS)
        model.model.layers = whole

    return run


def ordinary(model):
    def run():
        model(IDS)
        model(**models.inputs("llama"))
        model.generate(IDS, max_new_tokens=3)

    return run


@pytest.mark.parametrize(
    ("run", "strategies", "sentence"),
    [
        (
            switched,
            (Sharpen(),),
            "acted in 1 of 2 runs of model.layers.0.self_attn.*attn_implementation was set inside",
        ),
        (switched, ("full",), "full acted in 1 of 2 runs"),
        (partly_cached, ("keydiff:budget=6",), "keydiff:budget=6 kept the cache in 3 of 4 runs .*ran without a cache"),
        (cut, (NoEdit(),), "acted 1 times at model.layers.1.self_attn and 2 times at model.layers.0.*not every run"),
        (ordinary, ("keydiff:budget=6", Watch()), None),
        (ordinary, (), None),
        (switched, (), None),
    ],
)
def test_a_run_without_the_strategy(run, strategies, sentence):
    model = models.build("llama")
    sentences = said(model, run(model), *strategies)
    assert len(sentences) == len(strategies) * (sentence is not None)
    if sentence is not None:
        assert re.search(sentence, sentences[0]) and "\n" not in sentences[0]


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_parts_that_run_unequally_often_are_no_fault(name):
    """An encoder runs once, its decoder for every token."""
    model = models.tiny(name)
    assert not said(model, lambda: model.generate(**models.inputs(name), max_new_tokens=3), NoEdit(), "full")


def test_a_part_that_the_model_does_not_need():
    """Text only into a vision-language model: the strategy acts on the text, and the port says what did not run."""
    config = Qwen2VLForConditionalGeneration.config_class(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    for strategy in (Sharpen(), Watch()):
        (sentence,) = said(model, lambda: model(IDS), strategy)
        assert sentence.startswith("strategies acted at 2 of 4 attention modules; the model did not run model.visual")
    with pytest.raises(UserError, match="was never called"), manyheads.use(model, Sharpen()):
        model.model.language_model(IDS)


def test_a_layer_that_never_runs_is_an_error():
    model = models.build("llama")
    never = r"selected model.layers.1.self_attn, and it was never called"
    with pytest.raises(UserError, match=never), manyheads.use(model, NoEdit()), torch.no_grad():
        whole, model.model.layers = model.model.layers, model.model.layers[:1]
        model(IDS)
        model.model.layers = whole


def test_control_of_every_run(monkeypatch):
    """Were a site only asked whether it was ever called, none of this would be noticed."""
    monkeypatch.setattr(port, "missed", lambda done: [])
    model = models.build("llama")
    assert not said(model, switched(model), Sharpen())
