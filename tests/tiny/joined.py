# SPDX-License-Identifier: Apache-2.0
"""A tiny DINOv2 and a tiny Llama with a tokenizer, as folders that can be joined."""

from types import SimpleNamespace

import torch
import transformers

from manyheads.data.visual_questions import WORDS

from . import compare


def make_words(words=WORDS):
    """A tokenizer of the words that are said of pictures."""
    return compare.make_tokenizer([SimpleNamespace(content=" ".join(words))])


def make_parts(folder, words=WORDS):
    """Write both; their folders."""
    torch.manual_seed(0)
    tower = transformers.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, patch_size=2, image_size=8, mlp_ratio=1
    )
    transformers.Dinov2Model(tower).save_pretrained(folder / "tower")
    tokenizer = make_words(words)
    tokenizer.add_tokens(["<empty_output>"])
    text = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return str(folder / "tower"), str(folder / "text")
