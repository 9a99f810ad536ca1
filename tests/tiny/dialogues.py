# SPDX-License-Identifier: Apache-2.0
"""A folder of five dialogues, and response selection on it with a tokenizer of its words."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from manyheads.tasks.language import _selection, response_selection
from manyheads.tasks.language.response_selection import ResponseSelection

NAMES = ("ann", "bob", "cid", "dan", "eve")
SAID = (
    "i am {0} and i feel bad",
    "why is that {0}",
    "my {0} day was long",
    "then rest now dear {0}",
    "thank you so {0}",
)


def messages(name):
    return [line.format(name) for line in SAID]


@pytest.fixture
def selection(tmp_path, monkeypatch):
    """The task; without a published encoder."""
    for name in NAMES:
        (tmp_path / f"{name}.txt").write_text("\n".join(messages(name)) + "\n")
    words = " ".join(["[PAD] [UNK] [CLS] [SEP]", *(text for name in NAMES for text in messages(name))])
    known = {word: i for i, word in enumerate(dict.fromkeys(words.split()))}
    inner = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    for module in (_selection, response_selection):
        monkeypatch.setattr(module, "tokens", lambda name: made)
    _selection._ids.cache_clear()
    yield ResponseSelection(
        folder=str(tmp_path), dim=16, layers=1, heads=2, batch=3, steps=3, rates=(3e-3,), dropout=0.0, candidates=3,
        context_tokens=24, reply_tokens=8, samples_judged=4,
    )  # fmt: skip
    _selection._ids.cache_clear()
