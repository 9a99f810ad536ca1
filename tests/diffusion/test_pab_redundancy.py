# SPDX-License-Identifier: Apache-2.0
"""Redundancy: the changes are those of the modules' outputs, worked out by hand; what it suggests follows its rule."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import DiffusionStep, Site
from manyheads.diffusion.pab import PAB
from manyheads.diffusion.pab.redundancy import Curve, Redundancy, plot, suggest
from manyheads.errors import UserError
from manyheads.models.scenes import build
from oracles import pipelines
from tolerance import CLOSE, assert_close, is_far, nearly

STEPS = 6
CAPTIONS = torch.tensor([[1, 13, 17], [2, 14, 18]])


def video_pipeline():
    torch.manual_seed(0)
    pipe = build("moving", num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe):
    noise = pipe.noise(2, torch.Generator().manual_seed(1))
    return pipe(CAPTIONS, num_inference_steps=STEPS, latents=noise, output_type="pt").frames


def kind_of(name):
    if name.startswith("temporal"):
        return "temporal"
    return "cross" if name.endswith("attn2") else "spatial"


def by_hand(outputs, apart=1):
    """Changes by kind and step of ``outputs``, by module name a list of one tensor for each step."""
    found = {}
    for name, steps in outputs.items():
        pairs = zip(steps[apart:], steps[:-apart], strict=True)
        rows = [float(((b - a) ** 2).sum() / (b**2).sum()) for b, a in pairs]
        found.setdefault(kind_of(name), []).append(rows)
    return {kind: torch.tensor(rows).mean(0) for kind, rows in found.items()}


def test_changes_are_those_of_the_outputs():
    pipe, outputs, measure = video_pipeline(), {}, Redundancy()
    plain = run(pipe)
    with manyheads.use(pipe, measure) as port:
        assert torch.equal(run(pipe), plain)
    handles = [
        module.register_forward_hook(lambda *a, n=name: outputs.setdefault(n, []).append(a[2].double()))
        for name, module in pipe.transformer.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    run(pipe)
    for handle in handles:
        handle.remove()
    curves = measure.curves(port)
    assert [curve.kind for curve in curves] == ["spatial", "temporal", "cross"]
    want, other = by_hand(outputs), by_hand(outputs, apart=2)
    for curve in curves:
        seen = torch.tensor(curve.relative)
        assert curve.modules == 2 and len(seen) == STEPS - 1
        assert_close(seen, want[curve.kind], CLOSE)
        assert is_far(seen[1:], other[curve.kind])  # of two steps, the figures are others
        assert curve.timesteps == tuple(pipe.scheduler.timesteps[1:].tolist())
        assert min(curve.absolute) > 0
    assert all("kept" not in state for _, kept in port.kept(measure) for state in kept.values())


def test_branches_are_compared_with_themselves():
    """A model that does not hear of the step and sees the same latents changes nothing, whatever the text."""
    pipe, measure = pipelines.wan(), Redundancy()
    pipe.scheduler.step = lambda out, t, x, **_: (x,)
    time = pipe.transformer.condition_embedder.time_embedder
    for layer in (time.linear_1, time.linear_2):
        torch.nn.init.zeros_(layer.weight)
    seen = []
    handle = pipe.transformer.blocks[0].attn2.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    with manyheads.use(pipe, measure) as port:
        pipelines.run_wan(pipe, steps=4)
    handle.remove()
    assert all(max(curve.absolute) == 0 for curve in measure.curves(port))
    assert not torch.equal(seen[0], seen[1])  # calls that follow each other are of two branches, and differ


def test_every_run_counts_and_only_steps_of_one_run_are_compared():
    pipe, measure = video_pipeline(), Redundancy()
    with manyheads.use(pipe, measure) as port:
        run(pipe)
        once = measure.curves(port)
        run(pipe)
    for first, both in zip(once, measure.curves(port), strict=True):
        assert_close(torch.tensor(first.relative), torch.tensor(both.relative), CLOSE)


def curve(kind, *relative):
    times = tuple(900.0 - 100 * i for i in range(len(relative)))
    return Curve(kind, 1, times, relative, relative)


def test_suggestion_follows_its_rule(tmp_path):
    curves = [
        curve("spatial", 0.9, 0.01, 0.01, 0.01, 0.01, 0.01, 0.8),
        curve("cross", 0.9, 0.0025, 0.0025, 0.0025, 0.0025, 0.0025, 0.0001),
    ]
    spec = suggest(curves, drift=0.25)  # steps of 0.1 and 0.05: two of the first fit, five of the second
    assert spec == "pab:upper=850,lower=350,spatial=3,cross=6"
    assert manyheads.parse(spec).spatial == 3
    assert suggest(curves, drift=0.01) == "pab:upper=850,lower=350,spatial=1,cross=1"
    even = [curve("temporal", *[0.01] * 5)]  # a step of 0.1
    for drift, most in ((0.35, 4), (0.65, 7), (0.75, 8), (0.85, 8), (0.95, 8), (9.0, 8)):
        assert suggest(even, drift=drift).endswith(f"temporal={most}")  # never more than LONGEST
    assert suggest([curve("temporal", *[0.0] * 5)]) == "pab:upper=950,lower=250,temporal=8"
    with pytest.raises(UserError, match="no range"):
        suggest([curve("spatial", 0.1, 9.0, 0.1, 9.0, 0.1)])
    plot(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_refusals():
    from oracles import diffusion as tiny

    with pytest.raises(UserError, match="open the pipeline"), manyheads.use(tiny.tiny("dit"), "pab.redundancy"):
        tiny.forward("dit", tiny.tiny("dit"))
    pipe, measure = video_pipeline(), Redundancy()
    with manyheads.use(pipe, measure) as port:
        pipe(CAPTIONS, num_inference_steps=1)
    with pytest.raises(UserError, match="two steps"):
        measure.curves(port)


def test_a_part_of_a_paper_is_named_behind_it():
    part = manyheads.parse("pab.redundancy:layers=0-1")
    assert type(part) is Redundancy and part.spec == "pab.redundancy:layers=0+1" and manyheads.parse(part.spec) == part
    assert manyheads.parse("pab").spec == "pab"
    for unknown, line in (("pab.curves", "there are pab, pab.redundancy"), ("sag.redundancy", "there are sag")):
        with pytest.raises(UserError, match=line):
            manyheads.parse(unknown)


def test_kinds_of_modules():
    """Attention among the prompt's own tokens counts as neither spatial nor cross, whatever its site is."""
    kinds = {
        ("self", "space"): "spatial", ("self", "all"): "spatial", ("joint", "all"): "spatial",
        ("self", "time"): "temporal", ("cross", "all"): "cross", ("cross", "time"): "cross", ("self", "text"): "text",
        ("cross", "text"): "text",
    }  # fmt: skip
    for (kind, axis), want in kinds.items():
        step = DiffusionStep(1, 0, 10, 500.0, ("all",), None, axis)
        assert step.module_kind(Site("x", 0, 0, kind, False)) == want
        every = PAB(spatial=2, temporal=3, cross=5).every(Site("x", 0, 0, kind, False), step)
        assert every == {"spatial": 2, "temporal": 3, "cross": 5, "text": 1}[want]


