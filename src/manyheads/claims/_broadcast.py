# SPDX-License-Identifier: Apache-2.0
"""What claim and benchmark of ``pab`` share: how near films are, what was computed, and diffusers' own PAB.

Attention modules of a Latte are of three kinds: ``spatial`` within a frame, ``temporal`` over frames, ``cross`` to the
text. How often each was run is counted at its query projection, which runs with it and with nothing else, so that
every implementation is counted the same way.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.models.scenes import ScenePipeline

__all__ = ["KINDS", "Every", "apart", "computed", "diffusers_pab", "flops", "kind_of", "psnr", "ssim"]

KINDS = ("spatial", "temporal", "cross")
Every = tuple[int, int, int]  # spatial, temporal and cross-attention are run at every n-th step


def kind_of(name: str) -> str:
    """The kind of a Latte's attention module, by its path."""
    if name.startswith("temporal_transformer_blocks"):
        return "temporal"
    return "cross" if name.endswith("attn2") else "spatial"


def _modules(model: Any) -> list[tuple[str, Any]]:
    return [(kind_of(name), module) for name, module in model.named_modules() if hasattr(module, "to_q")]


@contextmanager
def computed(model: Any) -> Iterator[Counter[str]]:
    """Count what attention modules are run inside, by kind, in queries: rows times tokens of every call."""
    counts: Counter[str] = Counter()
    handles = []
    for kind, module in _modules(model):

        def count(_: Any, given: tuple[Any, ...], __: Any, kind: str = kind) -> None:
            counts[kind] += given[0].shape[0] * given[0].shape[1]

        handles.append(module.to_q.register_forward_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def flops(pipe: "ScenePipeline", latents: "Tensor") -> dict[str, float]:
    """Multiply-adds times two of one forward for ``latents``: of attention by kind, and of the ``model`` as a whole."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from manyheads.models.scenes import predict

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


class _Halves:
    """A denoiser that is given the two halves of a batch one after the other, each under the name of its branch."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, return_dict: bool = False, **given: "Tensor") -> "tuple[Tensor]":
        import torch

        made = []
        for i, name in enumerate(("uncond", "cond")):
            half = {key: value.chunk(2)[i] for key, value in given.items()}
            with self.model.cache_context(name):
                made.append(self.model(**half, return_dict=return_dict)[0])
        return (torch.cat(made),)


def apart(pipe: "ScenePipeline") -> "ScenePipeline":
    """The same pipeline whose branches are calls of their own, as in most pipelines of diffusers."""
    from manyheads.models.scenes import ScenePipeline

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
    from diffusers import PyramidAttentionBroadcastConfig

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


def psnr(films: "Tensor", others: "Tensor") -> "Tensor":
    """Peak signal-to-noise ratio of films ``[N, 3, F, H, W]`` in 0..1, dB, float32 ``[N]``; infinite where equal."""
    return -10 * (films - others).double().square().flatten(1).mean(1).log10().float()


def ssim(films: "Tensor", others: "Tensor", window: int = 7) -> "Tensor":
    """Structural similarity (Wang et al. 2004) of films, windows of equal weights, mean over frames, ``[N]``."""
    import torch
    from torch.nn.functional import avg_pool2d

    a, b = (x.transpose(1, 2).flatten(0, 1).double() for x in (films, others))

    def mean(x: "Tensor") -> "Tensor":
        return avg_pool2d(x, window, 1)

    one, two = mean(a), mean(b)
    share = window**2 / (window**2 - 1)
    spread_a, spread_b = share * (mean(a * a) - one**2), share * (mean(b * b) - two**2)
    both = share * (mean(a * b) - one * two)
    first, second = 0.01**2, 0.03**2
    alike = (2 * one * two + first) * (2 * both + second)
    each = (alike / ((one**2 + two**2 + first) * (spread_a + spread_b + second))).flatten(1).mean(1)
    return torch.stack([frames.mean() for frames in each.split(films.shape[2])]).float()
