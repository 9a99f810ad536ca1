# SPDX-License-Identifier: Apache-2.0
"""However a ``use`` ends, nothing of it is left afterwards: neither in the model nor in the libraries."""

import threading

import pytest
import torch

import manyheads
from manyheads.integrations import transformers as port
from oracles import models
from oracles.fingerprint import assert_same, of_model
from oracles.strategies import Mute, Sharpen, Watch

NAMES = ("llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "bert", "t5", "bart", "whisper")
WATCH = Watch()


def run(model, name="llama"):
    return models.forward(name, model)


def leave_normally(model, strategy):
    with manyheads.use(model, strategy):
        run(model, model.name)


def leave_by_exception(model, strategy):
    with pytest.raises(ZeroDivisionError), manyheads.use(model, strategy):
        run(model, model.name)
        raise ZeroDivisionError


def leave_in_the_middle_of_a_forward(model, strategy):
    with pytest.raises((RuntimeError, IndexError)), manyheads.use(model, WATCH, strategy):
        embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        embedding(torch.tensor([10**9]))


def leave_nested(model, strategy):
    for inner_first in (True, False):
        outer, inner = manyheads.use(model, strategy), manyheads.use(model, Watch())
        outer.__enter__()
        inner.__enter__()
        run(model, model.name)
        first, second = (inner, outer) if inner_first else (outer, inner)
        first.__exit__(None, None, None)
        run(model, model.name)
        second.__exit__(None, None, None)


def leave_a_generator(model, strategy):
    def steps():
        with manyheads.use(model, strategy):
            while True:
                yield run(model, model.name)

    abandoned = steps()
    next(abandoned)
    del abandoned


def leave_a_refusal(model, strategy):
    with pytest.raises(manyheads.UserError), manyheads.use(model, strategy, Watch(layers=(99,))):
        pass


def leave_in_a_thread(model, strategy):
    thread = threading.Thread(target=leave_normally, args=(model, strategy))
    thread.start()
    thread.join()


OPENED = (leave_normally, leave_by_exception, leave_in_the_middle_of_a_forward, leave_nested, leave_a_generator,
          leave_in_a_thread)  # fmt: skip
EXITS = (*OPENED, leave_a_refusal)


def is_restored(model, strategy, leave):
    """``leave`` takes ``strategy`` into use and gives it up: afterwards all is as before, to the last bit."""
    model.name = model.config.model_type
    plain, before = run(model, model.name), of_model(model)
    for _ in range(2):
        leave(model, strategy)
        assert_same(of_model(model), before)
        assert torch.equal(run(model, model.name), plain)


@pytest.mark.parametrize("leave", EXITS)
@pytest.mark.parametrize("name", NAMES)
def test_restored(name, leave):
    is_restored(models.build(name), Sharpen(), leave)


@pytest.mark.parametrize("spec", ["full", "snapkv:budget=0.5,window_size=4", "hashevict:budget=0.9,num_recent=2"])
@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_restored_after_generating_with_a_cache(name, spec):
    model = models.build(name)
    plain, before = model.generate(**models.inputs(name), max_new_tokens=3, do_sample=False), of_model(model)
    outputs = []
    for _ in range(2):
        with manyheads.use(model, spec):
            outputs.append(model.generate(**models.inputs(name), max_new_tokens=3, do_sample=False))
        assert_same(of_model(model), before)
    assert torch.equal(*outputs)
    assert torch.equal(model.generate(**models.inputs(name), max_new_tokens=3, do_sample=False), plain)


def test_training_mode_and_grad_flags_are_left_alone():
    model = models.build("llama").train()
    model.lm_head.weight.requires_grad_(True)
    is_restored(model, Mute(), leave_normally)


def test_two_models_with_one_config():
    """While a port is open in one model, another that shares its config object notices nothing."""
    first = models.build("llama")
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert first.config is second.config
    plain, before = run(second), of_model(second)
    with manyheads.use(first, Mute()):
        assert not torch.equal(run(first), plain)
        assert torch.equal(run(second), plain)
        assert_same(of_model(second), before)
    assert_same(of_model(second), before)
    assert torch.equal(run(first), plain)


def test_two_threads_with_two_models():
    """Each thread gets what its own strategy gives alone, while the other is inside."""
    built = [models.build("llama"), models.build("llama")]
    strategies, alone, met = (Mute(), Sharpen()), [], [[], []]
    for model, strategy in zip(built, strategies, strict=True):
        with manyheads.use(model, strategy):
            alone.append(run(model))
    meet = threading.Barrier(2, timeout=60)

    def work(i):
        for _ in range(5):
            with manyheads.use(built[i], strategies[i]):
                meet.wait()
                met[i].append(run(built[i]))
                meet.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(*alone)
    for i in range(2):
        assert len(met[i]) == 5
        assert all(torch.equal(x, alone[i]) for x in met[i])


def test_nested_strategies_act_in_order_and_leave_one_by_one():
    model = models.tiny("llama")
    plain = run(model)
    with manyheads.use(model, Mute()):
        muted = run(model)
        with manyheads.use(model, Sharpen()):
            both = run(model)
        assert torch.equal(run(model), muted)
    with manyheads.use(model, Mute(), Sharpen()):
        assert torch.equal(run(model), both)
    assert len({x.sum().item() for x in (plain, muted, both)}) == 3


def test_one_port_cannot_be_opened_twice():
    opened = manyheads.use(models.build("llama"), WATCH)
    with opened:
        with pytest.raises(RuntimeError, match="open already"):
            opened.__enter__()
        run(opened.model)
    with opened:  # but again once it is closed
        run(opened.model)


@pytest.mark.parametrize("leave", OPENED)
def test_control_a_port_that_does_not_restore(monkeypatch, leave):
    monkeypatch.setattr(port.Port, "_restore", lambda self: None)
    with pytest.raises(AssertionError):
        is_restored(models.build("llama"), Sharpen(), leave)


@pytest.mark.parametrize("leave", OPENED)
def test_control_configs_that_are_not_put_back(monkeypatch, leave):
    switch = port.switch_configs

    def switch_for_good(model, own):
        switch(model, own)
        return lambda: None

    monkeypatch.setattr(port, "switch_configs", switch_for_good)
    with pytest.raises(AssertionError):
        is_restored(models.build("llama"), Sharpen(), leave)


@pytest.mark.parametrize("what", ["hook", "attribute", "buffer", "training", "flag", "config", "registry"])
def test_control_of_the_fingerprint(what, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = models.build("llama")
    before, inner = of_model(model), model.model.layers[1].self_attn
    assert_same(of_model(model), before)
    if what == "hook":
        inner.register_forward_hook(lambda *_: None)
    elif what == "attribute":
        inner.note = 1
    elif what == "buffer":
        inner.register_buffer("note", torch.zeros(1))
    elif what == "training":
        inner.train()
    elif what == "flag":
        inner.q_proj.weight.requires_grad_(True)
    elif what == "config":
        model.config.rms_norm_eps *= 2
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(of_model(model), before)
