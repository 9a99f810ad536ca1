# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines of diffusers around the tiny denoisers, each beside the classic pipeline that does the same."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oracles import diffusion as tiny

SCALE = 4.0
_source = torch.Generator().manual_seed(0)
TEXT = torch.randn(2, 2, 6, 12, generator=_source)  # conditional, then unconditional
POOLED = torch.randn(2, 2, 10, generator=_source)
IMAGE = torch.randn(1, 4, 8, 8, generator=_source).expand(2, -1, -1, -1)  # two rows from the same noise
VIDEO = torch.randn(1, 4, 3, 8, 8, generator=_source).expand(2, -1, -1, -1, -1)


@dataclass(frozen=True)
class Pair:
    """Two pipelines of one model: how they are made, and run for some steps."""

    modular: Callable[..., Any]
    run_modular: Callable[..., Tensor]
    classic: Callable[[], Any]
    run_classic: Callable[..., Tensor]


def _pipeline(kind: str, blocks: dict[str, Any], guider: Any, **components: Any) -> Any:
    import diffusers
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
    from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks

    pipe = getattr(diffusers, kind)(blocks=SequentialPipelineBlocks.from_blocks_dict(blocks))
    guider = ClassifierFreeGuidance(guidance_scale=SCALE) if guider is None else guider
    pipe.update_components(guider=guider, **components)
    return _quiet(pipe)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _flow() -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler()


def wan(guider: Any = None) -> Any:
    """Video: the classic pipeline makes two calls too."""
    from diffusers.modular_pipelines.wan import before_denoise, denoise

    blocks = {
        "input": before_denoise.WanTextInputStep(), "timesteps": before_denoise.WanSetTimestepsStep(),
        "denoise": denoise.WanDenoiseStep(),
    }  # fmt: skip
    return _pipeline("WanModularPipeline", blocks, guider, transformer=tiny.build("wan"), scheduler=_flow())


def run_wan(pipe: Any, steps: int = 4) -> Tensor:
    return pipe(
        prompt_embeds=TEXT[0], negative_prompt_embeds=TEXT[1], latents=VIDEO.clone(), num_inference_steps=steps,
        output="latents",
    )  # fmt: skip


def classic_wan() -> Any:
    import diffusers

    return _quiet(diffusers.WanPipeline(None, None, None, _flow(), tiny.build("wan")))


def run_classic_wan(pipe: Any, steps: int = 4, **more: Any) -> Tensor:
    return pipe(
        prompt_embeds=TEXT[0], negative_prompt_embeds=TEXT[1], latents=VIDEO.clone(), height=64, width=64, num_frames=9,
        num_inference_steps=steps, guidance_scale=SCALE, output_type="latent", **more,
    ).frames  # fmt: skip


def wan22() -> Any:
    """Two denoisers, the second for the lower half of the noise, each with a guider of its own."""
    from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
    from diffusers.modular_pipelines.wan import before_denoise, denoise

    blocks = {
        "input": before_denoise.WanTextInputStep(), "timesteps": before_denoise.WanSetTimestepsStep(),
        "denoise": denoise.Wan22DenoiseStep(),
    }  # fmt: skip
    return _pipeline(
        "WanModularPipeline", blocks, None, transformer=tiny.build("wan"), transformer_2=tiny.build("wan"),
        scheduler=_flow(), guider_2=ClassifierFreeGuidance(guidance_scale=2.0), boundary_ratio=0.5,
    )  # fmt: skip


def classic_wan22() -> Any:
    import diffusers

    return _quiet(
        diffusers.WanPipeline(None, None, None, _flow(), tiny.build("wan"), tiny.build("wan"), boundary_ratio=0.5)
    )


def run_classic_wan22(pipe: Any, steps: int = 4) -> Tensor:
    return run_classic_wan(pipe, steps, guidance_scale_2=2.0)


def sd3(guider: Any = None) -> Any:
    """Images by joint attention: the classic pipeline puts both branches in one batch."""
    from diffusers.modular_pipelines.stable_diffusion_3 import before_denoise, denoise

    blocks = {
        "timesteps": before_denoise.StableDiffusion3SetTimestepsStep(),
        "denoise": denoise.StableDiffusion3DenoiseStep(),
    }
    model = tiny.build("sd3").double()
    return _pipeline("StableDiffusion3ModularPipeline", blocks, guider, transformer=model, scheduler=_flow())


def _conditions() -> dict[str, Tensor]:
    return {
        "prompt_embeds": TEXT[0].double(), "negative_prompt_embeds": TEXT[1].double(),
        "pooled_prompt_embeds": POOLED[0].double(), "negative_pooled_prompt_embeds": POOLED[1].double(),
    }  # fmt: skip


def run_sd3(pipe: Any, steps: int = 4) -> Tensor:
    return pipe(
        **_conditions(), latents=IMAGE.double(), num_inference_steps=steps, height=64, width=64, output="latents"
    )


def classic_sd3() -> Any:
    import diffusers

    model = tiny.build("sd3").double()
    return _quiet(diffusers.StableDiffusion3Pipeline(model, _flow(), None, None, None, None, None, None, None, None))


def run_classic(pipe: Any, steps: int = 4) -> Tensor:
    return pipe(
        **_conditions(), latents=IMAGE.double(), num_inference_steps=steps, height=64, width=64, guidance_scale=SCALE,
        output_type="latent",
    ).images  # fmt: skip


def _unet() -> Any:
    more = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 10}
    return tiny.build("unet", addition_embed_type="text_time", **more).double()


def _ddim() -> Any:
    import diffusers

    return diffusers.DDIMScheduler(clip_sample=False)


def sdxl(guider: Any = None) -> Any:
    """A UNet: the classic pipeline puts both branches in one batch, and some conditions in a dictionary."""
    from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise, denoise

    blocks = {
        "timesteps": before_denoise.StableDiffusionXLSetTimestepsStep(),
        "denoise": denoise.StableDiffusionXLDenoiseStep(),
    }
    return _pipeline("StableDiffusionXLModularPipeline", blocks, guider, unet=_unet(), scheduler=_ddim())


def run_sdxl(pipe: Any, steps: int = 4) -> Tensor:
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2).double()
    return pipe(
        denoiser_input_fields={**_conditions(), "add_time_ids": size, "negative_add_time_ids": size}, eta=0.0,
        latents=IMAGE.double(), num_inference_steps=steps, output="latents",
    )  # fmt: skip


def classic_sdxl() -> Any:
    import diffusers

    return _quiet(
        diffusers.StableDiffusionXLPipeline(
            None, None, None, None, None, _unet(), _ddim(), force_zeros_for_empty_prompt=False, add_watermarker=False
        )
    )


PAIRS = {
    "wan": Pair(wan, run_wan, classic_wan, run_classic_wan),
    "wan22": Pair(wan22, run_wan, classic_wan22, run_classic_wan22),
    "sd3": Pair(sd3, run_sd3, classic_sd3, run_classic),
    "sdxl": Pair(sdxl, run_sdxl, classic_sdxl, run_classic),
}
