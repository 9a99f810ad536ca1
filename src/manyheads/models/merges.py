# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that lost its merges reads every text as single letters, and all that is measured means nothing."""

import warnings
from typing import TYPE_CHECKING

from manyheads.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS, _MANY_TOKENS = "the people of the world and what they have made", 2000


def cuts_letters(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a tokenizer with many tokens has none for common English words.

    True as well for one of a language that is not written in letters; byte-level and character-level ones, which know
    few tokens, are as they should be.
    """
    if len(tokenizer) < _MANY_TOKENS:
        return False
    return len(tokenizer(_WORDS, add_special_tokens=False)["input_ids"]) >= len(_WORDS.replace(" ", ""))


def check_merges(tokenizer: "PreTrainedTokenizerBase", name: str, english: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a warning where it cuts words into letters.

    Raises:
        UserError: it is that of a model which is known to have been trained on English.
    """
    if not cuts_letters(tokenizer):
        return tokenizer
    says = (
        f"the tokenizer of {name} cuts words into single letters though it knows {len(tokenizer):,} tokens: unless its "
        "language has no letters, its merges are missing, as after some releases of transformers read a GGUF file, and "
        "losses mean nothing"
    )
    if english:
        raise UserError(f"{says}; make its folder again, or fetch tokenizer.json")
    warnings.warn(says, UserWarning, stacklevel=3)
    return tokenizer
