# SPDX-License-Identifier: Apache-2.0
"""Several threads run one model in one open port: each gets what it would get alone, or is refused in one line."""

import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.integrations import sites, thread_state
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.strategy import AttentionEdit
from oracles import models
from oracles.strategies import Sharpen, Watch

SPECS = ["full", "snapkv:budget=0.5,window_size=8", "fireq:bits=fp8", "streaming_llm:budget=32", "hashevict:budget=24"]
PROMPTS = [models.tokens(1, 30 + 4 * n, seed=n) for n in range(4)]


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs):
    """What each job returns or raises, all of them running at once."""
    results = [None] * len(jobs)

    def run(n):
        try:
            results[n] = jobs[n]()
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def answers(model, run):
    """``run(ids)`` of each prompt, one by one and all at once."""
    jobs = [lambda ids=ids: run(ids) for ids in PROMPTS]
    return [job() for job in jobs], together(*jobs)


def equal(got, want):
    return all(torch.is_tensor(x) and torch.equal(x, y) for x, y in zip(got, want, strict=True))


def slowed():
    """A model whose attention modules lose the processor between their beginning and their attention."""
    model = models.build("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *_: time.sleep(5e-4))
    return model


def generated(model):
    return lambda ids: model.generate(ids, max_new_tokens=8, do_sample=False)


def cached(model):
    """Answers from a cache that each call makes itself."""

    def run(ids):
        cache = new_cache(model, manyheads.parse("snapkv:budget=0.5,window_size=8"))
        prefill(model, ids, cache)
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)

    return run


@pytest.mark.parametrize(
    ("name", "spec"),  # fireq is refused for latent caches
    [(n, s) for n in ("llama", "gemma3_text", "deepseek_v3") for s in SPECS if n != "deepseek_v3" or "fireq" not in s],
)
def test_a_cache_strategy(name, spec):
    model = models.tiny(name)
    with manyheads.use(model, spec, Sharpen()):
        assert equal(*reversed(answers(model, generated(model))))


@pytest.mark.parametrize("spec", SPECS)
def test_caches_that_each_thread_brings(spec):
    """Different strategies, too: the port is open without one, and caches do not mix."""
    model = models.tiny("llama")

    def run(ids):
        cache = new_cache(model, manyheads.parse(spec if ids.shape[1] % 8 else "keydiff:budget=0.5"))
        prefill(model, ids, cache)
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)

    with manyheads.use(model):
        assert equal(*reversed(answers(model, run)))


def test_each_thread_opens_a_port_for_its_caches():
    model = models.tiny("llama")

    def run(ids):
        with manyheads.use(model):
            cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"))
            return model(ids, past_key_values=cache).logits

    with torch.no_grad():
        assert equal(*reversed(answers(model, run)))
    assert "_manyheads" not in vars(model.model.layers[0].self_attn) and model.config._attn_implementation == "sdpa"


def test_control_of_threads(monkeypatch):
    """Were the state of a call kept on the module, answers would differ."""
    shared = thread_state.Running()
    monkeypatch.setattr(thread_state.ThreadState, "begin", lambda self: shared)
    monkeypatch.setattr(thread_state.ThreadState, "now", shared)
    model = slowed()
    with manyheads.use(model):  # no strategy, so that nothing but the answers says so
        one, all_at_once = answers(model, cached(model))
    assert not equal(all_at_once, one)


def test_threads_that_wait_in_the_midst_of_attention():
    model = slowed()
    with manyheads.use(model):
        assert equal(*reversed(answers(model, cached(model))))


@dataclass(frozen=True, kw_only=True)
class Count(AttentionEdit):
    """Keeps something from call to call, though it does not watch."""

    def edit(self, call):
        call.state["calls"] = call.state.get("calls", 0) + 1
        return call


@pytest.mark.filterwarnings("ignore:.*not every run")  # the thread that is refused ends in the midst of one
@pytest.mark.parametrize("strategy", [Watch(), Count()], ids=["watch", "edit"])
def test_what_keeps_findings_is_for_one_thread(strategy):
    """Findings of two sequences would be mixed: the second thread is refused, and may run when the first has ended."""
    model, barrier, refused = models.tiny("llama"), threading.Barrier(2), threading.Event()

    def often():
        barrier.wait()
        try:
            while not refused.is_set():
                model(PROMPTS[0])
        finally:
            refused.set()

    with manyheads.use(model, strategy), torch.no_grad():
        errors = [x for x in together(often, often) if x is not None]
        assert len(errors) == 1 and isinstance(errors[0], UserError)
        assert "was called in two threads" in str(errors[0]) and "\n" not in str(errors[0])
        model(PROMPTS[0])


@dataclass(frozen=True, kw_only=True)
class Meet(AttentionEdit):
    """Keeps something for the first time when two threads are in the midst of their first call."""

    barrier: threading.Barrier

    def edit(self, call):
        if not call.state:
            self.barrier.wait(20)
            call.state["calls"] = 1
        return call


@pytest.mark.filterwarnings("ignore:.*not every run", "ignore:.*runs of")
def test_two_threads_in_their_first_call():
    """Neither keeps anything when it is called: after the call one has the strategy, and goes on in every layer."""
    model, barrier = models.tiny("llama"), threading.Barrier(2)

    def once():
        try:
            model(PROMPTS[0])
        finally:
            barrier.wait(20)  # a thread that has ended could be followed by the other

    with manyheads.use(model, Meet(barrier=barrier, layers=(0,))), torch.no_grad():
        errors = together(once, once)
    assert sorted(isinstance(x, UserError) for x in errors) == [False, True] and None in errors


def test_two_threads_with_a_port_each():
    """Every call of the model goes through every open port: strategies of another thread would act unseen."""
    model, opened, closed = models.tiny("llama"), threading.Event(), threading.Event()

    def hold():
        with manyheads.use(model, Sharpen()), torch.no_grad():
            model(PROMPTS[0])
            opened.set()
            closed.wait(20)

    def other(*strategies):
        opened.wait(20)
        try:
            with manyheads.use(model, *strategies):
                pass
        finally:
            if strategies:
                closed.set()

    def both():
        with pytest.raises(UserError, match="is in use with strategies in another thread"):
            other()
        other(Sharpen())

    results = together(hold, both)
    assert results[0] is None and isinstance(results[1], UserError)
    assert sites._STATE not in vars(model.model.layers[0].self_attn)
