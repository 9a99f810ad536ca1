# SPDX-License-Identifier: Apache-2.0
"""The state of a pipeline of diffusers while a port is open: step, branches, and how predictions are combined.

For a classic pipeline it is read from the arguments of its call, the embeddings of its prompts and the names of the
contexts it runs its denoiser in (:mod:`.batch_rows`); for a modular one from its guiders, which make a batch for each
prediction. Steps are counted (:mod:`.step_count`).
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from diffusers.guiders.auto_guidance import AutoGuidance
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.guiders.perturbed_attention_guidance import PerturbedAttentionGuidance
from diffusers.guiders.skip_layer_guidance import SkipLayerGuidance
from diffusers.guiders.smoothed_energy_guidance import SmoothedEnergyGuidance
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import nn

from ..call import DiffusionStep, Prompt
from ..errors import UserError
from ..inpainting import Inpainter
from .batch_rows import UNKNOWN, PromptRows, guidance_of, of_one_sample, rescales, rows_of, tensors_of
from .images import put_back
from .layouts import arguments, layout_of, timestep_of
from .module_calls import Restore
from .prompts import prompts_of
from .step_count import StepCounter

__all__ = ["PipelineObserver", "patch_attr"]

# Guiders whose result is affine in their predictions, and the scale of each difference from the conditional one.
_AFFINE = (
    ClassifierFreeGuidance, AutoGuidance, PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance,
)  # fmt: skip
_SCALES = {
    "uncond": "guidance_scale", "cond_skip": "skip_layer_guidance_scale", "cond_seg": "seg_guidance_scale",
}  # fmt: skip
_BATCHES = ("prepare_inputs", "prepare_inputs_from_block_state")


class PipelineObserver:
    """Reads the state of one pipeline.

    Attributes:
        pipe: the pipeline, or anything with its scheduler; None for a bare denoiser.
        guider: the guider that made the latest batches, None where none did.
        batches: those batches, one for each prediction of the step.
        run_marker: an object for the run at hand where a guider tells it; a new run has another.
        idle_calls: calls of the pipeline that ended without a call of a denoiser of ours.
        failed: runs in which an error ended the pipeline's call.
        inpainters: strategies that put pixels back into the images that the pipeline's call returns.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.guider: Any = None
        self.batches: Sequence[Any] = ()
        self.run_marker: Any = None
        self.idle_calls = 0
        self.failed: set[int] = set()
        self.inpainters: tuple[Inpainter, ...] = ()
        self._guiders: list[BaseGuidance] = []
        self._context: str | None = None
        self._call_arguments: dict[str, Any] | None = None
        self._prompts = PromptRows()
        self._counter = StepCounter()

    @property
    def scheduler(self) -> Any:
        """The scheduler of the pipeline, None where there is none."""
        return getattr(self.pipe, "scheduler", None)

    def open(self, models: Sequence[nn.Module], restorers: list[Restore]) -> None:
        """Start to observe; the functions appended to ``restorers`` end it."""
        restorers.extend((self._counter.forget, self._prompts.clear))
        restorers.extend(self._observe_contexts(model) for model in models if hasattr(type(model), "cache_context"))
        if self.pipe is None:
            return
        self._observe_guiders(restorers)
        restorers.append(self._observe_call(restorers))

    def step(self, module: nn.Module, given: dict[str, Any]) -> DiffusionStep:
        """The step of the run at which ``module`` is called with the arguments ``given``; counts the call."""
        guider_state = self.guider.get_state() if self._batch() is not None else {}
        value = timestep_of(module, given, self.scheduler) if not guider_state else float(guider_state["timestep"])
        inside, counter, tensors = self._call_arguments is not None, self._counter, list(tensors_of(given))
        name = self._context or self._batch()
        guided = self.guider is None and self._scale() is not None if inside else None
        branches = rows_of(self.pipe, name, given, guided, self._prompts)
        call = counter.see(value, tensors, (id(module), branches), self.scheduler, self.run_marker, inside)
        index: int | None = counter.index
        total = counter.total(self.pipe, self.scheduler, inside)
        if total is None:
            index, total = guider_state.get("step"), guider_state.get("num_inference_steps")
        layout = layout_of(module, given)
        return DiffusionStep(
            counter.run, index, total, value, branches, layout, run_state=counter.run_state, call=call
        )  # fmt: skip

    def _scale(self, model: nn.Module | None = None) -> float | None:
        """The scale of the pipeline's call, None outside of one and without guidance."""
        return None if self._call_arguments is None else guidance_of(self.pipe, self._call_arguments, model)

    @property
    def rescales(self) -> bool:
        """Whether the pipeline's call brings what it guided to the size of the conditional prediction."""
        return self.guider is None and self._call_arguments is not None and rescales(self.pipe, self._call_arguments)

    @property
    def prompts(self) -> Callable[[], tuple[tuple[Prompt, ...], ...]] | None:
        """Gives the prompts of the pipeline's call; None outside of one."""
        asked = self._call_arguments
        return None if asked is None else lambda: prompts_of(self.pipe, asked)

    def guidance(self, slug: str, model: nn.Module, step: DiffusionStep, given: dict[str, Any]) -> float | None:
        """The scale g of guidance, None where there is none: branches count g and 1 - g for cond and uncond.

        Raises:
            UserError: a guider combines its predictions in a way that has no such scale; nothing tells which rows are
                conditional; the pipeline perturbs attention by itself.
        """
        name, branches = type(self.pipe).__name__, step.branches
        outside = self._call_arguments is None and self.guider is None
        if outside and branches == ("all",) and (step.call or of_one_sample(given)):
            raise UserError(
                f"{slug} has to know which prediction of a loop of your own is the conditional one: call encode_prompt "
                "of the pipeline inside of the block, and put both in one batch"
            )
        if branches == UNKNOWN:
            raise UserError(
                f"{slug} has to know which rows of a batch are conditional, and neither the embeddings nor the code of "
                f"{name} tell; run its parts as two calls, in cache_context('cond') and cache_context('uncond')"
            )
        if "perturbed" in branches:
            raise UserError(
                f"{slug} makes predictions of its own, which the attention processors of {name} cannot; give "
                "pag_scale=0, or use the pipeline without PAG"
            )
        if self.guider is None:
            return self._scale(model)
        names = {self._name(batch) for batch in self.batches}
        if names == {"cond"}:
            return None
        guider = self.guider
        if not isinstance(guider, _AFFINE) or guider.guidance_rescale or "uncond" not in names:
            raise UserError(
                f"{slug} has to know by which scale predictions are combined, and {type(guider).__name__} does not "
                "combine them by one; use ClassifierFreeGuidance without rescaling"
            )
        counted = {"uncond"} if branches == ("uncond",) else names - {"cond"}
        return float(guider.use_original_formulation + sum(getattr(guider, _SCALES[name]) for name in counted))

    def _name(self, batch: Any) -> str:
        return str(getattr(batch, self.guider._identifier_key)).removeprefix("pred_")

    def _batch(self) -> str | None:
        """The prediction at hand: of the first batch that has none yet."""
        return next((self._name(batch) for batch in self.batches if not hasattr(batch, "noise_pred")), None)

    def _observe_guiders(self, restorers: list[Restore]) -> None:
        """Observe the guiders of the pipeline that are not observed yet."""
        for part in self.pipe.components.values():
            if isinstance(part, BaseGuidance) and all(part is not known for known in self._guiders):
                self._guiders.append(part)
                restorers.extend(self._observe_batches(part, name) for name in _BATCHES)

    def _observe_batches(self, guider: Any, name: str) -> Restore:
        """Record which batches a guider makes."""
        original = getattr(guider, name)

        def prepare(*args: Any, **kwargs: Any) -> Any:
            self.guider, self.batches = guider, original(*args, **kwargs)
            return self.batches

        return patch_attr(guider, name, prepare)

    def _observe_call(self, restorers: list[Restore]) -> Restore:
        """Record the call of the pipeline and its prompts, by a subclass of its own class while the port is open.

        Guiders that were put in meanwhile are found where it begins.
        """
        pipe, kind = self.pipe, type(self.pipe)

        @functools.wraps(kind.__call__)
        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            if self._call_arguments is not None:  # a call within a call
                return kind.__call__(this, *args, **kwargs)
            self._call_arguments = arguments(this, args, kwargs, kind.__call__)
            self._observe_guiders(restorers)
            self._prompts.clear()
            self._prompts.add(self._call_arguments)
            self._counter.begin()
            before = self._counter.run
            processors = _perturbing(this)
            try:
                made = kind.__call__(this, *args, **kwargs)
                made = put_back(made, self._call_arguments.get("output_type"), self.inpainters)
            except BaseException:
                if self._counter.run != before:
                    self.failed.add(self._counter.run)
                for module, processor in processors:
                    module.processor = processor
                raise
            finally:
                self._call_arguments = None
            self.idle_calls += self._counter.run == before
            return made

        own = {"__call__": call, "__module__": kind.__module__}
        if hasattr(kind, "encode_prompt"):

            @functools.wraps(kind.encode_prompt)
            def encode_prompt(this: Any, *args: Any, **kwargs: Any) -> Any:
                made = kind.encode_prompt(this, *args, **kwargs)
                self._prompts.add_returned(kind.encode_prompt, made)
                return made

            own["encode_prompt"] = encode_prompt
        pipe.__class__ = type(kind.__name__, (kind,), own)

        def restore() -> None:
            pipe.__class__ = kind

        return restore

    def _observe_contexts(self, model: Any) -> Restore:
        """Record the names of the contexts in which a pipeline runs its denoiser."""
        original = model.cache_context

        @contextmanager
        def context(name: str, **kwargs: Any) -> Any:
            before, self._context = self._context, name
            try:
                with cast("AbstractContextManager[Any]", original(name, **kwargs)):
                    yield
            finally:
                self._context = before

        return patch_attr(model, "cache_context", context)


def _perturbing(pipe: Any) -> list[tuple[Any, Any]]:
    """Modules and processors of a pipeline that puts others in their place and takes them back only if it ends well."""
    if not issubclass(type(pipe), PAGMixin):
        return []
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = [module for model in models for module in model.modules() if hasattr(module, "processor")]
    return [(module, module.processor) for module in modules]


def patch_attr(owner: Any, name: str, function: Callable[..., Any]) -> Restore:
    """Replace an object's method by a function; the returned function restores it."""
    own = owner.__dict__.get(name)
    owner.__dict__[name] = function

    def restore() -> None:
        del owner.__dict__[name]
        if own is not None:
            owner.__dict__[name] = own

    return restore
