# SPDX-License-Identifier: Apache-2.0
"""Caches that diffusers has, each with one knob, to stand beside a strategy on the same pipeline and schedule.

FirstBlockCache, TaylorSeer, FasterCache and MagCache skip whole blocks or modules at steps at which little changes.
They are compared at an equal cost, so each is given as a knob from careful to daring; everything else is diffusers'
default, and nothing is cached in the first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .diffusers import denoisers

__all__ = ["KNOBS", "diffusers_cache", "magnitude_ratios"]

_MODULES = r".*blocks\.\d+\.(attn\d?|ffn?)"  # by default TaylorSeer (0.42) finds no module of Wan
KNOBS: dict[str, tuple[float, ...]] = {
    "first_block": (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2),  # threshold
    "taylorseer": (2, 3, 4, 5, 6),  # steps from one computation to the next
    "fastercache": (2, 3, 4, 6),  # likewise, of attention and of the unconditional branch
    "magcache": (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2),  # threshold
}


@contextmanager
def diffusers_cache(
    pipe: Any, name: str, knob: float, steps: int, ratios: Sequence[float] | None = None
) -> Iterator[None]:
    """One of diffusers' caches at work on the denoiser of a pipeline; make one run inside, and open it anew for others.

    Args:
        pipe: a pipeline whose denoiser takes diffusers' caches; FasterCache wants both branches in one batch.
        name: one of ``KNOBS``.
        knob: see there; a number of steps or a threshold.
        steps: of the run.
        ratios: for MagCache, as :func:`magnitude_ratios` measures them.

    Raises:
        UserError: another name, or a denoiser without caches.
    """
    import diffusers

    model: Any = denoisers(pipe)[0][1]
    if name not in KNOBS or not hasattr(model, "enable_cache"):
        raise UserError(f"{type(model).__name__} takes no cache {name!r}; there are {', '.join(KNOBS)}")
    at = {"timestep": 1000.0}

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        at["timestep"] = float(torch.as_tensor(given["timestep"]).max())

    make: dict[str, Callable[[], Any]] = {
        "first_block": lambda: diffusers.FirstBlockCacheConfig(threshold=knob),
        "taylorseer": lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=int(knob), taylor_factors_dtype=torch.float32, cache_identifiers=[_MODULES]
        ),
        "fastercache": lambda: diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=int(knob), unconditional_batch_skip_range=int(knob),
            current_timestep_callback=lambda: at["timestep"], tensor_format="BCFHW",
            attention_weight_callback=lambda _: 0.5,  # the default, which is warned of
        ),
        "magcache": lambda: diffusers.MagCacheConfig(
            threshold=knob, num_inference_steps=steps, mag_ratios=list(ratios or ()) or None
        ),
    }  # fmt: skip
    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.enable_cache(make[name]())
        with model.cache_context("run"):
            yield
    finally:
        handle.remove()
        if model.is_cache_enabled:
            model.disable_cache()


def magnitude_ratios(pipe: Any, run: Callable[[], object]) -> list[float]:
    """What MagCache has to know of a model: by how much the size of what its blocks add changes from step to step.

    Measured as MagCache's own calibration does, as the mean over tokens of the ratio of norms, without its hooks.

    Args:
        pipe: a pipeline whose denoiser has its blocks in ``blocks`` or ``transformer_blocks``.
        run: makes one run of it.
    """
    model: Any = denoisers(pipe)[0][1]
    blocks = getattr(model, "blocks", None) or model.transformer_blocks
    first: list[Tensor] = []
    ratios: list[float] = []
    before: list[Tensor] = []

    def enter(_: Any, given: tuple[Any, ...]) -> None:
        first[:] = [given[0].detach()]

    def leave(_: Any, __: Any, out: Any) -> None:
        added = (out[0] if isinstance(out, tuple) else out).detach() - first[0]
        ratio = (added.norm(dim=-1) / before[0].norm(dim=-1).clamp(min=1e-8)).mean().item() if before else 1.0
        ratios.append(ratio if math.isfinite(ratio) else 1.0)
        before[:] = [added]

    handles = [blocks[0].register_forward_pre_hook(enter), blocks[-1].register_forward_hook(leave)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return ratios
