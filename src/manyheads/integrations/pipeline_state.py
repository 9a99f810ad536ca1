# SPDX-License-Identifier: Apache-2.0
"""The state of a pipeline of diffusers while a port is open: step, branches, and how predictions are combined.

For a classic pipeline it is read from the scheduler, the arguments of its call and the names of the contexts it runs
its denoiser in; for a modular one from its guiders, which make a batch for each prediction and get every step.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from diffusers.guiders.auto_guidance import AutoGuidance
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.guiders.perturbed_attention_guidance import PerturbedAttentionGuidance
from diffusers.guiders.skip_layer_guidance import SkipLayerGuidance
from diffusers.guiders.smoothed_energy_guidance import SmoothedEnergyGuidance
from torch import Tensor, nn

from ..call import DiffusionStep
from ..errors import UserError
from .layouts import arguments, branches_of, guidance_of, layout_of, step_of, timestep_of

__all__ = ["PipelineObserver", "Restore"]

Restore = Callable[[], None]

# Guiders whose result is affine in their predictions, and the scale of each difference from the conditional one.
_AFFINE = (
    ClassifierFreeGuidance, AutoGuidance, PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance,
)  # fmt: skip
_SCALES = {
    "uncond": "guidance_scale", "cond_skip": "skip_layer_guidance_scale", "cond_seg": "seg_guidance_scale",
}  # fmt: skip


class PipelineObserver:
    """Reads the state of one pipeline.

    Attributes:
        pipe: the pipeline, or anything with its scheduler; None for a bare denoiser.
        guider: the guider that made the latest batches, None where none did.
        batches: those batches, one for each prediction of the step.
        run_marker: an object for the run at hand where no scheduler is known; a new run has another.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.guider: Any = None
        self.batches: Sequence[Any] = ()
        self.run_marker: Any = None
        self._context: str | None = None
        self._call_arguments: dict[str, Any] = {}
        self._timesteps: Any = None
        self._run = 0
        self._board: dict[str, Any] = {}

    @property
    def scheduler(self) -> Any:
        """The scheduler of the pipeline, None where there is none."""
        return getattr(self.pipe, "scheduler", None)

    def open(self, models: Sequence[nn.Module], restorers: list[Restore]) -> None:
        """Start to observe; the functions appended to ``restorers`` end it."""
        restorers.extend(self._observe_contexts(model) for model in models if hasattr(type(model), "cache_context"))
        if self.pipe is None:
            return
        guiders = [part for part in self.pipe.components.values() if isinstance(part, BaseGuidance)]
        names = ("prepare_inputs", "prepare_inputs_from_block_state")
        restorers.extend(self._observe_batches(guider, name) for guider in guiders for name in names)
        if not guiders:
            restorers.append(self._observe_call())

    def step(self, module: nn.Module, given: dict[str, Any]) -> DiffusionStep:
        """The step of the run at which ``module`` is called with the arguments ``given``."""
        guider_state = self.guider.get_state() if self._batch() is not None else {}
        value = timestep_of(module, given, self.scheduler) if not guider_state else float(guider_state["timestep"])
        index, total = step_of(value, self.scheduler)
        if index is None and guider_state:
            index, total = guider_state["step"], guider_state["num_inference_steps"]
        timesteps = getattr(self.scheduler, "timesteps", self.run_marker)
        if timesteps is not None and timesteps is not self._timesteps:  # the scheduler was given new ones
            self._timesteps, self._run, self._board = timesteps, self._run + 1, {}
        rows = next((x.shape[0] for x in given.values() if isinstance(x, Tensor) and x.ndim > 1), 1)
        name = self._context or self._batch()
        guided = self.guider is None and guidance_of(self.pipe, self._call_arguments) is not None
        branches = branches_of(self.pipe, name, rows, guided)
        return DiffusionStep(self._run, index, total, value, branches, layout_of(module, given), run_state=self._board)

    def guidance(self, slug: str, model: nn.Module, branches: tuple[str, ...]) -> float | None:
        """The scale g of guidance, None where there is none: ``branches`` count g and 1 - g for cond and uncond.

        Raises:
            UserError: a guider combines its predictions in a way that has no such scale.
        """
        if self.guider is None:
            return guidance_of(self.pipe, self._call_arguments, model)
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

    def _observe_batches(self, guider: Any, name: str) -> Restore:
        """Record which batches a guider makes."""
        original = getattr(guider, name)

        def prepare(*args: Any, **kwargs: Any) -> Any:
            self.guider, self.batches = guider, original(*args, **kwargs)
            return self.batches

        return patch_attr(guider, name, prepare)

    def _observe_call(self) -> Restore:
        """Record the arguments of the pipeline's call, by a subclass of its own class while the port is open."""
        pipe, kind = self.pipe, type(self.pipe)

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            before, self._call_arguments = self._call_arguments, arguments(this, args, kwargs, kind.__call__)
            try:
                return kind.__call__(this, *args, **kwargs)
            finally:
                self._call_arguments = before

        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})

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


def patch_attr(owner: Any, name: str, function: Callable[..., Any]) -> Restore:
    """Replace an object's method by a function; the returned function restores it."""
    own = owner.__dict__.get(name)
    owner.__dict__[name] = function

    def restore() -> None:
        del owner.__dict__[name]
        if own is not None:
            owner.__dict__[name] = own

    return restore
