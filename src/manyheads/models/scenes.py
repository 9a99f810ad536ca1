# SPDX-License-Identifier: Apache-2.0
"""The image and video models that ship with the package, as a pipeline of diffusers.

``scenes``: an MMDiT (diffusers' SD3 class) of 32 x 32 pixels; ``unet``: a UNet of the same; ``moving``: a Latte of 8
frames of 16 x 16; ``moving3d``: a Wan of the same, whose attention is over all tokens of a video. All are made by
``recipes/scenes.py`` and told by three words, see :mod:`manyheads.data.scenes`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import ModelMixin  # by this name in this module diffusers knows what `Captions` is
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file
from torch import Generator, Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..data import scenes as data
from ..errors import UserError
from . import packed, placed
from .scene_sources import Sources, predict

__all__ = ["NAMES", "Captions", "SceneOutput", "ScenePipeline", "is_scene_pipeline", "load_scenes", "predict"]

_Model: Any = ModelMixin  # diffusers is not typed
_Config: Any = ConfigMixin
_Pipeline: Any = diffusers.DiffusionPipeline
_configured: Any = register_to_config

_DENOISERS = ("transformer", "unet")  # parts of a pipeline, one of which it has
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WHOLE = ("conv_in.weight", "conv_out.weight")  # of a UNet
NAMES: dict[str, str] = {
    "scenes": "MMDiT, 32 x 32", "unet": "UNet, 32 x 32", "moving": "Latte, 8 frames of 16 x 16",
    "moving3d": "Wan, 8 frames of 16 x 16",
}  # fmt: skip


class Captions(_Model, _Config):  # type: ignore[misc]
    """The text encoder: a vector for each word."""

    @_configured  # type: ignore[untyped-decorator]
    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` int64 ``[B, 3]`` -> ``[B, 3, dim]``."""
        vectors: Tensor = self.embed(tokens)
        return vectors


@dataclass(frozen=True, slots=True)
class SceneOutput:
    """What a pipeline made: ``images``, or ``frames`` of videos; one of the two, the other is None."""

    images: Any = None
    frames: Any = None


