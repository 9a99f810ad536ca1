# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for tiny models, whose words are w0 to w60."""

import tokenizers
from transformers import PreTrainedTokenizerFast

from .conversions import WORDS

__all__ = ["words_tokenizer"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces; w0 is padding, w1 the end of a text, and w2 what it does not know."""
    words = {f"w{i}": i for i in range(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1")
