# SPDX-License-Identifier: Apache-2.0
"""Messages as the chat template of a tokenizer writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

__all__ = ["chat_text", "chats", "rendered", "system_span"]


def chats(tokenizer: Any) -> bool:
    """Whether ``tokenizer`` has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], generate: bool = True) -> str:
    """``messages`` (``role`` and ``content`` each) in the template's words, special tokens included.

    Args:
        tokenizer: with a chat template.
        messages: in their order.
        generate: the model is to answer: the template's opening of an answer is put behind.

    Raises:
        UserError: the template refuses the messages.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # a template raises what it likes
        raise UserError(f"the chat template refuses these messages: {error}") from error


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a prompt that the assistant answers next.

    A base model, which has no chat template, gets plain lines ``role: content``, and its own first token where it has
    one.
    """
    if chats(tokenizer):
        return chat_text(tokenizer, messages)
    lines = [f"{message['role']}: {message['content']}\n" for message in messages]
    return "".join([tokenizer.bos_token or "", *lines, "assistant:"])


def system_span(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[int, int]:
    """Tokens ``(start, stop)`` of the system message in ``messages``, what the template puts around it included.

    Where the messages have none, those of the system prompt that the template itself puts before them.

    Raises:
        UserError: there is no template, or no system prompt.
    """
    if not chats(tokenizer):
        raise UserError("protect=system: the tokenizer has no chat template, so that there is no system message")
    whole = chat_text(tokenizer, messages, generate=False)
    first, begin = messages[0], getattr(tokenizer, "bos_token", None) or ""
    if first["role"] == "system":
        stop = _same(tokenizer, [first], whole)
        if first["content"].strip() not in whole[:stop]:  # a template that refuses it alone, or writes it elsewhere
            stop = whole.find(first["content"].strip()) + len(first["content"].strip())
    else:
        other = "assistant" if first["role"] == "user" else "user"
        stop = _same(tokenizer, [{**first, "role": other}, *messages[1:]], whole)
        # Every message may open with the same words: they are no system prompt, and they come again.
        later = chat_text(tokenizer, [first, {"role": other, "content": ""}], generate=False)[stop:]
        again = next(i for i in range(stop + 1) if whole[i:stop] in later)
        stop = 0 if whole[:again].strip() in ("", begin) else stop
    if not stop:
        raise UserError("protect=system: these messages have no system message, and the template adds none")
    return 0, len(tokenizer.encode(whole[:stop], add_special_tokens=False))


def _same(tokenizer: Any, messages: Sequence[Mapping[str, str]], whole: str) -> int:
    """Characters of ``whole`` that the template writes for ``messages``, too, from the beginning on."""
    try:
        text = chat_text(tokenizer, messages, generate=False)
    except UserError:
        return 0
    return next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), min(len(whole), len(text)))
