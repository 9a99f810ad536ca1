# SPDX-License-Identifier: Apache-2.0
"""The prompts of a pipeline's call as the tokens that its denoiser reads."""

import re
from typing import Any

from ..call import Prompt
from ..errors import UserError

__all__ = ["prompt_of", "prompts_of"]


def prompts_of(pipe: Any, asked: dict[str, Any]) -> tuple[tuple[Prompt, ...], ...]:
    """For each row of the conditional branch its prompt, by every tokenizer whose tokens the denoiser reads.

    A pipeline without tokenizers says them itself (``prompt_tokens``). Texts are taken as they are given: what a
    pipeline rewrites before it reads them (to lower case) keeps its place.

    Args:
        pipe: the pipeline.
        asked: the arguments of its call by name.

    Raises:
        UserError: it was given no texts, or where its tokens come to stand is not known.
    """
    given, found = asked.get("prompt"), list[tuple[Prompt, ...]]()
    if hasattr(pipe, "prompt_tokens"):
        found = [(prompt,) for prompt in pipe.prompt_tokens(given)]
    elif given is None:
        raise UserError("the prompts are not known, only their embeddings: give the pipeline its prompts as text")
    else:
        parts = _tokenizers(pipe)
        texts = [given] if isinstance(given, str) else given
        found = [tuple(prompt_of(tokenizer, text, at, room) for tokenizer, at, room in parts) for text in texts]
    count = asked.get("num_images_per_prompt") or asked.get("num_videos_per_prompt") or 1
    return tuple(prompt for prompt in found for _ in range(count))


def _tokenizers(pipe: Any) -> list[tuple[Any, int, int | None]]:
    """Tokenizers with the first place of their tokens and the room there."""
    name = type(pipe).__name__
    parts = {part for part in ("tokenizer", "tokenizer_2", "tokenizer_3") if getattr(pipe, part, None) is not None}
    written = any("template" in attribute for attribute in vars(pipe))
    if "tokenizer_3" in parts and "tokenizer" in parts and hasattr(pipe, "tokenizer_max_length"):  # CLIP, then T5
        room = int(pipe.tokenizer_max_length)
        return [(pipe.tokenizer, 0, room), (pipe.tokenizer_3, room, None)]
    if name.startswith("Flux") and "tokenizer_2" in parts:
        return [(pipe.tokenizer_2, 0, None)]
    if (parts == {"tokenizer"} and not written) or (hasattr(pipe, "unet") and "tokenizer" in parts):
        return [(pipe.tokenizer, 0, None)]  # the two of SDXL give the same tokens
    raise UserError(
        f"where the tokens of a prompt stand in {name} is not known; give the prompts in Python, as prompts="
    )


def prompt_of(tokenizer: Any, text: str, start: int = 0, room: int | None = None) -> Prompt:
    """A text by a fast tokenizer of transformers; words are what blanks part.

    Raises:
        UserError: the tokenizer does not give the places of its tokens in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} does not say where its tokens stand; use a fast tokenizer")
    words = [(found.group(), found.span()) for found in re.finditer(r"\S+", text)]
    read = tokenizer(text, return_offsets_mapping=True, truncation=room is not None, max_length=room)
    spans = [(a + (text[a:b] != text[a:b].lstrip()), b) for a, b in read["offset_mapping"]]  # a blank before a word
    at = [next((i for i, (_, (first, last)) in enumerate(words) if max(a, first) < min(b, last)), -1) for a, b in spans]
    return Prompt(tuple(read["input_ids"]), tuple(at), tuple(word for word, _ in words), start, room)
