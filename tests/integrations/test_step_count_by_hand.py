# SPDX-License-Identifier: Apache-2.0
"""Runs and evaluations, call by call of denoisers that are made up; who acted in a run, entry by entry."""

from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.call import Site  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations.module_calls import unwrapped, wrap_call  # noqa: E402
from manyheads.integrations.run_check import RunCheck  # noqa: E402
from manyheads.integrations.step_count import StepCounter  # noqa: E402
from manyheads.strategy import AttentionWatch, DenoiserPrediction  # noqa: E402

X = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0))


def schedule(*timesteps, **more):
    return SimpleNamespace(timesteps=torch.tensor(timesteps), **more)


class Calls:
    """A counter that is called as denoisers are."""

    def __init__(self, scheduler=None, inside=False):
        self.counter, self.scheduler, self.inside, self.marker = StepCounter(), scheduler, inside, None

    def __call__(self, t, latents, *conditions, key="model"):
        call = self.counter.see(t, [latents, *conditions], key, self.scheduler, self.marker, self.inside)
        return self.counter.run, self.counter.index, call


@pytest.mark.parametrize("inside", [True, False])
def test_parts_of_an_evaluation(inside):
    """Calls for the same latents at the same timestep are one; with other conditions, rows or models."""
    see = Calls(schedule(900.0, 500.0, 100.0), inside)
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert see(900.0, X[0], a) == (1, 0, 0)
    assert see(900.0, X[0].clone(), b) == (1, 0, 1)  # the second such call
    assert see(900.0, X[0], b + 1) == (1, 0, 2)
    assert see(900.0, X[0], a, key="other") == (1, 0, 0)
    assert see(900.0, X[0][:1], a[:1]) == (1, 0, 3)  # the first rows of the latents are theirs
    assert see(500.0, X[0], a) == (1, 1, 0)  # another timestep
    assert see(500.0, X[1], a) == (1, 2, 0)  # other latents: a second evaluation of it
    assert see(500.0, X[1], a) == ((1, 3, 0) if inside else (2, 0, 0))  # the very same call, in a loop: a new pass
    assert see(100.0, torch.zeros(2, 9), a)[1] == (4 if inside else 1)


def test_a_timestep_that_comes_back_begins_a_run_outside_of_a_call():
    for inside, runs in ((False, [1, 1, 1, 2, 2, 2]), (True, [1] * 6)):
        see = Calls(schedule(900.0, 500.0, 100.0), inside)
        assert [see(t, X[i])[0] for i, t in enumerate((900.0, 500.0, 100.0, 900.0, 500.0, 100.0))] == runs
    twice = Calls(schedule(900.0, 500.0, 500.0, 100.0))  # listed twice, it may come twice
    assert [twice(t, X[i])[:2] for i, t in enumerate((900.0, 500.0, 100.0, 500.0, 500.0))] == [
        (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)
    ]  # fmt: skip
    assert twice(900.0, X[5])[:2] == (2, 0)
    nothing = Calls(None)  # without a scheduler a timestep is one of its kind
    assert [nothing(t, X[i])[0] for i, t in enumerate((9.0, 5.0, 5.0, 9.0))] == [1, 1, 1, 2]
    single = Calls(schedule(999.0))
    assert [single(999.0, X[i])[:2] for i in range(3)] == [(1, 0), (2, 0), (3, 0)]
    within = Calls(schedule(999.0), inside=True)
    assert [within(999.0, X[i])[:2] for i in range(3)] == [(1, 0), (1, 1), (1, 2)]


def test_what_begins_a_run_anywhere():
    """The call of the pipeline, timesteps given anew, and a marker of its guider."""
    see = Calls(schedule(900.0, 500.0), inside=True)
    assert see(900.0, X[0])[:2] == (1, 0)
    state = see.counter.run_state
    state["mine"] = 1
    assert see(500.0, X[1])[:2] == (1, 1) and see.counter.run_state is state
    see.counter.begin()
    assert see(500.0, X[1])[:2] == (2, 0) and see.counter.run_state == {} and see.counter.start == 1
    see.scheduler.timesteps = torch.tensor([900.0, 500.0])
    assert see(500.0, X[1])[:2] == (3, 0) and see(500.0, X[2])[:2] == (3, 1)
    see.marker = object()
    assert see(500.0, X[2])[:2] == (4, 0)
    see.counter.forget()
    assert see.counter._latents is None and see.counter._parts == [] and see(500.0, X[2])[:2] == (5, 0)
    see.scheduler.timesteps = torch.tensor([])
    assert see(500.0, X[2])[:2] == (6, 0)  # none are told any more
    see.scheduler.timesteps = "soon"
    assert see(500.0, X[3])[:2] == (6, 1) and see.counter.start == 0


