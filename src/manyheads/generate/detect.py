# SPDX-License-Identifier: Apache-2.0
"""Whether a text carries a watermark's message, from the text alone."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..spec import parse
from ..strategy import Strategy
from ..writing import Reading, Watermark

__all__ = ["detect"]


def detect(text: str, strategy: str | Strategy, tokenizer: Any) -> Reading:
    """Read a watermark's message from a text; no model is needed.

        manyheads.detect(text, "xattn_watermark:weights=FOLDER,message=10110010", tokenizer).p_value

    The p-value is that of the strategy's own message, which must not have been chosen after reading the text.

    Args:
        text: that may be marked, without its prompt.
        strategy: the watermark, with the message that is looked for.
        tokenizer: of the model that may have written it.

    Raises:
        UserError: the strategy is no watermark, or the text is empty.
    """
    watermark = parse(strategy)
    if not isinstance(watermark, Watermark):
        raise UserError(f"{watermark.spec} hides no message; give a watermark, as xattn_watermark or green_list")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise UserError("there is no text to read: give some words")
    return watermark.read([tokens])[0]
