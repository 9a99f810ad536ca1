# SPDX-License-Identifier: Apache-2.0
"""PAB: what is run at which step is exactly as the rule says, branches never share, and off is bit-exact."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import DiffusionStep, Site
from manyheads.diffusion.pab import PAB
from manyheads.errors import UserError
from manyheads.strategy import AttentionWatch, DenoiserModule
from oracles import pipelines
from tolerance import error

STEPS = 10


class Count(AttentionWatch):
    """Steps at which attention was really computed, by site and branch."""

    def watch(self, call, out):
        call.state.setdefault("steps", []).append((call.diffusion.run, call.diffusion.index))


def run(name, *specs, times=1):
    make, go = pipelines.RUNS[name]
    pipe = make()
    count = Count()
    with manyheads.use(pipe, *specs, count) as port:
        made = [go(pipe, steps=STEPS) for _ in range(times)]
    return made, port, count, pipe


def wanted(pipe, every, upper, lower):
    """Steps at which a module is run: outside of the range, at multiples of n, and where nothing is kept."""
    steps, kept = [], False
    for index, timestep in enumerate(pipe.scheduler.timesteps.tolist()):
        inside = lower < timestep < upper
        if not (inside and kept and index % every):
            steps.append(index)
            kept = inside
    return steps


@pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
def test_off_is_off_and_the_rule_is_kept(name):
    plain = run(name)[0][0]
    for off in ("pab:spatial=1,temporal=1,cross=1", "pab:upper=2,lower=1"):
        assert torch.equal(run(name, off)[0][0], plain)
    spec = PAB(spatial=2, temporal=4, cross=3, upper=930, lower=150)
    made, port, count, pipe = run(name, spec, times=2)
    assert torch.equal(made[0], made[1]) and error(made[0], plain) > 1e-6
    seen = port.state(count)
    for site, kept in seen.items():
        every = 3 if "attn2" in site else 2
        for branch in kept.values():
            steps = wanted(pipe, every, 930, 150)
            assert branch["steps"] == [(1, s) for s in steps] + [(2, s) for s in steps]
            assert len(steps) < STEPS
    for site, kept in port.state(spec).items():
        for branch, state in kept.items():
            counts = state["counts"]
            assert counts["computed"] == len(seen[site][branch]["steps"])
            assert counts["computed"] + counts["reused"] == 2 * STEPS and counts["bytes"] > 0
            assert "kept" not in state  # given up at the end of the range


def test_reuse_is_exact_where_nothing_changes_and_branches_keep_apart():
    """With conditional and unconditional text exchanged, a shared cache would give one the other's output."""
    made = {}

    class Outputs(DenoiserModule):
        def around_module(self, site, step, state, compute):
            out = compute()
            made.setdefault((site.name, step.branches, step.index), out)
            return out

    pipe = pipelines.wan()
    with manyheads.use(pipe, "pab:upper=990,lower=10", Outputs()):
        pipelines.run_wan(pipe, steps=6)
    same = differing = 0
    for (site, branches, index), out in made.items():
        before = made.get((site, branches, index - 1))
        other = made.get((site, ("uncond",) if branches == ("cond",) else ("cond",), index))
        assert other is None or other.data_ptr() != out.data_ptr() or out.numel() == 0
        if before is not None:
            same += before is out
            differing += before is not out
    assert same and differing  # what is reused is the very tensor that was kept


@pytest.mark.parametrize("batched", [True, False])
def test_two_runs_of_other_sizes_do_not_mix(batched):
    pipe = pipelines.pixart() if batched else pipelines.wan()
    go = pipelines.run_pixart if batched else pipelines.run_wan
    with manyheads.use(pipe, "pab"):
        first = go(pipe, steps=6)
        go(pipe, steps=9)
        assert torch.equal(go(pipe, steps=6), first)


def test_refusals():
    with pytest.raises(UserError, match="at least 1"):
        manyheads.parse("pab:spatial=0")
    with pytest.raises(UserError, match="is empty"):
        manyheads.parse("pab:upper=10,lower=20")
    from oracles import diffusion as tiny

    with pytest.raises(UserError, match="open the pipeline"), manyheads.use(tiny.tiny("dit"), "pab"):
        tiny.forward("dit", tiny.tiny("dit"))