def test_a_scheduler_that_has_stepped_ends_an_evaluation():
    scheduler = schedule(900.0, 500.0, step_index=None)
    see = Calls(scheduler, inside=True)
    a, b = torch.zeros(1), torch.ones(1)
    assert see(900.0, X[0], a)[:2] == (1, 0)
    scheduler.step_index = 0  # it is told at the first step
    assert see(900.0, X[0], b)[:2] == (1, 0)
    scheduler.step_index = 1
    assert see(900.0, X[0], b + 1)[:2] == (1, 0)  # what it was when the evaluation began is not known
    assert see(500.0, X[0], a)[:2] == (1, 1)
    scheduler.step_index = 2
    assert see(500.0, X[0], b)[:2] == (1, 2)  # the same latents and timestep, and a step between


def test_large_conditions_are_not_compared():
    """Residuals of a ControlNet are others for every part of an evaluation, and are not held."""
    see = Calls(schedule(900.0, 500.0))
    small, limit = torch.zeros(1, 3), torch.zeros(32 * X[0].numel())
    assert see(900.0, X[0], small, torch.zeros(33 * X[0].numel()))[:2] == (1, 0)
    assert see(900.0, X[0], small, torch.ones(33 * X[0].numel()))[:2] == (2, 0)  # taken for the very same call
    assert see(900.0, X[0], small + 1, limit)[:2] == (2, 0) and see(900.0, X[0], small + 1, limit + 1)[:2] == (2, 0)
    assert [len(parts) for _, parts in see.counter._parts] == [1, 2, 2]


def test_conditions_are_the_same_by_value_shape_and_dtype():
    for other, again in (
        (torch.zeros(2, 3), True), (torch.zeros(3, 2), False), (torch.zeros(2, 3).double(), False),
        (torch.ones(2, 3), False),
    ):  # fmt: skip
        see = Calls(schedule(900.0, 500.0))
        see(900.0, X[0], torch.zeros(2, 3))
        assert (see(900.0, X[0], other)[0] == 2) == again
    see = Calls(schedule(900.0, 500.0))
    see(900.0, X[0], torch.zeros(2, 3))
    assert see(900.0, X[0])[0] == 1  # fewer conditions
    assert see(900.0, X[0].double(), torch.zeros(2, 3))[0] == 2  # latents in another precision


def test_how_many_evaluations_there_are():
    see = Calls(schedule(900.0, 500.0, 300.0, 100.0), inside=True)
    counter, pipe = see.counter, SimpleNamespace(_num_timesteps=7)
    see(500.0, X[0])
    assert counter.start == 1
    assert counter.total(pipe, see.scheduler, True) == 7 and counter.total(pipe, see.scheduler, False) == 3
    pipe._num_timesteps = 1
    assert counter.total(pipe, see.scheduler, True) == 1
    see(300.0, X[1])
    assert counter.total(pipe, see.scheduler, True) == 3  # more were made than it says
    pipe._num_timesteps = "x"
    assert counter.total(pipe, see.scheduler, True) == counter.total(None, see.scheduler, True) == 3
    for i in range(2, 6):
        see(100.0, X[i])
    assert counter.total(None, see.scheduler, True) == 6
    for none in (None, SimpleNamespace(), schedule(), SimpleNamespace(timesteps=[1])):
        assert counter.total(pipe, none, True) is None


def test_where_a_run_starts_among_timesteps():
    near = Calls(schedule(900.0, 499.9999, 100.0))
    near(500.00001, X[0])  # half precision is met within a ten-thousandth
    assert near.counter.start == 1
    off = Calls(schedule(900.0, 499.0, 100.0))
    off(500.0, X[0])
    assert off.counter.start == 0
    small = Calls(schedule(0.9, 0.50005, 0.1))  # and at least a ten-thousandth of one
    small(0.5, X[0])
    assert small.counter.start == 1
    for begin, start in ((3, 3), (2, 1), (None, 1)):
        twice = Calls(schedule(900.0, 500.0, 300.0, 500.0, begin_index=begin))
        twice(500.0, X[0])
        assert twice.counter.start == start


