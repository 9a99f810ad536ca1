# SPDX-License-Identifier: Apache-2.0
"""Heads patched at the last token: equal to a whole forward that a hook on the output projection changes by hand."""

import pytest
import torch

import manyheads
from manyheads.integrations.transformers import find_sites
from manyheads.lenses._patching import PatchedRuns, ShiftResidual, padded
from oracles import models
from tolerance import DEEP, SAME, assert_close, is_close, is_far

NAMES = ("llama", "gpt2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "mistral", "gpt_oss", "deepseek_v3")


def runs(model, seed=0, padded=True):
    return PatchedRuns(model, manyheads.use, given(seed, padded))


def given(seed=0, padded=True):
    """Two prompts of 19 tokens; five of the second are padding on the left, or none."""
    inputs = models.inputs("llama", seed=seed)
    return inputs if padded else {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


def projections(model):
    """The output projection of every attention module, by the site's name."""
    ends = ("o_proj", "c_proj")
    return {s.name: next(getattr(m, e) for e in ends if hasattr(m, e)) for s, m in find_sites(model)}


def by_hand(model, inputs, site, heads, z):
    """Logits at the last token of a whole forward in which ``heads`` of ``site`` write ``z [B, H, dv]`` there."""

    def replace(module, args):
        x = args[0].clone()
        parts = x[:, -1].unflatten(-1, z.shape[1:])
        parts[:, heads] = z[:, heads]
        return (x,)

    handle = projections(model)[site].register_forward_pre_hook(replace)
    with torch.no_grad():
        given = dict(inputs)
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**given).logits[:, -1]
    handle.remove()
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_a_forward_that_is_patched_by_hand(name):
    """Float64, left-padded; every head of every layer alone, then two at once; the wrong head is found.

    Gemma 2's own softmax is in float32, and NaN where a query is padding.
    """
    whole = name != "gemma2"
    limit = 4 * DEEP if whole else SAME  # of two paths, with and without a cache
    model, inputs = models.build(name, dtype=torch.float64), given(0, whole)
    mine, other = runs(model, 0, whole), runs(model, 1, whole).outputs
    for site, head, logits in mine.each_head(other):
        assert_close(logits, by_hand(model, inputs, site.name, [head], other[site.name]), limit)
        assert is_far(logits, by_hand(model, inputs, site.name, [head ^ 1], other[site.name]), limit)
    site = mine.sites[-1].name
    gate = torch.zeros(1, 4, dtype=torch.float64)
    gate[0, 1] = gate[0, 2] = 1
    assert_close(mine.logits(other, {site: gate}), by_hand(model, inputs, site, [1, 2], other[site]), limit)


def test_closed_gates_change_no_bit_and_half_open_ones_mix():
    model = models.tiny("llama")
    mine, other = runs(model), runs(model, seed=1).outputs
    closed = {site: torch.zeros(1, 4) for site in other}
    assert torch.equal(mine.logits(other, closed), mine.plain)
    half = {site: torch.full((1, 4), 0.5) for site in other}
    mixed = {site: (mine.outputs[site] + other[site]) / 2 for site in other}
    first = mine.sites[0].name
    assert_close(
        mine.logits(other, {first: half[first]}), mine.logits(mixed, {first: torch.ones(1, 4)}), SAME
    )  # of the first layer, whose z no patch has changed
    assert is_far(mine.logits(other, half), mine.plain, SAME)


def test_the_final_residual_carries_all_and_heads_do_not():
    """All heads patched leave the token itself; the residual stream behind the last block is all that logits see."""
    model = models.tiny("llama")
    mine, beside, keep = runs(model), runs(model, seed=1), [ShiftResidual(), ShiftResidual()]
    for one, run in zip(keep, (mine, beside), strict=True):
        run.logits({}, {}, one)
    shift = keep[1].state["hidden"] - keep[0].state["hidden"]
    assert_close(mine.logits({}, {}, ShiftResidual(by=shift)), beside.plain, SAME)
    every = {site: torch.ones(1, 4) for site in beside.outputs}
    assert is_far(mine.logits(beside.outputs, every), beside.plain, SAME)


def test_a_batch_is_its_rows_and_padding_counts_nowhere():
    model = models.tiny("gpt2")
    inputs = models.inputs("llama", 2)
    other = {site: z[:1] for site, z in runs(model, seed=1).outputs.items()}
    both = [logits for _, _, logits in PatchedRuns(model, manyheads.use, inputs).each_head(other)]
    for row, start in ((0, 0), (1, 5)):  # the second row has five tokens of padding
        alone = {name: x[row : row + 1, start:] for name, x in inputs.items()}
        for got, (_, _, want) in zip(both, PatchedRuns(model, manyheads.use, alone).each_head(other), strict=True):
            assert_close(got[row : row + 1], want, SAME)
    assert is_far(both[0][:1], both[0][1:], SAME)


def test_the_model_is_left_as_it_was():
    model = models.build("llama")
    before = models.forward("llama", model)
    mine, other = runs(model), runs(model, seed=1).outputs
    list(mine.each_head(other))
    assert torch.equal(models.forward("llama", model), before)
    assert is_close(mine.plain, runs(model).plain, SAME)


def test_a_prompt_of_one_token_is_refused():
    class Words:
        def encode(self, text):
            return [5] * len(text.split())

    made = padded(models.tiny("llama"), Words(), ["a b c", "a b"])
    assert made["input_ids"].tolist() == [[5, 5, 5], [0, 5, 5]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    with pytest.raises(manyheads.errors.UserError, match="two tokens at least"):
        padded(models.tiny("llama"), Words(), ["a"])