def test_diffusers_own_shares_between_branches():
    """The defect that is avoided here, while diffusers has it: its cache gives one branch the other's output."""
    from diffusers import PyramidAttentionBroadcastConfig

    pipe = pipelines.wan()
    plain = pipelines.run_wan(pipe, guidance=1.0, steps=6)
    guided = pipelines.run_wan(pipe, guidance=4.0, steps=6)
    assert error(guided, plain) > 1e-4
    current = {"t": 500}
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 900),
            cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=lambda: current["t"],
        )
    )  # fmt: skip
    text = torch.randn(2, 1, 6, 12, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    outs = {}
    with torch.no_grad():
        for step in range(3):
            for branch in (0, 1):
                with pipe.transformer.cache_context(("cond", "uncond")[branch]):
                    given = {"timestep": torch.tensor([500 - step]), "encoder_hidden_states": text[branch]}
                    outs[step, branch] = pipe.transformer(hidden_states=latents, **given, return_dict=False)[0]
    pipe.transformer.disable_cache()
    with torch.no_grad():
        alone = pipe.transformer(
            hidden_states=latents, timestep=torch.tensor([498]), encoder_hidden_states=text[1], return_dict=False
        )[0]
    if error(outs[2, 1], alone) < 1e-5:
        pytest.skip("this diffusers keeps branches apart")
    assert error(outs[2, 1], alone) > 1e-4


def stood(kind, index, timestep, run=1, branches=("all",)):
    axis = "time" if kind == "temporal" else "all"
    site = Site("x", 0, 0, "cross" if kind == "cross" else "self", False)
    return site, DiffusionStep(run, index, 12, float(timestep), branches, None, axis)


@pytest.mark.parametrize("kind", ["spatial", "temporal", "cross"])
def test_which_steps_are_computed_is_the_rule_by_hand(kind):
    """Inside of the range, both ends left out, at multiples of n; outside always; and anew where nothing is kept."""
    strategy = PAB(**{"spatial": 1, "temporal": 1, "cross": 1, kind: 3}, upper=900, lower=100)
    state, outputs = {}, {}
    times = [950, 900, 899, 800, 700, 600, 500, 400, 300, 101, 100, 50]
    for index, timestep in enumerate(times):
        # A pair, as joint attention returns; its first is what is counted.
        made = strategy.around_module(
            *stood(kind, index, timestep), state, lambda i=index: (torch.full((2, 3), float(i)), torch.zeros(99))
        )
        outputs[index] = int(made[0][0, 0])
    # 2 is computed because nothing is kept, then 3, 6, 9 are multiples; 10 and 11 lie outside.
    assert outputs == {0: 0, 1: 1, 2: 2, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6, 8: 6, 9: 9, 10: 10, 11: 11}
    assert state["counts"] == {"computed": 8, "reused": 4, "bytes": 24} and "kept" not in state
    other = {"spatial": "cross", "temporal": "spatial", "cross": "temporal"}[kind]
    always = {}
    for index, timestep in enumerate(times):
        strategy.around_module(*stood(other, index, timestep), always, lambda: torch.zeros(2))
        assert "kept" not in always  # of a kind that is always run nothing is kept
    assert always["counts"] == {"computed": 12, "reused": 0, "bytes": 0}


def test_what_is_kept_is_of_one_run_and_its_largest_output_is_counted():
    strategy, state = PAB(spatial=4, upper=900, lower=100), {}

    def step(index, run, size):
        return strategy.around_module(*stood("spatial", index, 500, run), state, lambda: torch.zeros(size))

    step(1, 1, 8), step(2, 1, 5)
    assert state["counts"] == {"computed": 1, "reused": 1, "bytes": 32}
    assert step(3, 2, 2).shape == (2,) and state["counts"]["computed"] == 2 and state["kept"][0] == 2
    assert step(5, 2, 99).shape == (2,) and state["counts"]["bytes"] == 32
    step(8, 2, 16)
    assert state["counts"] == {"computed": 3, "reused": 2, "bytes": 64}


def test_defaults_are_the_papers():
    assert PAB() == PAB(spatial=2, temporal=4, cross=6, upper=930.0, lower=450.0)
    for wrong in ({"spatial": 0}, {"temporal": 0}, {"cross": -1}, {"upper": 450}, {"upper": 5.0, "lower": 5.0}):
        with pytest.raises(UserError, match="pab:"):
            PAB(**wrong)
    assert PAB(spatial=1, temporal=1, cross=1, upper=451).upper == 451
