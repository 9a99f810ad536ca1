# SPDX-License-Identifier: Apache-2.0
"""Decoding from fixed storage on a GPU: the captured step, compiled or not, and ``generate``."""

import pytest
import torch

import manyheads
from integrations.test_decoding import each, generated
from manyheads import kernels, parse
from manyheads.caches.attention_gate import Gates
from manyheads.caches.attention_gate.soft import SoftGates
from manyheads.integrations.decoding import decode
from manyheads.integrations.transformers import find_sites, new_cache, prefill
from oracles import models
from tolerance import DEVICE, assert_close, is_far

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


def test_a_bias_has_its_gradient_on_frozen_weights():
    """Where only the bias asks for one, as with gates that are trained; a CPU needs no help."""
    model, ids, found = models.build("llama", head_dim=16).requires_grad_(False), models.tokens(2, 40), []
    gates = Gates.of(32, [site for site, _ in find_sites(model)], num_heads=1, head_dim=16)
    for gate in gates.layers.values():
        torch.nn.init.normal_(gate.out.weight, std=1.0)
    for device in ("cpu", "cuda"):
        model, gates = model.to(device), gates.to(device)
        with manyheads.use(model, SoftGates(trained=gates, relaxation="sigmoid")):
            loss = model(ids.to(device), use_cache=False).logits.float().logsumexp(-1).mean()
        first = gates.layers["0"].out.weight
        found.append(torch.autograd.grad(loss, first)[0].cpu())
    assert_close(found[1], found[0], DEVICE)
    assert is_far(found[1] * (1 + 3 * DEVICE), found[0], DEVICE)
