# SPDX-License-Identifier: Apache-2.0
"""Prompts about a picture, as the processor of a model of transformers reads them."""

import inspect
from typing import Any

from ..errors import UserError
from ..formatting import first_line
from ..lens import device_of

__all__ = ["read"]

_UNNEEDED = {"mm_token_type_ids", "token_type_ids"}  # by models that do not name them


def read(
    model: Any, processor: Any, prompt: str, image: Any, chat: bool | None, system: str
) -> tuple[list[int], dict[str, Any]]:
    """Tokens of a prompt, and what else the model is given with them, on its device.

    Args:
        model: that is to reply.
        processor: of the model.
        prompt: what the user says; the picture stands before it where it does not say.
        image: the picture, whatever the processor takes.
        chat: write it in the template; None for where there is one.
        system: a system message before it.

    Raises:
        UserError: model or processor reads no pictures, the prompt has not a place for each, or there is no template
            that is asked for.
    """
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(
            f"{type(processor).__name__} reads no pictures: give the model's processor, as "
            "transformers.AutoProcessor.from_pretrained reads it"
        )
    named = set(inspect.signature(model.forward).parameters)
    if "pixel_values" not in named:
        raise UserError(f"{type(model).__name__} reads no pictures: give a model as LLaVA, or leave the image away")
    text = _text(processor, prompt, chat, system)
    begin = getattr(processor.tokenizer, "bos_token", None)
    once = {"add_special_tokens": False} if begin and text.startswith(begin) else {}  # a template's, not twice
    try:
        found = processor(images=image, text=text, return_tensors="pt", **once)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{type(processor).__name__} does not take this image and prompt: {first_line(error)}"
        ) from error
    device, unused = device_of(model), _UNNEEDED - named | {"attention_mask"}
    given = {
        name: x.to(device, model.dtype) if x.is_floating_point() else x.to(device)
        for name, x in found.items() if name not in unused
    }  # fmt: skip
    ids: list[int] = given.pop("input_ids")[0].tolist()
    return ids, given


def _text(processor: Any, prompt: str, chat: bool | None, system: str) -> str:
    """The prompt in the chat template if there is one, or as it stands, behind the picture where it does not say."""
    written = getattr(processor, "chat_template", None) is not None
    if (chat or system) and not written:
        raise UserError("the processor has no chat template; leave chat and system away")
    if system and chat is False:
        raise UserError("system is a message in the chat template: leave it away, or chat=False")
    if written and chat is not False:
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        return str(processor.apply_chat_template([*before, asked], add_generation_prompt=True))
    token = str(getattr(processor, "image_token", "<image>"))
    return prompt if token in prompt else f"{token}\n{prompt}"
