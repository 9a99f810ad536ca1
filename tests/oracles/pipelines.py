# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines of diffusers around the tiny denoisers: branches in one batch, one after the other, and none."""

import inspect
from typing import Any

import torch
from torch import Tensor

from oracles import diffusion as tiny


def _vae() -> Any:
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8)


def dit() -> Any:
    """Class-conditional, [cond, uncond] in one batch."""
    import diffusers

    return _quiet(diffusers.DiTPipeline(tiny.build("dit", num_embeds_ada_norm=1000), _vae(), diffusers.DDIMScheduler()))


def pixart() -> Any:
    """Text by cross-attention, [uncond, cond] in one batch."""
    import diffusers

    model = tiny.build("pixart")
    return _quiet(diffusers.PixArtAlphaPipeline(None, None, _vae(), model, diffusers.DDIMScheduler()))


def wan() -> Any:
    """Video with flow matching, cond and uncond as calls of their own."""
    import diffusers

    return _quiet(
        diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), tiny.build("wan"))
    )


def sd(kind: str = "StableDiffusionPipeline", scheduler: Any = None, **more: Any) -> Any:
    """A UNet, [uncond, cond] in one batch; ``kind`` is any of its pipelines."""
    import diffusers

    cls = getattr(diffusers, kind)
    parts = {
        "vae": _vae(), "unet": tiny.build("unet"), "text_encoder": None, "tokenizer": None, "safety_checker": None,
        "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False,
        "scheduler": scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }  # fmt: skip
    takes = inspect.signature(cls.__init__).parameters
    return _quiet(cls(**{name: part for name, part in parts.items() if name in takes}, **more))


def sd3() -> Any:
    """Joint attention, [uncond, cond] in one batch; a further call where layers are skipped for its own guidance."""
    import diffusers

    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    return _quiet(
        diffusers.StableDiffusion3Pipeline(transformer=tiny.build("sd3"), scheduler=flow, vae=_vae(), **parts)
    )


def conditions(rows: int = 2, pooled: bool = False) -> dict[str, Tensor]:
    """Embeddings of prompts and negative prompts, and noise, for the pipelines of a UNet and of SD3."""
    source = torch.Generator().manual_seed(0)
    names = {"prompt_embeds": (6, 12), "negative_prompt_embeds": (6, 12), "latents": (4, 8, 8)}
    names |= {"pooled_prompt_embeds": (10,), "negative_pooled_prompt_embeds": (10,)} if pooled else {}
    return {name: torch.randn(rows, *shape, generator=source) for name, shape in names.items()}


def row_of(given: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of what :func:`conditions` gives."""
    return {name: x[row : row + 1] for name, x in given.items()}


def run_sd(pipe: Any, given: dict[str, Tensor] | None = None, steps: int = 4, **more: Any) -> Tensor:
    made = pipe(
        **{
            **(conditions() if given is None else given), "height": 8, "width": 8, "num_inference_steps": steps,
            "guidance_scale": 4.0, "output_type": "latent", **more,
        }
    )  # fmt: skip
    return made.images


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_dit(pipe: Any, guidance: float = 4.0, steps: int = 4) -> Tensor:
    made = pipe(
        [1, 2], guidance_scale=guidance, num_inference_steps=steps, generator=torch.Generator().manual_seed(1),
        output_type="np",
    )  # fmt: skip
    return torch.from_numpy(made.images)


def run_pixart(
    pipe: Any, guidance: float = 4.0, steps: int = 4, same: bool = False, noise: Tensor | None = None
) -> Tensor:
    """Two rows: a source and its target, from the same noise; ``same`` gives both one prompt."""
    source = torch.Generator().manual_seed(0)
    text, empty = torch.randn(2, 6, 12, generator=source), torch.randn(1, 6, 12, generator=source).expand(2, -1, -1)
    noise = torch.randn(1, 4, 8, 8, generator=source).expand(2, -1, -1, -1) if noise is None else noise
    mask = torch.ones(2, 6)
    made = pipe(
        prompt=None, negative_prompt=None, prompt_embeds=text[:1].expand(2, -1, -1) if same else text,
        prompt_attention_mask=mask, negative_prompt_embeds=empty, negative_prompt_attention_mask=mask, height=8,
        width=8, num_inference_steps=steps, guidance_scale=guidance, output_type="latent", latents=noise.clone(),
        use_resolution_binning=False,
    )  # fmt: skip
    return made.images


def run_wan(pipe: Any, guidance: float = 4.0, steps: int = 4) -> Tensor:
    source = torch.Generator().manual_seed(0)
    text = torch.randn(2, 1, 6, 12, generator=source)
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=64, width=64, num_frames=9,
        num_inference_steps=steps, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip


RUNS = {"dit": (dit, run_dit), "pixart": (pixart, run_pixart), "wan": (wan, run_wan)}
