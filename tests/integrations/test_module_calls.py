# SPDX-License-Identifier: Apache-2.0
"""What is around a module's calls lasts while others replace its ``forward``: offloading, hooks, compilation."""

import copy
import functools

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations import diffusers as port_  # noqa: E402
from manyheads.integrations.module_calls import CallChain, unwrapped, wrap_call  # noqa: E402
from oracles import diffusion as tiny  # noqa: E402
from oracles.pipelines import dit, run_dit, run_sd, sd  # noqa: E402
from tolerance import error  # noqa: E402

SPECS = ("sag:scale=0.75", "headhunter:heads=0.0,strength=1", "pab:spatial=2,cross=2,upper=1000,lower=-1",
         "masactrl:start_step=1,start_layer=0")  # fmt: skip


def pictures(spec, before=None, between=None, count=2):
    """Pictures made one after the other in one port, and one made when it is closed."""
    pipe, made = sd(), []
    if before is not None:
        before(pipe)
    with manyheads.use(pipe, spec):
        for number in range(count):
            if number and between is not None:
                between(pipe)
            made.append(run_sd(pipe))
    kind = type(unwrapped(pipe.unet))
    assert kind is diffusers.UNet2DConditionModel and not any(
        name.startswith("_manyheads") for module in pipe.unet.modules() for name in vars(module)
    )
    return made, run_sd(pipe)


def offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def in_groups(pipe):
    device = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")


def on_demand(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
    pipe.__class__ = type("Placed", (type(pipe),), {"_execution_device": torch.device("cpu")})


def hooks_off(pipe):
    pipe.remove_all_hooks()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.split(":")[0])
@pytest.mark.parametrize(
    ("before", "between"),
    [(offloaded, None), (None, offloaded), (offloaded, hooks_off), (in_groups, None), (on_demand, None)],
    ids=["offloaded", "offloaded inside", "hooks taken off inside", "groups", "on demand"],
)
def test_every_picture_is_acted_on(spec, before, between):
    (want, _), plain = pictures(spec)
    made, after = pictures(spec, before, between)
    assert error(want, plain) > 1e-6 and all(torch.equal(picture, want) for picture in made)
    assert torch.equal(after, plain)


def around_forward(module, around):
    """What loses: the function is put in the place of ``forward``."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = functools.partial(around, module.forward)

    def restore():
        module.__dict__.pop("forward", None)
        if own is not None:
            module.__dict__["forward"] = own

    return CallChain(), restore


@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.split(":")[0])
def test_a_function_in_the_place_of_forward_is_lost_and_that_raises(spec, monkeypatch):
    (want, _), _ = pictures(spec)
    monkeypatch.setattr(port_, "wrap_call", around_forward)
    pipe, made = sd(), []
    offloaded(pipe)
    with pytest.raises(UserError, match="was called and did not call the denoiser"), manyheads.use(pipe, spec):
        made += [run_sd(pipe), run_sd(pipe)]
    assert torch.equal(made[0], want) and error(made[1], want) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["module", "call"])
def test_compiled_before(way):
    """Compiled and run before the port opens; the port's code is compiled in, and out again when it closes."""
    torch._dynamo.reset()
    plain = run_dit(dit(), steps=2)
    with manyheads.use(pipe := dit(), SPECS[1]):
        want = run_dit(pipe, steps=2)
    if way == "module":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    before = run_dit(pipe, steps=2)
    with manyheads.use(pipe, SPECS[1]):
        made = run_dit(pipe, steps=2)
    after = run_dit(pipe, steps=2)
    torch._dynamo.reset()
    assert error(want, plain) > 1e-3 and error(made, want) < 1e-5
    assert error(before, plain) < 1e-5 and error(after, plain) < 1e-5


def test_another_denoiser_in_its_place():
    pipe = sd()
    with pytest.raises(UserError, match=r"did not call the denoiser it had .* \(1 times\)"):  # noqa: SIM117
        with manyheads.use(pipe, SPECS[2]):
            run_sd(pipe)
            pipe.unet = tiny.build("unet")
            run_sd(pipe)


def test_functions_nest_and_leave_in_any_order():
    module, said = torch.nn.Identity(), []

    def saying(word):
        def around(inner, x):
            said.append(word)
            return inner(x) + 1

        return around

    x, kind = torch.zeros(1, 2), type(module)
    plain = module(x)
    undo = [wrap_call(module, saying(word))[1] for word in "abc"]
    assert torch.equal(module(x), plain + 3) and said == ["c", "b", "a"]
    undo[1]()
    module.forward = lambda x: x  # another library's
    assert torch.equal(module(x), x + 2) and said[3:] == ["c", "a"]
    with pytest.raises(UserError, match="cannot be copied while its port is open"):
        copy.deepcopy(module)
    undo[0]()
    assert isinstance(module, kind) and type(module) is not kind
    undo[2]()
    assert type(module) is kind and torch.equal(module(x), x) and len(said) == 5


def test_a_class_put_on_top_meanwhile_stays():
    module = torch.nn.Linear(2, 2)
    plain = module(torch.ones(1, 2))
    _, undo = wrap_call(module, lambda inner, x: inner(x) + 1)
    module.__class__ = type("Sharded", (type(module),), {})
    undo()
    assert type(module).__name__ == "Sharded" and torch.equal(module(torch.ones(1, 2)), plain)
