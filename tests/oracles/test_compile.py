# SPDX-License-Identifier: Apache-2.0
"""A compiled model enters and leaves its port like any other: what was compiled without it is not run with it."""

import pytest
import torch

import manyheads
from manyheads.integrations.transformers import new_cache
from oracles import models
from oracles.caches import step
from oracles.strategies import Mute, NoEdit, NoPatch, Sharpen, Watch
from tolerance import assert_close


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    model = models.build("llama")
    yield model, torch.compile(model, backend="eager")
    torch._dynamo.reset()


def logits(model, *strategies):
    with manyheads.use(model._orig_mod if hasattr(model, "_orig_mod") else model, *strategies), torch.no_grad():
        return model(models.tokens(2, 12)).logits


def test_compiled_before_inside_and_after(compiled):
    """One compiled model through many ports: each run is that of the plain model under the same strategies."""
    model, fast = compiled
    with torch.no_grad():
        plain = fast(models.tokens(2, 12)).logits
    for strategies in [(Mute(),), (Sharpen(),), (NoEdit(), NoPatch())]:
        assert torch.equal(logits(fast, *strategies), logits(model, *strategies)), strategies
        with torch.no_grad():
            assert torch.equal(fast(models.tokens(2, 12)).logits, plain), f"after {strategies}"
    watch = Watch()
    with manyheads.use(model, watch) as port, torch.no_grad():
        assert all(torch.equal(fast(models.tokens(2, 12)).logits, plain) for _ in range(3))
    assert [site["calls"] for site in port.state(watch).values()] == [3, 3]


@pytest.mark.parametrize(
    "spec",
    [
        "keydiff:budget=6,schedule=step",
        pytest.param("hashevict:budget=6,num_global=1,num_recent=2", marks=pytest.mark.slow),
    ],
)
def test_stores_under_compile(compiled, spec):
    """Prefill and decoding of a compiled model with a cache of ours give what the plain model gives."""
    model, fast = compiled
    with manyheads.use(model):
        ours, want = (new_cache(model, manyheads.parse(spec)) for _ in range(2))
        for piece in models.tokens(2, 12).split([10, 1, 1], 1):
            assert_close(step(fast, piece, ours), step(model, piece, want))
