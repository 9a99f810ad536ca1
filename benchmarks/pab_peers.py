# SPDX-License-Identifier: Apache-2.0
"""What PAB stands beside: diffusers' own, a pipeline whose branches are separate calls, and the FLOPs of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import PyramidAttentionBroadcastConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from manyheads.models.scenes import ScenePipeline, predict
from manyheads.tasks.diffusion.denoising_cost import KINDS, kind_of

Every = tuple[int, int, int]  # spatial, temporal and cross-attention are run at every n-th step


class _Halves:
    """A denoiser that is given the two halves of a batch one after the other, each under the name of its branch."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, return_dict: bool = False, **given: Tensor) -> tuple[Tensor]:
        made = []
        for i, name in enumerate(("uncond", "cond")):
            half = {key: value.chunk(2)[i] for key, value in given.items()}
            with self.model.cache_context(name):
                made.append(self.model(**half, return_dict=return_dict)[0])
        return (torch.cat(made),)


def apart(pipe: ScenePipeline) -> ScenePipeline:
    """The same pipeline whose branches are calls of their own, as in most pipelines of diffusers."""

    class Apart(ScenePipeline):
        @property
        def denoiser(self) -> Any:
            return _Halves(self.transformer)

    made = Apart(**pipe.components, kind=pipe.config.kind, patch=pipe.config.patch)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def diffusers_pab(pipe: Any, every: Every, upper: float, lower: float, named: bool = True) -> Iterator[None]:
    """Diffusers' own Pyramid Attention Broadcast, at work inside.

    Args:
        pipe: a pipeline with a Latte; begin a run inside only once.
        every, upper, lower: as for ``pab``.
        named: tell it which blocks are spatial. By default it takes those of its temporal blocks for spatial ones too,
            since it looks for "blocks" anywhere in their names, and runs them at the spatial interval.
    """
    at = {"timestep": 0.0}

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        at["timestep"] = float(given["timestep"].max())

    spatial, temporal, cross = every
    within = (lower, upper)
    names = {"spatial_attention_block_identifiers": ("^transformer_blocks",)} if named else {}
    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=spatial, temporal_attention_block_skip_range=temporal,
            cross_attention_block_skip_range=cross, spatial_attention_timestep_skip_range=within,
            temporal_attention_timestep_skip_range=within, cross_attention_timestep_skip_range=within,
            current_timestep_callback=lambda: at["timestep"], **names,
        )
    )  # fmt: skip
    try:
        yield
    finally:
        pipe.transformer.disable_cache()
        handle.remove()


def flops(pipe: Any, latents: Tensor) -> dict[str, float]:
    """Multiply-adds times two of one forward for ``latents``: of attention by kind, and of the ``model`` as a whole."""
    text = pipe.captions(torch.zeros(len(latents), 3, dtype=torch.long, device=latents.device))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict(pipe.transformer, latents, torch.tensor(500.0, device=latents.device), text)
    found: dict[str, float] = dict.fromkeys((*KINDS, "model"), 0.0)
    for name, by_operator in counter.get_flop_counts().items():
        path = name.partition(".")[2]
        if path.endswith(("attn1", "attn2")):
            found[kind_of(path)] += sum(by_operator.values())
        elif name == "Global":
            found["model"] = float(sum(by_operator.values()))
    return found
