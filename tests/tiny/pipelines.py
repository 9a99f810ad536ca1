# SPDX-License-Identifier: Apache-2.0
"""Tiny untrained pipelines, saved to folders: told by words, by text, by a class, and one of films."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)  # fmt: skip
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from manyheads.cli import main
from manyheads.models.scenes import build, load_scenes
from oracles import diffusion as tiny

ALPHABET = [chr(n) for n in range(ord("a"), ord("z") + 1)]


def lively(model):
    """Weights that are nowhere zero, so that attention and text count."""
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.06)


def vae():
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, sample_size=8)


def text_pipeline(place):
    words = [*ALPHABET, *(f"{a}</w>" for a in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
    (place / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(place, model_max_length=32)
    return StableDiffusionPipeline(
        vae(), encoder, tokenizer, unet, DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    made = {
        "scenes": build("scenes", num_layers=2),
        "unet": build("unet", block_out_channels=(16, 16)),
        "moving": build("moving", num_layers=1),
        "dit": DiTPipeline(tiny.build("dit", num_embeds_ada_norm=1000), vae(), DDIMScheduler()),
        "text": text_pipeline(place),
        "anything": DDIMPipeline(
            UNet2DModel(
                sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
                down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            ),
            DDIMScheduler(),
        ),
    }  # fmt: skip
    for name, pipe in made.items():
        lively(pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer)
        pipe.save_pretrained(place / name)
    index = json.loads((place / "dit" / "model_index.json").read_text())
    labels = {"id2label": {"1": "cat, kitten", "2": "dog"}}  # as DiT's published folders have them
    (place / "dit" / "model_index.json").write_text(json.dumps(index | labels))
    return {name: place / name for name in made}


@pytest.fixture(scope="session")
def scenes(folders):
    return load_scenes(folders["scenes"])


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run