class ScenePipeline(Sources, _Pipeline):  # type: ignore[misc]
    """Scenes or videos from three words, with classifier-free guidance in one batch, unconditional rows first."""

    _optional_components: ClassVar[list[str]] = ["transformer", "unet"]

    def __init__(
        self, captions: Captions, scheduler: Any, transformer: Any = None, unet: Any = None, kind: str = "scenes",
        patch: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(captions=captions, scheduler=scheduler, transformer=transformer, unet=unet)
        self.register_to_config(kind=kind, patch=patch)
        self._guidance_scale = 1.0

    @property
    def guidance_scale(self) -> float:
        """Of the call at hand."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call at hand guides."""
        return self._guidance_scale > 1

    @property
    def denoiser(self) -> Any:
        """The transformer or the UNet."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def vocabulary(self) -> dict[str, tuple[str, ...]]:
        """The words it knows, by kind."""
        return data.VOCABULARY[self.config.kind]

    def words(self, prompt: str) -> list[str]:
        """The word that each token of a prompt stands for, empty where one is missing."""
        return [data.WORDS[token] for token in data.read_caption(prompt, self.config.kind)]

    def noise(self, count: int, generator: Generator | None = None) -> Tensor:
        """Latents to start from, ``[count, C, (F,) H, W]`` in the order that ``generator`` gives them."""
        side = data.WINDOW if self.config.kind == "moving" else data.SIDE
        shape = (3, data.FRAMES, side, side) if self.config.kind == "moving" else (3, side, side)
        device = self.denoiser.device
        at = device if generator is None else generator.device
        pixels = torch.randn(count, *shape, generator=generator, device=at).to(device, self.denoiser.dtype)
        return self._packed(pixels)

    def _packed(self, pixels: Tensor) -> Tensor:
        return pixel_unshuffle(pixels, self.config.patch) if self.config.patch > 1 else pixels

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | Tensor | None = None, *, num_inference_steps: int = 20,
        guidance_scale: float = 3.0, generator: Generator | None = None, latents: Tensor | None = None,
        num_images_per_prompt: int = 1, output_type: str = "pil", share: float = 1.0,
    ) -> SceneOutput:  # fmt: skip
        """Generate.

        Args:
            prompt: a caption, several, or their tokens int64 ``[B, 3]``; None for one image of anything.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance, 1 for none.
            generator: of the noise.
            latents: the noise itself, as :meth:`noise` gives it.
            num_images_per_prompt: how many of each caption, side by side.
            share: of the steps that is made, the last ones; ``latents`` are those where they begin.
            output_type: ``pil``, ``np`` (0..1, channels last) or ``pt`` (0..1, float32 ``[B, 3, (F,) H, W]``).
        """
        if num_inference_steps < 1:
            raise UserError(f"num_inference_steps is at least 1, not {num_inference_steps}")
        tokens = self._tokens(prompt).repeat_interleave(num_images_per_prompt, 0).to(self.denoiser.device)
        self._guidance_scale = guidance_scale if bool((tokens != 0).any()) else 1.0
        x = self.noise(len(tokens), generator) if latents is None else latents.to(self.denoiser.device)
        if len(x) != len(tokens):
            raise UserError(f"{len(x)} latents for {len(tokens)} images; give one of each")
        if self.do_classifier_free_guidance:
            tokens = torch.cat([torch.zeros_like(tokens), tokens])
        text = self.captions(tokens)
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        made = round(share * num_inference_steps)
        if not 1 <= made <= num_inference_steps:
            raise UserError(f"a share of {share:g} of {num_inference_steps} steps is none of them")
        for t in self.progress_bar(self.scheduler.timesteps[num_inference_steps - made :]):
            twice = torch.cat([x, x]) if self.do_classifier_free_guidance else x
            out = predict(self.denoiser, twice, t, text)
            if self.do_classifier_free_guidance:
                uncond, cond = out.chunk(2)
                out = uncond + self._guidance_scale * (cond - uncond)
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        pixels = pixel_shuffle(x, self.config.patch) if self.config.patch > 1 else x
        return self._output((pixels.float() / 2 + 0.5).clamp(0, 1), output_type)

    def _tokens(self, prompt: str | list[str] | Tensor | None) -> Tensor:
        if isinstance(prompt, Tensor):
            return prompt
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else prompt
        return torch.tensor([data.read_caption(text, self.config.kind) for text in prompts])

    def _output(self, pixels: Tensor, output_type: str) -> SceneOutput:
        videos = pixels.ndim == 5
        made: Any = pixels
        if output_type != "pt":
            made = pixels.movedim(1, -1).cpu().numpy()
        if output_type == "pil":
            whole = (made * 255).round().astype("uint8")
            made = [[Image.fromarray(f) for f in each] if videos else Image.fromarray(each) for each in whole]
        return SceneOutput(frames=made) if videos else SceneOutput(images=made)


def is_scene_pipeline(folder: Path) -> bool:
    """Whether ``folder`` holds a saved :class:`ScenePipeline`."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("_class_name") == "ScenePipeline"


def load_scenes(
    name_or_path: str | Path = "scenes", device: "str | torch.device" = "cpu", dtype: torch.dtype | None = None
) -> ScenePipeline:
    """Load a shipped model by its name, or a folder that ``recipes/scenes.py`` wrote.

    Args:
        name_or_path: one of ``NAMES``, or a folder.
        device: where it runs.
        dtype: float32 when not given; these models are small.

    Raises:
        UserError: there is no such model.
    """
    place, _ = placed(device, dtype)
    shipped = Path(__file__).parent / "pipelines" / str(name_or_path)
    folder = shipped if name_or_path in NAMES else Path(name_or_path).expanduser()
    if not is_scene_pipeline(folder):
        raise UserError(
            f"{name_or_path} is no model of scenes; give {', '.join(NAMES)}, or a folder that `python -m "
            "manyheads.recipes.scenes` wrote"
        )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of loading three small parts
    kind = dtype or torch.float32
    try:
        pipe: ScenePipeline = ScenePipeline.from_pretrained(
            str(folder), **_denoiser_parts(folder, kind), dtype=kind, low_cpu_mem_usage=False, use_safetensors=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(place)
    return pipe


def _denoiser_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The denoiser of a saved pipeline; packed or not, since diffusers would load some classes by accelerate only."""
    index, found = json.loads((folder / "model_index.json").read_text(encoding="utf-8")), {}
    for part in _DENOISERS:
        is_packed, plain = (folder / part / packed.FILE).is_file(), folder / part / _WEIGHTS
        if is_packed or plain.is_file():
            kind = getattr(diffusers, index[part][1])
            made = kind.from_config(kind.load_config(str(folder / part)))
            if is_packed:
                made = packed.load_into(made, folder / part, torch.float32)
            else:
                made.load_state_dict(load_file(plain))
            found[part] = (made if dtype == torch.float32 else made.to(dtype)).eval()
    return found


def save(pipe: ScenePipeline, folder: Path) -> None:
    """Write the pipeline, its denoiser in 8 bits; :func:`load_scenes` reads it.

    A UNet's first and last convolution, a hundredth of it, stay whole: with the last one rounded the shipped one makes
    other pictures (27 dB from its own, and with all others rounded 42).
    """
    pipe.save_pretrained(folder)
    for part in _DENOISERS:
        plain = folder / part / _WEIGHTS
        if plain.is_file():
            packed.save(pipe.denoiser, folder / part, whole=_WHOLE)
            plain.unlink()


def build(kind: str, **changes: Any) -> ScenePipeline:
    """An untrained pipeline of the shape of a shipped one.

    Args:
        kind: one of ``NAMES``.
        changes: of the denoiser's configuration.
    """
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "scenes": (
            "SD3Transformer2DModel",
            {
                "sample_size": 32, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 6,
                "attention_head_dim": 16, "num_attention_heads": 6, "joint_attention_dim": 64,
                "caption_projection_dim": 96, "pooled_projection_dim": 64, "pos_embed_max_size": 8,
            },
        ),
        "unet": (
            "UNet2DConditionModel",
            {
                "sample_size": 16, "in_channels": 12, "out_channels": 12, "block_out_channels": (48, 64),
                "layers_per_block": 1, "cross_attention_dim": 64, "norm_num_groups": 8,
                "attention_head_dim": 4,  # by which diffusers means four heads
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            },
        ),
        "moving": (
            "LatteTransformer3DModel",
            {
                "sample_size": 16, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 4,
                "num_attention_heads": 4, "attention_head_dim": 24, "cross_attention_dim": 96, "caption_channels": 64,
                "video_length": data.FRAMES, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
                "num_embeds_ada_norm": 1000, "activation_fn": "gelu-approximate", "attention_bias": True,
            },
        ),
        "moving3d": (
            "WanTransformer3DModel",
            {
                "patch_size": (1, 2, 2), "in_channels": 3, "out_channels": 3, "num_layers": 4, "num_attention_heads": 3,
                "attention_head_dim": 32, "ffn_dim": 384, "text_dim": 64, "freq_dim": 64, "rope_max_seq_len": 64,
            },
        ),
    }  # fmt: skip
    name, config = shapes[kind]
    denoiser = getattr(diffusers, name)(**{**config, **changes})
    captions = Captions(len(data.WORDS), 64)
    if kind == "unet":
        scheduler: Any = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        return ScenePipeline(captions, scheduler, unet=denoiser, kind="scenes", patch=2)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    return ScenePipeline(captions, flow, transformer=denoiser, kind=kind.removesuffix("3d"))
