# SPDX-License-Identifier: Apache-2.0
"""Small fast tokenizers of code, whose tokens say where they stand: bytes as in GPT-2, parts of words as in BERT."""

from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CODE = [
    "def read_file(path, default=None):\n    with open(path) as file:\n        return file.read() or default\n",
    "for item in self.items:\n    if item.value != 0 and not item.hidden:\n        total += item.value ** 2\n",
    "try:\n    connect(host, port=8080)\nexcept OSError as error:\n    raise ValueError('no connection') from error\n",
] * 8


@cache
def bytes_of() -> PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>"]
    made.train_from_iterator(
        CODE, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", pad_token="<pad>")


@cache
def words_of() -> PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [*map(chr, range(33, 127))]
    made.train_from_iterator(
        CODE, trainers.WordPieceTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=special)
    )
    made.post_processor = processors.TemplateProcessing("[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


BOTH = {"bytes": bytes_of, "words": words_of}
