# SPDX-License-Identifier: Apache-2.0
"""A model that is only watched computes bit for bit what it always did; a strategy that acts changes something."""

from contextlib import nullcontext

import pytest
import torch

import manyheads
from oracles import models
from oracles.strategies import Attend, CopyEdit, DropMask, DropScale, Meddle, Mute, NoEdit, NoPatch, Sharpen, Watch
from tolerance import SAME, error

GENERATIONS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
}


def computes(name, model, *strategies, **generation):
    """Logits of a forward, and the tokens and scores of ``generate``, with ``strategies`` in use (None: untouched)."""
    with nullcontext() if strategies == (None,) else manyheads.use(model, *strategies):
        results = [models.forward(name, model)]
        if name != "bert":
            torch.manual_seed(7)
            made = model.generate(
                **models.inputs(name), max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **generation
            )
            results += [made["sequences"], *made["logits"]]
    return results


def is_identity(name, model, *strategies, **generation):
    """``strategies`` change no bit of anything the model computes."""
    for got, want in zip(computes(name, model, *strategies, **generation),
                         computes(name, model, None, **generation), strict=True):  # fmt: skip
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "generation"), [(n, g) for n in models.ALL for g in GENERATIONS if n != "bert" or g == "greedy"]
)
def test_watching_changes_no_bit(name, generation):
    model = models.tiny(name)
    for strategies in [(), (Watch(),), (NoEdit(), NoPatch(), Watch())]:
        is_identity(name, model, *strategies, **GENERATIONS[generation])


@pytest.mark.parametrize("name", models.ALL)
def test_a_copied_call_and_a_full_cache_change_no_bit(name):
    model = models.tiny(name)
    is_identity(name, model, CopyEdit())
    if name != "bert":
        for generation in GENERATIONS.values():
            with manyheads.use(model, "full"):
                torch.manual_seed(7)
                ours = model.generate(**models.inputs(name), max_new_tokens=5, **generation)
            torch.manual_seed(7)
            assert torch.equal(ours, model.generate(**models.inputs(name), max_new_tokens=5, **generation))


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bert", "bart"])
def test_either_implementation_is_kept(name, attn):
    model = models.build(name, attn=attn)
    is_identity(name, model, Watch())
    is_identity(name, model, CopyEdit())
    assert model.config._attn_implementation == attn


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("strategy", [Watch(), CopyEdit()], ids=lambda s: type(s).__name__)
def test_other_ways_to_run_change_no_bit(name, strategy):
    """Half precision, dropout under training, a static cache, returned weights, a mask of the user's own."""
    given = models.inputs(name)
    ids = given["input_ids"]
    half, training, plain = (
        models.build(name).bfloat16(),
        models.build(name, attention_dropout=0.3).train(),
        models.build(name),
    )
    eager = models.build(name, attn="eager")
    own = torch.zeros(2, 1, 19, 19).masked_fill(~torch.ones(19, 19, dtype=torch.bool).tril(), -1e9)
    own[..., 3] -= 1.0
    runs = [
        (half, lambda: half(**given).logits),
        (training, lambda: training(ids).logits),
        (plain, lambda: plain.generate(**given, max_new_tokens=4, cache_implementation="static")),
        (plain, lambda: plain(ids, attention_mask=own).logits),
        (eager, lambda: torch.stack(eager(**given, output_attentions=True).attentions)),
    ]
    for model, run in runs:
        results = []
        for watched in (False, True):
            torch.manual_seed(3)
            with manyheads.use(model, strategy) if watched else nullcontext():
                results.append(run())
        assert torch.equal(*results)


@pytest.mark.parametrize("name", models.ALL)
def test_the_call_says_all_that_the_model_computes(name):
    """Reference attention of the call (mask, bias, scale, cap, sinks) gives what the model's own attention gives."""
    model = models.tiny(name)
    want = computes(name, model, None)
    got = computes(name, model, Attend())
    padding = models.inputs(name).get("attention_mask") if name not in models.SEQ2SEQ else None
    for x, y in zip(got, want, strict=True):
        if padding is not None and x.shape[:2] == padding.shape:  # what padding itself computes is anyone's guess
            x, y = x[padding.bool()], y[padding.bool()]
        assert error(x, y) <= SAME


@pytest.mark.parametrize("strategy", [Sharpen(), Mute()], ids=["edit", "patch"])
@pytest.mark.parametrize("name", models.ALL)
def test_on_means_on(name, strategy):
    """At every site alone, and at all of them together."""
    model = models.tiny(name)
    plain = models.forward(name, model)
    with manyheads.use(model, strategy):
        assert error(models.forward(name, model), plain) > 1e-3


@pytest.mark.parametrize("wrong", [Meddle(), Sharpen(), Mute()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "whisper"])
def test_control_of_identity(name, wrong):
    with pytest.raises(AssertionError):
        is_identity(name, models.build(name), wrong)


@pytest.mark.parametrize("wrong", [DropMask(), DropScale()], ids=lambda s: type(s).__name__)
def test_control_of_the_call(wrong):
    model = models.tiny("gemma2")
    assert error(computes("gemma2", model, wrong)[0][0], computes("gemma2", model, None)[0][0]) > 100 * SAME
