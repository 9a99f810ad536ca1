# SPDX-License-Identifier: Apache-2.0
"""PAB: what is run at which step is exactly as the rule says, branches never share, and off is bit-exact."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
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
