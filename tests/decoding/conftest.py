# SPDX-License-Identifier: Apache-2.0
"""Tiny masked diffusion models of the two shapes there are: logits of each place, and of the next."""

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from tiny import denoisers


@pytest.fixture(scope="module")
def llada():
    return denoisers.model()


@pytest.fixture(scope="module")
def dream():
    return denoisers.model(Qwen2ForCausalLM, Qwen2Config, predicts_next=True)
