# SPDX-License-Identifier: Apache-2.0
"""The loss of the next token, and training by it."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.training import Diverged, next_token_loss, token_nll, train_lm
from manyheads.training.language import predicted_tokens
from tolerance import assert_close, is_far

CONFIG = DecoderConfig(16, 16, 1, 2, length=12)


def get_batch(step):
    """Counting modulo 16 from a random place: learned at once."""
    start = torch.randint(16, (8, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(13)) % 16, None


def decoder():
    torch.manual_seed(0)
    return Decoder("softmax", CONFIG)


def test_loss_is_the_mean_of_what_counts():
    model, (ids, _) = decoder(), get_batch(0)
    each = -model(ids[:, :-1])[0].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    mask = torch.rand(8, 12) < 0.3
    assert_close(next_token_loss(model, (ids, None)), each.mean())
    assert_close(next_token_loss(model, ids), each.mean())
    assert_close(next_token_loss(model, (ids, mask)), each[mask].mean())
    assert is_far(next_token_loss(model, (ids, ~mask)), each[mask].mean())
    assert next_token_loss(model, (ids, torch.zeros(8, 12, dtype=torch.bool))) == 0
    assert_close(token_nll(model, ids, batch=3), each.detach())
    assert predicted_tokens(ids) == predicted_tokens((ids, mask)) == 96


def test_models_of_transformers_and_plain_logits_are_understood():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes, pad_token_id=None, bos_token_id=0, eos_token_id=None))
    ids, _ = get_batch(1)
    wanted = llama(input_ids=ids, labels=ids).loss
    assert_close(next_token_loss(llama, ids), wanted)

    class Plain(nn.Module):
        def forward(self, ids):
            return llama(ids).logits

    assert_close(next_token_loss(Plain(), ids.int()), wanted)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns(optimizer):
    model = decoder()
    state = train_lm(model, get_batch, 60, lr=2e-2, optimizer=optimizer)
    assert len(state.losses) == 60 and state.losses[0] > 0.9 * math.log(16) and state.losses[-1] < 0.5
    assert not model.training and state.tokens == 60 * 96
    assert train_lm(decoder(), get_batch, "3k").step == 32  # the step that reaches 3,000 is the last


def test_divergence_is_an_error():
    with pytest.raises(Diverged, match=r"NaN or infinite by step \d+; take a smaller learning rate"):
        train_lm(decoder(), get_batch, 60, lr=1e30)
