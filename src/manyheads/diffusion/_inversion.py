# SPDX-License-Identifier: Apache-2.0
"""The noise that an image would have been made of: the steps of a sampler backwards.

A step of DDIM goes from the noisier latents ``x_t`` to ``x_s = A x_t + B out(x_t, t)``, with A and B of the two noise
levels and of what the denoiser predicts; so does an Euler step of a flow, with ``A = 1`` and ``B = sigma_s - sigma_t``.
Backwards ``x_t = (x_s - B out(x_t, t)) / A`` has ``x_t`` on both sides. Evaluating the denoiser at ``x_s`` instead is
DDIM inversion; doing so again with the ``x_t`` that was found comes to the solution, as long as a step changes the
prediction little (``iterations``).

Denoising Diffusion Implicit Models (arXiv 2010.02502); by fixed-point iterations: Effective Real Image Editing with
Accelerated Iterative Diffusion Inversion (arXiv 2309.04907).

    pipe.scheduler.set_timesteps(50)
    noise = invert(pipe.scheduler, latents, lambda x, t: pipe.unet(x, t, encoder_hidden_states=source).sample)
    with manyheads.use(pipe, "masactrl"):
        pipe([source_prompt, target_prompt], latents=torch.cat([noise, noise]), num_inference_steps=50)

Shapes: latents ``[B, ...]``. The denoiser predicts without guidance: with the source's own prompt, or with none, as
strong guidance has no inverse that is stable. The pipeline has to take the same steps, with the same scheduler.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ._prediction import Prediction, is_flow

__all__ = ["affine", "fitted", "invert", "levels", "path"]


def invert(
    scheduler: Any, latents: Tensor, predict: Callable[[Tensor, Tensor], Tensor], iterations: int = 5
) -> Tensor:  # fmt: skip
    """The noise ``[B, ...]`` from which a sampler's steps lead to ``latents``; see :func:`path`."""
    return path(scheduler, latents, predict, iterations)[0]


def path(
    scheduler: Any, latents: Tensor, predict: Callable[[Tensor, Tensor], Tensor], iterations: int = 5
) -> Tensor:  # fmt: skip
    """Latents ``[T + 1, B, ...]`` by which T steps of a sampler lead to the given ones, up to what iterations leave.

    Args:
        scheduler: a ``DDIMScheduler`` (with ``eta`` 0) or ``FlowMatchEulerDiscreteScheduler`` whose timesteps are set.
        latents: clean, as the denoiser's are scaled; the last of the path, whose first are the noise.
        predict: ``predict(x, t)`` is the denoiser's output for latents ``x`` at the timestep ``t``, a scalar tensor.
        iterations: evaluations of the denoiser for a step; 1 is DDIM inversion.

    Raises:
        UserError: a scheduler with steps of another kind, or without timesteps; steps with no way back; no iterations.
    """
    if iterations < 1:
        raise UserError(f"inversion takes at least one evaluation a step, not {iterations}")
    times, between = scheduler.timesteps, levels(scheduler)
    x, passed = latents, [latents]
    with torch.no_grad():
        for t, (before, after) in zip(reversed(times), reversed(between), strict=True):
            a, b = affine(before, after)
            if abs(a) < 1e-6:
                raise UserError(
                    "a step of this scheduler leaves nothing of the latents it came from, so that nothing leads back; "
                    "use one that predicts noise, v or a flow"
                )
            start = x
            for _ in range(iterations):
                x = (start - b * predict(x, t)) / a
            passed.append(x)
    return torch.stack(passed[::-1])


def affine(before: Prediction, after: Prediction) -> tuple[float, float]:
    """A and B of the step ``x_s = A x_t + B out`` between two noise levels."""
    a, b = (float(after.add_noise(*before.to_x0_eps(*one))) for one in _UNITS)
    return a, b


def fitted(
    start: Tensor, loss: Callable[[Tensor], Tensor], *, rate: float, most: int, enough: float
) -> Tensor:  # fmt: skip
    """An embedding near ``start [B, ...]`` at which a loss is small: by Adam, each row on its own.

    Args:
        start: where to begin.
        loss: ``loss(x)`` of each row, ``[B]``.
        rate: of Adam.
        most: steps.
        enough: no more steps once every row's loss, before a step, was below it.
    """
    found = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([found], lr=rate)
    for _ in range(most):
        with torch.enable_grad():
            off = loss(found)
            (found.grad,) = torch.autograd.grad(off.sum(), found)
        optimizer.step()
        if bool((off < enough).all()):
            break
    return found.detach()


_UNITS = tuple((torch.tensor(i, dtype=torch.float64), torch.tensor(1 - i, dtype=torch.float64)) for i in (1, 0))


def levels(scheduler: Any) -> list[tuple[Prediction, Prediction]]:
    """The noise levels that each step of a scheduler goes from and comes to, the noisiest first."""
    name, times = type(scheduler).__name__, [float(t) for t in scheduler.timesteps]
    if not is_flow(scheduler) and getattr(scheduler, "num_inference_steps", None) is None:
        raise UserError(f"{name} has no timesteps; call its set_timesteps first")
    if name == "FlowMatchEulerDiscreteScheduler" and not scheduler.config.stochastic_sampling:
        sigmas = [float(s) for s in scheduler.sigmas]
        return list(pairwise(Prediction(1 - s, s, "flow") for s in sigmas))
    if name != "DDIMScheduler" or scheduler.config.clip_sample or scheduler.config.thresholding:
        raise UserError(
            f"the steps of this {name} cannot be taken backwards; use a DDIMScheduler without clip_sample and "
            "thresholding, or a FlowMatchEulerDiscreteScheduler"
        )
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = float(scheduler.final_alpha_cumprod)
    made = []
    for t in times:
        before = Prediction.at(scheduler, t)
        last = Prediction(final**0.5, (1 - final) ** 0.5, before.kind)
        made.append((before, Prediction.at(scheduler, t - stride) if t >= stride else last))
    return made
