# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that read images, prompts for them, and their decoder written out in float64."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, VOCAB, PATCH = 59, 58, 60, 2
_TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
_TOWER = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16,
}  # fmt: skip


def llava(seed: int = 0, decoder: type = transformers.LlamaConfig, **text: object):
    """LLaVA of a DINOv2 tower and a Llama decoder, or another, in float64."""
    torch.manual_seed(seed)
    tower = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=PATCH, image_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=decoder(**_TEXT | text), image_token_index=IMAGE,
        vision_feature_layer=-1, initializer_range=0.3,
    )  # fmt: skip
    return _spread(transformers.LlavaForConditionalGeneration(config))


def qwen(seed: int = 0):
    """Qwen2-VL, in float64."""
    torch.manual_seed(seed)
    config = transformers.Qwen2VLConfig(
        text_config={
            **_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 1, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3,
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=57, vision_end_token_id=56,
    )  # fmt: skip
    return _spread(transformers.Qwen2VLForConditionalGeneration(config))


def smolvlm():
    """SmolVLM, whose image of 16 pixels is four tokens, in float64."""
    tower = {**_TOWER, "patch_size": 4}
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config=tower, scale_factor=2, image_token_id=IMAGE,
        pad_token_id=0,
    )  # fmt: skip
    return _spread(transformers.SmolVLMForConditionalGeneration(config))


def internvl():
    """InternVL, whose image of 16 pixels is sixteen tokens, in float64."""
    tower = {**_TOWER, "image_size": [16, 16], "patch_size": [2, 2]}
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **_TEXT}, vision_config=tower, image_token_id=IMAGE, downsample_ratio=0.5
    )
    return _spread(transformers.InternVLForConditionalGeneration(config))


def _spread(model):
    """Weights of a size at which attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def prompt(*parts: int | tuple[int, int]) -> list[int]:
    """Token ids: a number stands for so many words, a pair for an image of so many patches."""
    ids: list[int] = []
    for part in parts:
        more = (
            [IMAGE] * (part[0] * part[1])
            if isinstance(part, tuple)
            else [3 + (7 * len(ids) + i) % 50 for i in range(part)]
        )
        ids += more
    return ids


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of rows that are padded in front."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def pixels(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images of so many patches, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height * PATCH, width * PATCH, generator=generator, dtype=torch.float64)


def dense(model, ids: Sequence[int], images: Tensor | None, positions: Sequence[float], allowed: Tensor) -> Tensor:
    """Logits ``[T, vocab]`` of one row by the formula of the decoder, at these positions under this mask ``[T, T]``."""
    inner, decoder = model.model, model.model.language_model
    x = decoder.embed_tokens(torch.tensor(ids))
    if images is not None:
        x = x.clone()
        x[torch.tensor(ids) == IMAGE] = torch.cat(list(inner.get_image_features(images).pooler_output))
    heads = decoder.config.num_attention_heads
    dim = x.shape[1] // heads
    base = 1e4 ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.tensor(positions, dtype=torch.float32)[:, None] * base  # the model's tables are float32
    cos, sin = (torch.cat([f(angles)] * 2, 1).double() for f in (torch.cos, torch.sin))

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + decoder.config.rms_norm_eps).rsqrt() * weight

    def turned(x):
        return x * cos + torch.cat([-x[:, dim // 2 :], x[:, : dim // 2]], 1) * sin

    for layer in decoder.layers:
        h, attention = norm(x, layer.input_layernorm.weight), layer.self_attn
        k, v = turned(attention.k_proj(h)), attention.v_proj(h)
        out = []
        for head in attention.q_proj(h).split(dim, 1):
            scores = (turned(head) @ k.T / dim**0.5).masked_fill(~allowed, -torch.inf)
            out.append(scores.softmax(1) @ v)
        x = x + attention.o_proj(torch.cat(out, 1))
        h, mlp = norm(x, layer.post_attention_layernorm.weight), layer.mlp
        x = x + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return model.lm_head(norm(x, decoder.norm.weight))
