# SPDX-License-Identifier: Apache-2.0
"""A tiny model of random weights with a tokenizer of its own, and text to read."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyheads.data.texts import standard_library


@pytest.fixture(scope="session")
def texts():
    return standard_library()[:40]


def make_tokenizer(texts):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text.content for text in texts[:20]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="session")
def tokenizer(texts):
    return make_tokenizer(texts)


def tiny(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
        **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    """The model as a folder, for the command line."""
    place = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def results(model, tokenizer, texts, tmp_path_factory):
    """A finished run over all tasks, several budgets and lengths."""
    from manyheads.comparison import compare

    return compare(
        model, tokenizer, texts, ["random", "snapkv:window_size=8", "streaming_llm", "hashevict"], [0.5, 0.2],
        lengths=[640, 800], samples=4, rounds=2, out=tmp_path_factory.mktemp("run"), command=["manyheads", "compare"],
    )  # fmt: skip
