# SPDX-License-Identifier: Apache-2.0
"""Small vision-language models: a vision tower and a decoder that a projector joins, in transformers' LLaVA classes.

``small`` is made from scratch, of linear patch embeddings and a few Llama layers. ``join`` takes two published models
as they are, DINOv2 and SmolLM2, and a new projector between them; only what was trained is saved, beside the names of
the two. ``python -m manyheads.recipes.joined_vlm`` trains one; :func:`load` reads it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.visual_questions import WORDS, Language, Questions
from ..errors import UserError
from ..files import write_atomically
from . import load as load_decoder
from . import load_vision, placed
from .saliency import normalised

__all__ = ["TEXT", "TOWER", "JoinedVLM", "Text", "join", "load", "new_projector", "save", "small"]

TOWER, TEXT = "dinov2-small", "smollm2-135m-instruct"
_ABOUT, _WEIGHTS = "joined.json", "joined.safetensors"
_IMAGE_TOKEN = "<empty_output>"  # one of SmolLM2's that no text has
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Text(Protocol):
    """Token ids ``[N, T]`` among which images stand, which of them are no padding, and the images in -1..1."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def real(self) -> Tensor: ...

    @property
    def images(self) -> Tensor: ...


@dataclass(frozen=True)
class JoinedVLM:
    """A model that reads images, and how it writes text.

    Attributes:
        model: LlavaForConditionalGeneration.
        language: its words.
        patch: pixels of a patch's side.
        normal: whether its tower was trained on normalised pixels.
        parts: names of the tower and the decoder; empty where both are new.
    """

    model: Any
    language: Language
    patch: int
    normal: bool = False
    parts: tuple[str, ...] = ()

    def batch(self, asked: Questions) -> dict[str, Tensor]:
        """Questions as :mod:`manyheads.training.answers` takes them, on the model's device."""
        return self.read(asked, asked.at, torch.tensor(self.language.answers)[asked.truth.long()])

    def read(self, text: Text, at: Tensor, answers: Tensor) -> dict[str, Tensor]:
        """The same of any text with images: ``answers`` are tokens ``[N, Q]`` that are predicted ``at`` places."""
        device = next(self.model.parameters()).device
        read = {"input_ids": text.ids, "attention_mask": text.real.long(), "at": at, "answers": answers}
        return {**{name: x.to(device) for name, x in read.items()}, "pixel_values": self.pixels(text.images)}

    def pixels(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in -1..1 as the tower was trained on them, on the model's device."""
        images = images.to(next(self.model.parameters()).device)
        if self.normal:
            images = normalised(images / 2 + 0.5)
        return images


def small(
    *, patches: int = 6, size: int = 8, dim: int = 64, layers: int = 2, heads: int = 4, theta: float = 100.0,
    words: Sequence[str] = WORDS, tower: str = "", device: str | torch.device = "cpu",
) -> JoinedVLM:  # fmt: skip
    """A model from scratch: its tower is DINOv2's patch and position embeddings with one layer, or a published one.

    Args:
        patches: of a side.
        size: pixels of a patch's side.
        dim, layers, heads: of the decoder.
        theta: base of its RoPE; the smaller, the more distance counts before anything is learned.
        words: that it knows; each is a token.
        tower: a DINOv2 as :func:`manyheads.models.load_vision` takes it, which is not trained; empty for a new one,
            to which ``patches`` and ``size`` apply.
        device: where it runs.
    """
    read: Any = load_vision(tower, *placed(device, torch.float32))[0] if tower else None
    vision: Any = transformers.Dinov2Config(
        hidden_size=dim // 2, num_hidden_layers=1, num_attention_heads=heads, mlp_ratio=2, patch_size=size,
        image_size=patches * size, initializer_range=(dim // 2) ** -0.5, layerscale_value=1.0,
    ) if read is None else read.config  # fmt: skip
    text = transformers.LlamaConfig(
        hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=len(words) + 3, max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, initializer_range=dim**-0.5,
    )  # fmt: skip
    model: Any = transformers.LlavaForConditionalGeneration(_config(vision, text, 2))
    if read is not None:
        model.model.vision_tower = read.requires_grad_(False)
    token = {word: i + 3 for i, word in enumerate(words)}
    language = Language(lambda said: [token[word] for word in said.split()], start=(1,), image=2, pad=0)
    return JoinedVLM(model.to(device), language, int(vision.patch_size), read is not None)


def join(
    tower: str = TOWER, text: str = TEXT, *, attention: bool = False, device: str | torch.device = "cpu"
) -> JoinedVLM:  # fmt: skip
    """Two published models and a new projector, in float32; what is to be trained requires gradients, the rest none.

    Args:
        tower: DINOv2, as :func:`manyheads.models.load_vision` takes it.
        text: a Llama decoder with the tokenizer of SmolLM2, as :func:`manyheads.models.load` takes it.
        attention: train the projections of the decoder's attention beside the projector.
        device: where it runs.

    Raises:
        UserError: one cannot be had, or the tokenizer has no token to stand for a patch.
    """
    place = placed(device, torch.float32)
    vision: Any = load_vision(tower, *place)[0]
    decoder, tokenizer = load_decoder(text, *place)
    image = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    if not isinstance(image, int) or image in (None, tokenizer.unk_token_id):
        raise UserError(f"{text} has no token {_IMAGE_TOKEN} that can stand for a patch; take {TEXT}")
    known: Any = decoder
    config = _config(vision.config, known.config, image)
    with torch.device("meta"):
        model: Any = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model, model.lm_head = vision, known.model, known.lm_head
    with torch.device(place[0]):
        model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if attention:
        for name, module in model.model.language_model.named_modules():
            if name.endswith(_ATTENTION):
                module.requires_grad_(True)
    start = tokenizer.bos_token_id
    language = Language(
        functools.cache(lambda said: tokenizer.encode(f" {said}", add_special_tokens=False)),
        () if start is None else (int(start),), image, int(tokenizer.pad_token_id or 0),
    )  # fmt: skip
    return JoinedVLM(model, language, config.vision_config.patch_size, True, (tower, text))


def _config(tower: Any, text: Any, image: int) -> Any:
    return transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=image, vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


def new_projector(vlm: JoinedVLM) -> None:
    """Draw the weights of the projector anew, by the global generator of the CPU."""
    connects = vlm.model.model.multi_modal_projector
    made = type(connects)(vlm.model.config)
    connects.load_state_dict(made.state_dict())


def save(vlm: JoinedVLM, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write what of a joined model was trained, and the names of its parts; :func:`load` reads it.

    Args:
        vlm: from :func:`join` or :func:`load`.
        folder: to write to.
        about: what else is worth keeping, as plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().contiguous() for name, p in vlm.model.named_parameters() if p.requires_grad}
    save_file(trained, folder / _WEIGHTS)
    write_atomically(folder / _ABOUT, json.dumps({**(about or {}), "tower": vlm.parts[0], "text": vlm.parts[1]}) + "\n")


def load(folder: str | Path, device: str | torch.device = "cpu") -> JoinedVLM:
    """The joined model in ``folder``, in float32, with gradients where it was trained.

    Raises:
        UserError: there is none, or one of its parts cannot be had.
    """
    place = Path(folder).expanduser()
    if not (place / _ABOUT).is_file():
        raise UserError(
            f"{folder} holds no joined model; make one: python -m manyheads.recipes.joined_vlm --out FOLDER"
        )
    about = json.loads((place / _ABOUT).read_text("utf-8"))
    vlm = join(about["tower"], about["text"], device=device)
    weights = load_file(place / _WEIGHTS, device=str(device))
    vlm.model.load_state_dict(weights, strict=False)
    for name, parameter in vlm.model.named_parameters():
        parameter.requires_grad_(name in weights)
    return vlm
