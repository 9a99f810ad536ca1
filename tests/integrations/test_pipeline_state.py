# SPDX-License-Identifier: Apache-2.0
"""What guidance makes of a prediction, by moving it; contexts, calls and replaced methods of a pipeline."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from diffusers import guiders  # noqa: E402

from manyheads.call import DiffusionStep  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations import pipeline_state  # noqa: E402
from manyheads.integrations.pipeline_state import PipelineObserver, patch_attr  # noqa: E402
from tolerance import nearly  # noqa: E402


def step(*branches, call=0):
    return DiffusionStep(1, 0, 4, 500.0, branches, None, call=call)


def observed(guider, names):
    observer = PipelineObserver(None)
    observer.guider = guider
    key = guider._identifier_key
    observer.batches = [SimpleNamespace(**{key: f"pred_{name}"}) for name in names]
    return observer


def made(kind, **more):
    guider = getattr(guiders, kind)(guidance_scale=3.0, **more)
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    return guider


SKIPS = {"skip_layer_guidance_layers": [0], "skip_layer_guidance_scale": 2.5}


@pytest.mark.parametrize(
    ("guider", "names"),
    [
        (lambda: made("ClassifierFreeGuidance"), ("cond", "uncond")),
        (lambda: made("ClassifierFreeGuidance", use_original_formulation=True), ("cond", "uncond")),
        (lambda: made("SkipLayerGuidance", **SKIPS, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0),
         ("cond", "uncond", "cond_skip")),
        (lambda: made("SkipLayerGuidance", **SKIPS, skip_layer_guidance_stop=0.02), ("cond", "uncond")),
    ],
)  # fmt: skip
def test_the_scale_is_what_a_guider_makes_of_a_moved_prediction(guider, names):
    """Moved by one, the conditional prediction moves the result by g, the unconditional one by 1 - g."""
    guider = guider()
    observer, zero = observed(guider, names), torch.zeros(1, dtype=torch.float64)
    predictions = {f"pred_{name}": zero.clone() for name in names}
    for branch, weight in (("cond", lambda g: g), ("uncond", lambda g: 1 - g)):
        g = observer.guidance("x", None, step(branch), {})
        moved = {**predictions, f"pred_{branch}": zero + 1}
        result = guider.forward(**moved)
        assert float(getattr(result, "pred", result)) == nearly(weight(g)), branch


def test_guiders_without_a_scale():
    cond = observed(made("ClassifierFreeGuidance"), ("cond",))
    assert cond.guidance("x", None, step("cond"), {}) is None
    for guider, names in (
        (made("AdaptiveProjectedGuidance"), ("cond", "uncond")),
        (made("ClassifierFreeGuidance", guidance_rescale=0.5), ("cond", "uncond")),
        (made("SkipLayerGuidance", **SKIPS), ("cond", "cond_skip")),
    ):
        with pytest.raises(UserError, match=f"{type(guider).__name__} does not combine them by one"):
            observed(guider, names).guidance("x", None, step("cond"), {})


def test_what_has_to_be_known_is_asked_for():
    twice = {"x": torch.ones(2, 3), "text": torch.arange(2.0)[:, None]}
    bare = PipelineObserver(None)
    assert bare.guidance("x", None, step("all"), {"x": torch.randn(2, 3)}) is None
    assert bare.guidance("x", None, step("cond", "uncond"), twice) is None
    for at, given in ((step("all"), twice), (step("all", call=1), {"x": torch.randn(2, 3)})):
        with pytest.raises(UserError, match="x has to know which prediction of a loop of your own"):
            bare.guidance("x", None, at, given)
    with pytest.raises(UserError, match="x has to know which rows of a batch are conditional"):
        bare.guidance("x", None, step("unknown"), {})
    for branches in (("cond", "perturbed"), ("uncond", "cond", "perturbed")):
        with pytest.raises(UserError, match="give pag_scale=0"):
            bare.guidance("x", None, step(*branches), {})
    pipe = SimpleNamespace(guidance_scale=5.0)
    called = PipelineObserver(pipe)
    assert called.guidance("x", None, step("all"), {}) is None  # no call of it is running
    called._call_arguments = {"guidance_rescale": 0.3}
    assert called.guidance("x", None, step("all"), twice) == 5.0 and called.rescales
    called._call_arguments = {}
    assert not called.rescales
    called._call_arguments, called.guider = {"guidance_rescale": 0.3}, made("ClassifierFreeGuidance")
    assert not called.rescales  # a guider says it by itself


def test_the_prediction_at_hand_is_the_first_that_has_none():
    observer = observed(made("ClassifierFreeGuidance"), ("cond", "uncond"))
    assert observer._batch() == "cond"
    observer.batches[0].noise_pred = 1
    assert observer._batch() == "uncond"
    observer.batches[1].noise_pred = 1
    assert observer._batch() is None and PipelineObserver(None)._batch() is None


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.said = []

    @contextmanager
    def cache_context(self, name, **kwargs):
        self.said.append((name, kwargs))
        yield


def test_contexts_may_stand_in_each_other_and_end_by_an_error():
    model, observer, restorers = Denoiser(), PipelineObserver(None), []
    observer.open([model, torch.nn.Linear(1, 1)], restorers)
    with model.cache_context("cond", extra=1):
        assert observer._context == "cond"
        with model.cache_context("uncond"):
            assert observer._context == "uncond"
        assert observer._context == "cond"
    with pytest.raises(KeyError), model.cache_context("cond"):
        raise KeyError
    assert observer._context is None and model.said == [("cond", {"extra": 1}), ("uncond", {}), ("cond", {})]
    for restore in restorers:
        restore()
    assert "cache_context" not in vars(model)


class Pipe:
    """A pipeline as far as it is observed."""

    scheduler = None

    def __init__(self):
        self.components = {"guider": made("ClassifierFreeGuidance"), "other": 5}

    def __call__(self, prompt, guidance_scale=4.0, work=None):
        """Make a picture."""
        return work(self, prompt) if work else prompt

    def encode_prompt(self, prompt_embeds, negative_prompt_embeds):
        return prompt_embeds, negative_prompt_embeds


def opened(pipe):
    observer, restorers = PipelineObserver(pipe), []
    observer.open([], restorers)
    return observer, restorers


def test_a_call_is_observed_and_its_pipeline_given_back():
    pipe = Pipe()
    guider = pipe.components["guider"]
    observer, restorers = opened(pipe)
    assert type(pipe).__name__ == "Pipe" and isinstance(pipe, Pipe) and type(pipe) is not Pipe
    assert type(pipe).__call__.__doc__ == "Make a picture." and type(pipe).__module__ == Pipe.__module__
    added = made("ClassifierFreeGuidance")

    def work(this, prompt):
        assert observer._scale() == 7.0 and observer._call_arguments["prompt"] == "a"
        assert this("within", guidance_scale=9.0) == "within" and observer._scale() == 7.0  # a call within a call
        text = torch.ones(1, 3), torch.zeros(1, 3)
        assert this.encode_prompt(*text) == text and len(observer._prompts._pairs) == 1
        assert [id(x) for x in observer._guiders] == [id(guider), id(added)]
        return 5

    pipe.components["late"] = added
    assert pipe("a", 7.0, work=work) == 5
    assert observer._call_arguments is None and observer._scale() is None and observer.idle_calls == 1

    def counted(this, prompt):
        observer._counter.see(500.0, [torch.zeros(1)], "m", None, None, True)
        assert observer._prompts._pairs == []  # those of the call before are gone
        if prompt == "bad":
            raise KeyError(prompt)

    pipe("b", work=counted)
    assert observer.idle_calls == 1 and observer.failed == set()
    with pytest.raises(KeyError):
        pipe("bad", work=counted)
    assert observer.failed == {2} and observer._call_arguments is None

    def refuses(this, prompt):
        raise KeyError(prompt)

    with pytest.raises(KeyError):
        pipe("early", work=refuses)
    assert observer.failed == {2} and observer.idle_calls == 1  # no run had begun
    batches = guider.prepare_inputs({"x": (torch.ones(1), torch.zeros(1))})
    assert observer.guider is guider and observer.batches is batches and len(batches) == 2
    for restore in reversed(restorers):
        restore()
    assert type(pipe) is Pipe and not {"prepare_inputs", "prepare_inputs_from_block_state"} & set(vars(guider))


def test_processors_of_a_pipeline_that_perturbs_are_put_back_after_an_error():
    class Perturbs(diffusers.pipelines.pag.pag_utils.PAGMixin, Pipe):
        pass

    class Module(torch.nn.Module):
        processor = None

    model = torch.nn.Sequential(Module(), torch.nn.Linear(1, 1))
    model[0].processor = "own"
    pipe = object.__new__(Perturbs)
    pipe.components = {"unet": model, "other": 5}
    observer, _ = opened(pipe)

    def work(this, prompt):
        model[0].processor = "another"
        if prompt == "bad":
            raise KeyError(prompt)

    with pytest.raises(KeyError):
        pipe("bad", work=work)
    assert model[0].processor == "own" and observer._call_arguments is None
    pipe("good", work=work)
    assert model[0].processor == "another"  # it takes care of that itself
    assert pipeline_state._perturbing(Pipe()) == []


def test_a_method_is_given_back_as_it_was():
    class Owner:
        def method(self):
            return "class"

    owner = Owner()
    restore = patch_attr(owner, "method", lambda: "ours")
    assert owner.method() == "ours"
    restore()
    assert owner.method() == "class" and vars(owner) == {}
    owner.method = own = lambda: "own"
    restore = patch_attr(owner, "method", lambda: "ours")
    assert owner.method() == "ours"
    restore()
    assert owner.method is own


def test_without_a_scheduler_a_guider_tells_the_step():
    """And the timestep, of which the denoiser may be given another scale."""
    guider = made("ClassifierFreeGuidance")
    guider.set_state(step=2, num_inference_steps=7, timestep=torch.tensor(321))
    observer = observed(guider, ("cond", "uncond"))
    observer.run_marker = object()
    found = observer.step(torch.nn.Linear(1, 1), {"x": torch.zeros(1, 4), "timestep": torch.tensor(0.321)})
    assert (found.run, found.index, found.total, found.timestep) == (1, 2, 7, 321.0) and found.branches == ("cond",)
    observer.batches[0].noise_pred = 1
    found = observer.step(torch.nn.Linear(1, 1), {"x": torch.zeros(1, 4), "timestep": torch.tensor(0.321)})
    assert found.branches == ("uncond",) and (found.run, found.call) == (1, 0)
    bare = PipelineObserver(None).step(torch.nn.Linear(1, 1), {"x": torch.zeros(1, 4), "timestep": torch.tensor(9.0)})
    assert (bare.index, bare.total, bare.timestep, bare.branches) == (None, None, 9.0, ("all",))
