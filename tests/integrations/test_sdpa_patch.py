# SPDX-License-Identifier: Apache-2.0
"""What a call of a denoiser's attention is, from the shapes it comes with: its kind, and which tokens attend."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.call import DiffusionStep, Layout, Site
from manyheads.integrations.hook_chain import BoundStrategy
from manyheads.integrations.sdpa_patch import SiteState
from manyheads.strategy import AttentionWatch


def located(q, k, layout=None, *, kind="self", axis="all", hidden=None, text=None, batch=1):
    state = SiteState(Site("x", 0, 0, kind, False))
    if layout is not None or axis != "all":
        state.step = DiffusionStep(1, 0, 4, 500.0, ("all",), layout, axis)
    if hidden is not None:
        state.hidden = torch.zeros(hidden)
    if text is not None:
        state.text = torch.zeros(text)
    site, step = state.located(torch.zeros(batch, 1, q, 2), torch.zeros(batch, 1, k, 2))
    assert (site is state.site) == (site.kind == kind)
    return site.kind, None if step is None else step.axis


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"q": 8, "k": 8}, "self"),
        ({"q": 8, "k": 5, "text": (1, 5, 2), "hidden": (1, 8, 2)}, "cross"),
        ({"q": 8, "k": 5, "text": (1, 5, 2)}, "cross"),
        ({"q": 8, "k": 5, "text": (1, 5, 2), "hidden": (1, 4, 2, 2)}, "cross"),
        ({"q": 13, "k": 13, "text": (1, 5, 2), "hidden": (1, 8, 2)}, "joint"),
        ({"q": 13, "k": 13, "layout": Layout(1, 2, 4, 5)}, "joint"),
        ({"q": 13, "k": 14, "layout": Layout(1, 2, 4, 5)}, "self"),
        ({"q": 12, "k": 12, "layout": Layout(1, 2, 4, 5)}, "self"),
        ({"q": 8, "k": 8, "layout": Layout(1, 2, 4)}, "self"),
        ({"q": 8, "k": 8, "kind": "joint"}, "joint"),
    ],
)
def test_kinds(given, want):
    assert located(**given)[0] == want


@pytest.mark.parametrize(
    ("q", "batch", "layout", "want"),
    [
        (8, 3, Layout(3, 2, 4), "space"), (8, 6, Layout(3, 2, 4), "space"), (8, 2, Layout(2, 2, 4), "space"),
        (8, 2, Layout(3, 2, 4), "all"),  # no whole number of videos: another resolution
        (3, 8, Layout(3, 2, 4), "time"), (2, 16, Layout(2, 2, 4), "time"), (3, 7, Layout(3, 2, 4), "text"),
        (24, 2, Layout(3, 2, 4), "all"), (8, 2, Layout(1, 2, 4), "all"), (1, 8, Layout(1, 2, 4), "all"),
        (2, 2, Layout(1, 2, 4), "all"),  # of a coarser grid
        (5, 2, Layout(1, 2, 4), "text"), (77, 2, Layout(1, 2, 4), "text"),
    ],
)  # fmt: skip
def test_which_tokens_attend_to_each_other(q, batch, layout, want):
    assert located(q, q, layout, batch=batch)[1] == want


def test_an_axis_that_is_known_stays():
    assert located(5, 5, Layout(1, 2, 4), axis="time")[1] == "time"
    assert located(8, 5, Layout(3, 2, 4), text=(1, 5, 2), batch=3) == ("cross", "all")
    assert located(5, 5) == ("self", None)


def test_a_processor_that_perturbs_by_itself_computes_twice():
    """What it computes first is of all rows but the perturbed ones, what comes after of those alone."""
    state = SiteState(Site("x", 0, 0, "self", False))
    seen = []

    class Note(AttentionWatch):
        def watch(self, call, out):
            seen.append(call.diffusion.branches)

    state.add([BoundStrategy(None, Note())])
    q = torch.randn(2, 1, 8, 4)

    def computed(processor, branches, times):
        seen.clear()
        state.step = DiffusionStep(1, 0, 4, 500.0, branches, Layout(1, 2, 4))
        state.enter(torch.zeros(2, 8, 4), None, processor)
        for _ in range(times):
            state.run(q, q, q, None, False, None, 0.0, lambda q, k, v, *_: (q + v).transpose(1, 2).transpose(1, 2))
        return list(seen)

    three = ("uncond", "cond", "perturbed")
    assert computed("PAGCFGIdentitySelfAttnProcessor2_0", three, 3) == [three[:2], three[2:], three[2:]]
    assert computed("PAGIdentitySelfAttnProcessor2_0", three[1:], 2) == [("cond",), ("perturbed",)]
    assert computed("AttnProcessor2_0", three, 2) == [three, three]
    assert computed("PAGIdentitySelfAttnProcessor2_0", ("uncond", "cond"), 2) == [("uncond", "cond")] * 2
    assert computed("PAGIdentitySelfAttnProcessor2_0", ("perturbed",), 1) == [("perturbed",)]
