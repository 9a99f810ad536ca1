# SPDX-License-Identifier: Apache-2.0
"""What a denoiser predicts, in terms of the clean sample and the noise, for the common kinds of schedulers."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..call import DenoiserCall
from ..errors import UserError

__all__ = ["Prediction", "add_guidance", "is_flow", "select_batch"]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's samples are ``(1 - sigma) x0 + sigma eps``."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(getattr(scheduler.config, "use_flow_sigmas", False))


@dataclass(frozen=True, slots=True)
class Prediction:
    """How noisy sample, clean sample and noise hang together at one step: ``x = alpha x0 + sigma eps``.

    Attributes:
        alpha, sigma: of this step.
        kind: what the denoiser predicts: the noise, the clean sample, ``v = alpha eps - sigma x0``, or the velocity
            ``eps - x0`` of a flow.
    """

    alpha: float
    sigma: float
    kind: Literal["epsilon", "sample", "v_prediction", "flow"]

    @staticmethod
    def of(call: DenoiserCall) -> "Prediction":
        """Read it off the scheduler.

        Raises:
            UserError: no scheduler, or one of a kind that is not known.
        """
        if call.scheduler is None or call.step.index is None:
            raise UserError(
                "the noise level is the scheduler's to say: open the pipeline, not its denoiser; a Guider is given it"
            )
        return Prediction.at(call.scheduler, call.step.timestep)

    @staticmethod
    def at(scheduler: Any, timestep: float) -> "Prediction":
        """That of a scheduler at one of its timesteps.

        Raises:
            UserError: a scheduler of a kind that is not known.
        """
        config = scheduler.config
        if is_flow(scheduler):
            times = scheduler.timesteps.double().flatten().cpu()
            sigma = float(scheduler.sigmas[int((times - timestep).abs().argmin())])
            return Prediction(1 - sigma, sigma, "flow")
        kind: Any = getattr(config, "prediction_type", "epsilon")
        if kind not in ("epsilon", "sample", "v_prediction"):
            raise UserError(
                f"{type(scheduler).__name__} predicts {kind!r}; known are epsilon, sample, v_prediction, flow"
            )
        total = getattr(scheduler, "alphas_cumprod", None)
        if total is None:
            raise UserError(
                f"{type(scheduler).__name__} has no alphas_cumprod; use a DDIM, DPM-Solver or flow scheduler"
            )
        alpha = float(total[round(timestep)])
        return Prediction(alpha**0.5, (1 - alpha) ** 0.5, kind)

    def to_x0_eps(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample and the noise of which ``x`` is made, according to ``out``."""
        a, s = self.alpha, self.sigma
        if self.kind == "epsilon":
            return (x - s * out) / a, out
        if self.kind == "sample":
            return out, (x - a * out) / s
        if self.kind == "v_prediction":
            return a * x - s * out, s * x + a * out
        return x - s * out, x + (1 - s) * out

    def output(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What a denoiser says that means this clean sample and this noise."""
        if self.kind == "epsilon":
            return eps
        if self.kind == "sample":
            return x0
        return self.alpha * eps - self.sigma * x0 if self.kind == "v_prediction" else eps - x0

    def add_noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The noisy sample of both."""
        return torch.as_tensor(self.alpha * x0 + self.sigma * eps)


def select_batch(call: DenoiserCall, rows: slice) -> dict[str, Any]:
    """The arguments of a denoiser for some rows of its batch, of tensors within dicts, lists and tuples too."""
    batch = call.latents.shape[0]

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(cut(item) for item in value)
        return value[rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch else value

    return {name: cut(value) for name, value in call.given.items()}


def add_guidance(call: DenoiserCall, plain: Tensor, guidance: Tensor) -> Tensor:
    """A prediction moved so that, after classifier-free guidance ``u + g (c - u)``, it is moved by ``guidance``.

    Where both branches are in one batch both are moved; only the unconditional one, by what ``1 - g`` makes of it,
    where the guided prediction is then brought to the size of the conditional one. Where they are calls of their own
    only the one at hand can be moved.

    Raises:
        UserError: the branches are calls of their own, and the pipeline does not give g, or the one at hand
            counts nothing; or the conditional one would have to be moved, which others are then measured by.
    """
    g, branches = call.guidance_scale, call.step.branches
    guided = plain.clone()
    if call.rescales and g is not None:
        if "uncond" not in branches or g == 1:
            raise UserError(
                "the pipeline brings the guided prediction to the size of the conditional one, which a strategy would "
                "change; give guidance_rescale=0 (or switch its normalisation of guidance off)"
            )
        rows = call.step.rows("uncond", len(plain))
        guided[rows, : guidance.shape[1]] += guidance / (1 - g)
        return guided
    if branches in (("cond",), ("uncond",)):
        if g is None and branches == ("uncond",):
            raise UserError("the pipeline guides by two calls and does not say how strongly; switch its guidance off")
        weight = (1.0 if g is None else g) if branches == ("cond",) else 1 - float(g or 0)
        if not weight:
            raise UserError(
                f"at a guidance scale of {g} the {branches[0]} prediction counts nothing; use another scale"
            )
        guidance = guidance / weight
    for at in range(0, plain.shape[0], guidance.shape[0]):
        guided[at : at + guidance.shape[0], : guidance.shape[1]] += guidance
    return guided
