# SPDX-License-Identifier: Apache-2.0
"""Messages as the chat template of a tokenizer writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

__all__ = ["chat_text", "chats"]


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
