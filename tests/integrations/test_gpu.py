# SPDX-License-Identifier: Apache-2.0
"""Decoding from fixed storage on a GPU: the captured step, compiled or not, and ``generate``."""

import pytest
import torch

import manyheads
from integrations.test_decoding import each, generated
from manyheads import kernels, parse
from manyheads.integrations.decoding import decode
from manyheads.integrations.transformers import new_cache, prefill
from oracles import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]
CLOSE = 2e-2  # logits of a likeliest token and of one that a different order of sums may prefer


@pytest.fixture(scope="module")
def llama():
    return models.build("llama", num_key_value_heads=2, head_dim=32).cuda()


def regret(model, ids, new, spec) -> float:
    """By how much each token of ``new`` misses the best logit, read from storage that grows, token by token."""
    with manyheads.use(model), torch.no_grad():
        cache = new_cache(model, parse(spec))
        prefill(model, ids, cache, 16 if "chunk" in spec else 4096)
        told, worst = torch.cat([ids[:, -1:], new], 1), 0.0
        for t in range(new.shape[1]):
            at = torch.full((1, 1), ids.shape[1] - 1 + t, device=ids.device)
            logits = model(input_ids=told[:, t : t + 1], position_ids=at, past_key_values=cache).logits[:, -1].float()
            missed = logits.amax(-1) - logits.gather(1, told[:, t + 1 : t + 2])[:, 0]
            worst = max(worst, float(missed.max()))
    return worst


def made(model, ids, spec, way):
    with manyheads.use(model):
        cache = new_cache(model, parse(spec), room=44)
        prefill(model, ids, cache, 16 if "chunk" in spec else 4096)
        if way == "generate":
            return generated(model, ids, cache)
        return decode(model, ids, cache, 40, compiled=way == "compiled")


@each
@pytest.mark.parametrize("way", ["captured", "compiled", "generate"])
def test_decodes_what_growing_storage_does(llama, spec, way):
    torch._dynamo.reset()
    ids = models.tokens(2, 40).cuda()
    new = made(llama, ids, spec, way)
    assert regret(llama, ids, new, spec) < CLOSE
    assert regret(llama, ids, new.roll(1, 1), spec) > 5 * CLOSE  # control: the same tokens, one too late


def test_drawing_is_drawn_anew_at_every_replay(llama):
    """The seed's state moves on from replay to replay: rows that draw alike would be a constant stream of noise."""
    ids = models.tokens(1, 12).expand(64, -1).contiguous().cuda()
    with manyheads.use(llama):
        draws = []
        for _ in range(2):
            torch.manual_seed(0)
            cache = new_cache(llama, parse("full"), room=24)
            prefill(llama, ids, cache)
            draws.append(decode(llama, ids, cache, 20, temperature=1.0, compiled=False))
    assert torch.equal(*draws)
    assert len(set(draws[0][:, 10].tolist())) > 8  # 64 rows, one prompt
    assert any(len(set(row.tolist())) > 8 for row in draws[0])
