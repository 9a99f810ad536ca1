# SPDX-License-Identifier: Apache-2.0
"""One prefill serves many policies: a fork goes on exactly as if its policy had seen the prompt itself."""

import pytest

import manyheads
from manyheads import parse
from oracles import models
from oracles.caches import prefilled, step, stores
from tolerance import CLOSE, assert_close

SPECS = (
    "full", "random:budget=0.4,seed=2", "random:budget=6,schedule=3", "streaming_llm:budget=8",
    "keydiff:budget=0.5,schedule=step",
    "snapkv:budget=0.6,window_size=4,kernel_size=3", "snapkv:budget=9,window_size=5,kernel_size=3,schedule=step",
    "hashevict:budget=10,num_global=2,num_recent=3", "hashevict:budget=0.9,num_global=2,num_recent=3,probe=key",
    "hashevict:budget=60,num_global=2,num_recent=3",
)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_fork_is_a_direct_run(name, spec):
    model, given = models.tiny(name), models.inputs(name)
    mask = given["attention_mask"]
    with manyheads.use(model):
        parent = prefilled(model, "full", given["input_ids"], record=8, attention_mask=mask)
        fork = parent.fork(parse(spec))
        direct = prefilled(model, spec, given["input_ids"], attention_mask=mask)
        assert fork.bytes() == direct.bytes() and fork.get_seq_length() == direct.get_seq_length() == 19
        for t in range(8):
            n = 3 if t == 4 else 1
            mask = models.torch.cat([mask, mask.new_ones(2, n)], 1)
            last = models.tokens(2, n, seed=t)
            assert_close(
                step(model, last, fork, attention_mask=mask), step(model, last, direct, attention_mask=mask), CLOSE
            )
        for x, y in zip(stores(fork), stores(direct), strict=True):
            assert x.padded.positions().equal(y.padded.positions())
        assert parent.get_seq_length() == 19 and all(s.padded.index is None for s in stores(parent))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_fork_leaves_layers_that_are_not_selected(name):
    model, ids = models.tiny(name), models.tokens(2, 19)
    with manyheads.use(model):
        fork = prefilled(model, "full", ids, record=8).fork(parse("keydiff:budget=4,layers=1"))
        direct = prefilled(model, "keydiff:budget=4,layers=1", ids)
        both = prefilled(model, "keydiff:budget=4", ids)
        last = models.tokens(2, 1, seed=1)
        want = step(model, last, direct)
        assert_close(step(model, last, fork), want, CLOSE)
        with pytest.raises(AssertionError):  # control
            assert_close(step(model, last, both), want)
