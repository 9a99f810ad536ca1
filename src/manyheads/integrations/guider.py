# SPDX-License-Identifier: Apache-2.0
"""A guider for modular pipelines of diffusers that lets strategies act while it has predictions made.

    pipe.update_components(guider=Guider("slug:field=value", guidance_scale=4))
    pipe(prompt=...)

is all: nothing is opened or closed by the user. The guider opens the port of diffusers for each call of the denoiser
and closes it with that call, however it ends; what strategies remember lasts from call to call. ``manyheads.use(pipe,
...)`` does the same for one block of code and any guider, and is what a compiled denoiser needs.
"""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from torch import nn

from ..spec import parse
from ..strategy import Strategy
from .diffusers import DiffusersPort
from .module_calls import Restore, wrap_call
from .pipeline_state import PipelineObserver

__all__ = ["Guider", "around"]

Specs = str | Strategy | Sequence[str | Strategy]

if TYPE_CHECKING:
    _Base = BaseGuidance
else:
    _Base = object


class _Opening(_Base):
    """What a guider needs beside its own methods."""

    _ports: dict[nn.Module, DiffusersPort]

    def act(self, strategies: Specs, scheduler: Any) -> Self:
        """Let ``strategies`` act from now on; ``scheduler`` is the pipeline's."""
        several = [strategies] if isinstance(strategies, (str, Strategy)) else strategies
        self._strategies = tuple(parse(strategy) for strategy in several)
        self._observer = PipelineObserver(SimpleNamespace(scheduler=scheduler) if scheduler is not None else None)
        self._ports = {}
        self._waiting: Restore | None = None
        return self

    @property
    def ports(self) -> list[DiffusersPort]:
        """The port of every denoiser that was run: ``port.state(strategy)`` is what a strategy kept."""
        return list(self._ports.values())

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """Those that act, in their order."""
        return self._strategies

    def new(self, **kwargs: Any) -> Any:
        made: Any = super().new(**kwargs)  # type: ignore[no-untyped-call]
        return made.act(kwargs.get("strategies", self._strategies), self._observer.scheduler)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        before: int | None = self.get_state()["step"]
        if before is None or step <= before:
            self._observer.run_marker = object()
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._observer.guider, self._observer.batches = self, super().prepare_inputs(*args, **kwargs)
        return self._observer.batches

    def prepare_inputs_from_block_state(self, *args: Any, **kwargs: Any) -> Any:
        self._observer.guider, self._observer.batches = self, super().prepare_inputs_from_block_state(*args, **kwargs)
        return self._observer.batches

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Let the next call of ``denoiser`` go through the port, and no other."""
        super().prepare_models(denoiser)
        self._forget()
        if not self._strategies:
            return
        port = self._ports.get(denoiser)
        if port is None:
            port = self._ports[denoiser] = DiffusersPort(denoiser, self._strategies, self._observer)

        def opening(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._forget()
            with port:
                return denoiser(*args, **kwargs)

        self._waiting = wrap_call(denoiser, opening)[1]

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._forget()
        super().cleanup_models(denoiser)

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting()
            self._waiting = None


class Guider(_Opening, ClassifierFreeGuidance):
    """Classifier-free guidance with strategies at work.

    Args:
        strategies: a strategy or its spec, or several; they act in the order given.
        scheduler: of the pipeline (``pipe.scheduler``), for strategies that have to know the noise level.
        guidance_scale: and all others as of diffusers' ``ClassifierFreeGuidance``.

    Raises:
        UserError: an unknown strategy or field; when the pipeline runs, whatever :func:`manyheads.use` would raise.
    """

    ignore_for_config = ["scheduler"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, strategies: Specs = (), scheduler: Any = None, guidance_scale: float = 7.5, guidance_rescale: float = 0.0,
        use_original_formulation: bool = False, start: float = 0.0, stop: float = 1.0, enabled: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, start=start, stop=stop, enabled=enabled,
            use_original_formulation=use_original_formulation,
        )  # fmt: skip
        self.act(strategies, scheduler)
        named = {"strategies": [strategy.spec for strategy in self.strategies], "_use_default_values": []}
        self.register_to_config(**named)  # type: ignore[no-untyped-call]


def around(guider: BaseGuidance, strategies: Specs, scheduler: Any = None) -> BaseGuidance:
    """A copy of any guider of diffusers with strategies at work, see :class:`Guider`.

    Args:
        guider: stays as it is.
        strategies: as in :class:`Guider`; those that guide need a guider that combines its predictions by
            a known scale.
        scheduler: as in :class:`Guider`.
    """
    kind = type(guider)
    made: Any = copy.copy(guider)
    made.__class__ = type(kind.__name__, (_Opening, kind), {"__module__": kind.__module__})
    acting: BaseGuidance = made.act(strategies, scheduler)
    return acting
