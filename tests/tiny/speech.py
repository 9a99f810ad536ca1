# SPDX-License-Identifier: Apache-2.0
"""A recogniser of Whisper's kind with random weights, and what it reads by."""

import torch


def tiny_whisper():
    """Model with 16 features, and its extractor."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    small = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 20,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(WhisperConfig(**small)).eval(), WhisperFeatureExtractor()