class Watch(AttentionWatch):
    def watch(self, call, out):
        pass


class Guide(Watch, DenoiserPrediction):
    def denoise(self, call):
        return call.predict()


class Elsewhere(Watch):
    def selects(self, site):
        return site.kind != "cross"


def entry(strategy, last=None, denoiser=1):
    state = SimpleNamespace(site=Site("here", 0, 0, "self", False), last=last)
    return denoiser, state, SimpleNamespace(strategy=strategy, called=False)


def ended(check, name="Pipe", idle=0):
    try:
        check.check(idle, name)
    except UserError as error:
        return str(error)
    return None


def test_who_acted_in_every_run():
    one, other = entry(Watch()), entry(Watch(), denoiser=2)
    check = RunCheck()
    check.expected = [one, other]
    check.see(1, 1, ())
    check.see(1, 2, ())
    one[2].called = other[2].called = True
    check.see(2, 1, ())  # the second denoiser is not called in this run, and need not act
    one[2].called = True
    check.end(())
    assert not one[2].called and ended(check) is None
    check.see(3, 2, ())
    check.end(())
    assert "was open in run 3 of the denoiser and did not act there at here" in ended(check)
    check.see(4, 1, ())
    check.end(())
    assert "in run 3" in ended(check)  # the first that was missed is told


def test_a_run_that_failed_and_a_strategy_that_never_acted():
    one, check = entry(Watch()), RunCheck()
    check.expected = [one]
    assert "its attention was never seen" in ended(check)
    check.see(1, 1, ())
    one[2].called = True
    check.see(2, 1, {1})
    check.end({2})
    assert ended(check) is None  # the second was ended by an error
    check.see(3, 1, {2})
    check.end({2})
    assert "in run 3" in ended(check)
    never, check = entry(Elsewhere(), last=Site("here", 0, 0, "cross", False)), RunCheck()
    check.expected = [never]
    check.see(1, 1, ())
    check.end(())
    assert ended(check) is None  # as its calls showed it, the site is none of its own
    assert ended(RunCheck(), idle=2) is None
    check = RunCheck()
    check.expected = [one]
    one[2].called = True
    said = ended(check, "Pipe", 2)
    assert said.startswith("Pipe was called and did not call the denoiser") and "(2 times)" in said


def test_a_guide_has_to_predict_in_every_denoiser_that_was_called():
    guide = Guide()
    one, two = entry(guide), entry(guide, denoiser=2)
    for predicted, missed in (((1, 2), False), ((1,), True), ((), True)):
        check = RunCheck()
        check.expected = [one, two]
        check.see(5, 1, ())
        check.see(5, 2, ())
        for denoiser in predicted:
            check.predicted(guide, denoiser)
        check.predicted(Guide(), 2)  # another strategy's is not its own
        one[2].called = two[2].called = True
        check.end(())
        assert (ended(check) is not None) == missed
    check = RunCheck()
    check.expected = [entry(Watch())]
    check.see(1, 1, ())
    check.expected[0][2].called = True
    check.end(())
    assert ended(check) is None  # what only watches predicts nothing


def test_functions_around_a_call_leave_in_any_order():
    module, seen = torch.nn.Linear(2, 2), []

    def around(name):
        def call(inner, *args, **kwargs):
            seen.append(name)
            return inner(*args, **kwargs)

        return call

    chain, first = wrap_call(module, around("first"))
    same, second = wrap_call(module, around("second"))
    assert chain is same and type(module) is not torch.nn.Linear and isinstance(module, torch.nn.Linear)
    x = torch.ones(1, 2)
    want = torch.nn.functional.linear(x, module.weight, module.bias)
    assert torch.equal(module(x), want) and seen == ["second", "first"]  # the last is outermost
    first()
    seen.clear()
    assert torch.equal(module(input=x), want) and seen == ["second"] and type(module) is not torch.nn.Linear
    second()
    assert type(module) is torch.nn.Linear and torch.equal(module(x), want) and seen == ["second"]
    assert not any("manyheads" in name for name in vars(module))
    assert unwrapped(module) is module
    compiled = torch.nn.Module()
    compiled._orig_mod = module
    assert unwrapped(compiled) is module