def test_only_the_step_before_of_the_same_run_and_shape_is_compared():
    site, measure, state = Site("x", 0, 4, "self", False), Redundancy(), {}

    def step(index, value, *, run=1, total=9, shape=(2, 2), axis="all", pair=False):
        out = torch.full(shape, float(value))
        given = DiffusionStep(run, index, total, 1000.0 - 100 * index, ("all",), None, axis)
        return measure.around_module(site, given, state, lambda: (out, 0) if pair else out)

    step(0, 1.0)
    step(1, 3.0, pair=True)  # change 4 of a size of 9
    step(3, 5.0)  # one step is missing
    step(4, 6.0)  # 1 of 36
    step(5, 6.0, shape=(3, 2))  # another batch
    step(6, 2.0, shape=(3, 2), run=2)  # another run
    step(7, 4.0, shape=(3, 2), run=2)  # 4 of 16
    step(8, 5.0, shape=(3, 2), run=2)  # the last: 1 of 25
    assert "kept" not in state
    assert {key: (kind, t, float(change), float(size)) for key, (kind, t, change, size) in state["steps"].items()} == {
        (1, 1): ("spatial", 900.0, 4.0, 9.0), (1, 4): ("spatial", 600.0, 1.0, 36.0),
        (2, 7): ("spatial", 300.0, 4.0, 16.0), (2, 8): ("spatial", 200.0, 1.0, 25.0),
    }  # fmt: skip
    step(1, 9.0, run=3, total=None), step(2, 9.0, run=3, total=None, axis="text")
    assert "kept" not in state and (3, 2) not in state["steps"]  # among the text's tokens nothing is measured
    step(8, 9.0, run=3, total=None)
    assert "kept" in state  # the last step is not known

    class Port:
        @staticmethod
        def kept(strategy):
            other = Site("y", 1, 5, "cross", False)
            steps = {(1, 1): ("cross", 900.0, torch.tensor(1.0), torch.tensor(0.0))}
            twice = {(1, 1): ("spatial", 880.0, torch.tensor(2.0), torch.tensor(8.0))}
            return [(site, {"all": state, "two": {"steps": twice}}), (other, {"all": {"steps": steps}, "none": {}})]

    spatial, cross = measure.curves(Port)
    assert (spatial.kind, spatial.modules) == ("spatial", 1) and (cross.kind, cross.modules) == ("cross", 1)
    assert spatial.timesteps == (890.0, 600.0, 300.0, 200.0)
    assert spatial.relative == nearly(((4 / 9 + 2 / 8) / 2, 1 / 36, 4 / 16, 1 / 25))
    assert spatial.absolute == nearly(((4 + 2) / 2, 1, 4, 1))
    assert cross.relative == nearly((1 / 1e-20,))  # of an output of zero


def test_a_range_is_the_longest_calm_one_and_may_reach_either_end():
    calm, twice, more = 0.01, 0.02, 0.0201  # twice the median is calm still
    spec = suggest([curve("spatial", twice, calm, calm, calm, calm, more, calm, calm)], drift=0.5)
    assert spec.startswith("pab:upper=950,lower=450,")  # halfway to what would stand before, and to the wild one
    late = suggest([curve("spatial", more, calm, more, calm, calm, calm, calm)], drift=0.5)
    assert late.startswith("pab:upper=650,lower=150,")  # from step 3, and to half of the last timestep
    two = [curve("spatial", calm, calm, calm, more, calm), curve("cross", calm, calm, calm, calm, more)]
    assert suggest(two, drift=0.5).startswith("pab:upper=950,lower=650,")  # where every kind is calm
    with pytest.raises(UserError, match="no range"):
        suggest([curve("spatial", calm, more, calm, more, calm)])  # one step is no range
    # Steps of 0.1: n - 1 of them stay within the drift; no more than eight are ever used.
    for drift, every in ((0.09, 1), (0.1000001, 2), (0.29, 3), (0.65, 7), (0.69, 7), (0.71, 8), (9.0, 8)):
        assert suggest([curve("temporal", *[0.01] * 4)], drift=drift).endswith(f"temporal={every}"), drift
