# SPDX-License-Identifier: Apache-2.0
"""Tiny random denoisers of diffusers' own classes, and inputs for them."""

from typing import Any

import torch
from torch import Tensor

_T2D: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {**_T2D, "in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2, "num_embeds_ada_norm": 10},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_T2D, "in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2, "cross_attention_dim": 16,
            "caption_channels": 12, "use_additional_conditions": False,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_T2D, "in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2, "caption_projection_dim": 16,
            "joint_attention_dim": 12, "pooled_projection_dim": 10, "pos_embed_max_size": 8,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
            "axes_dims_rope": [4, 4, 8],
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "time_embed_dim": 8, "text_embed_dim": 12, "num_layers": 2, "sample_width": 8, "sample_height": 8,
            "sample_frames": 9, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6,
        },
    ),
    "latte": (
        "LatteTransformer3DModel",
        {
            **_T2D, "in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2, "cross_attention_dim": 16,
            "caption_channels": 12, "video_length": 3, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
            "cross_attention_dim": 24, "num_layers": 2, "caption_channels": 12,
        },
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 12,
            "pooled_projection_dim": 10, "guidance_embeds": True, "rope_axes_dim": (2, 4, 4),
        },
    ),
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
            "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
}  # fmt: skip
ALL = tuple(CONFIGS)
JOINT = ("sd3", "flux", "cogvideox", "hunyuan")
_built: dict[str, Any] = {}


def build(name: str, **changes: Any) -> Any:
    """A fresh model, the same weights every time, with the zero-initialised gates of its blocks set at random."""
    import diffusers

    kind, config = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, kind)(**{**config, **changes}).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny(name: str) -> Any:
    if name not in _built:
        _built[name] = build(name)
    return _built[name]


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """What the forward takes: 8 x 8 latents, 3 frames where there are frames, 6 text tokens."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=source)

    time = torch.full((batch,), 500)
    text, mask = draw(6, 12), torch.ones(batch, 6)
    mask[-1, 4:] = 0
    image, video = draw(4, 8, 8), draw(4, 3, 8, 8)
    made: dict[str, dict[str, Any]] = {
        "dit": {"hidden_states": image, "timestep": time, "class_labels": torch.arange(batch)},
        "pixart": {
            "hidden_states": image, "timestep": time, "encoder_hidden_states": text, "encoder_attention_mask": mask,
        },
        "sd3": {
            "hidden_states": image, "timestep": time, "encoder_hidden_states": text, "pooled_projections": draw(10),
        },
        "flux": {
            "hidden_states": draw(16, 4), "timestep": time / 1000, "encoder_hidden_states": text,
            "pooled_projections": draw(10), "txt_ids": torch.zeros(6, 3),
            "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1),
        },
        "wan": {"hidden_states": video, "timestep": time, "encoder_hidden_states": text},
        "cogvideox": {"hidden_states": draw(3, 4, 8, 8), "timestep": time, "encoder_hidden_states": text},
        "latte": {"hidden_states": video, "timestep": time, "encoder_hidden_states": text},
        "ltx": {
            "hidden_states": draw(48, 4), "timestep": time, "encoder_hidden_states": text,
            "encoder_attention_mask": mask, "num_frames": 3, "height": 4, "width": 4,
        },
        "hunyuan": {
            "hidden_states": video, "timestep": time, "encoder_hidden_states": text, "encoder_attention_mask": mask,
            "pooled_projections": draw(10), "guidance": torch.full((batch,), 6000.0),
        },
        "unet": {"sample": image, "timestep": time, "encoder_hidden_states": text},
    }  # fmt: skip
    return made[name]


def forward(name: str, model: Any, **changes: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**{**inputs(name), **changes}, return_dict=False)[0]
    return out
