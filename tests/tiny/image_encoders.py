# SPDX-License-Identifier: Apache-2.0
"""Tiny random encoders of images and videos, unmodified classes of transformers, and images for them; float64."""

import torch
import transformers
from torch import Tensor, nn

NAMES = ("vit", "dinov2", "segformer")
_VIT = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 2, "initializer_range": 0.5,
}  # fmt: skip


def build(name: str, seed: int = 0, attn: str = "sdpa") -> nn.Module:
    """The encoder of that name; two heads, four layers, SegFormer of two layers in each of two stages."""
    torch.manual_seed(seed)
    if name == "vit":
        model: nn.Module = transformers.ViTModel(
            transformers.ViTConfig(intermediate_size=24, image_size=16, attn_implementation=attn, **_VIT)
        )
    elif name == "dinov2":
        config = transformers.Dinov2Config(mlp_ratio=2, image_size=16, attn_implementation=attn, **_VIT)
        model = transformers.Dinov2Model(config)
    else:
        config = transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
            strides=[1, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=3,
            initializer_range=0.5, attn_implementation=attn,
        )  # fmt: skip
        model = transformers.SegformerForSemanticSegmentation(config)
    return model.double().eval()


def images(batch: int = 2, height: int = 16, width: int = 16, seed: int = 1) -> Tensor:
    """Smooth at the left, noise at the right: some patches are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    x[..., : width // 2] = x[..., :1].mean(2, keepdim=True) + 0.01 * x[..., : width // 2]
    return x


def video(seed: int = 0) -> nn.Module:
    """A ViViT of two heads and four layers, which reads four pairs of frames of 4 x 4 patches."""
    torch.manual_seed(seed)
    shape = {name: size for name, size in _VIT.items() if name != "patch_size"}
    config = transformers.VivitConfig(intermediate_size=24, image_size=8, num_frames=8, tubelet_size=[2, 2, 2], **shape)
    return transformers.VivitModel(config).double().eval()


def videos(batch: int = 2, seed: int = 1) -> Tensor:
    """Noise ``[B, 8, 3, 8, 8]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, 3, 8, 8, generator=generator, dtype=torch.float64)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives, last hidden states or logits."""
    out = model(pixel_values=x)
    found: Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
    return found
