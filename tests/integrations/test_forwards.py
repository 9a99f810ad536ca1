# SPDX-License-Identifier: Apache-2.0
"""What watches is shown a call once for each forward and place in it, however often a module runs."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel

import manyheads
from manyheads.errors import UserError
from manyheads.integrations import hook_chain
from oracles import models
from tolerance import CLOSE, is_close, is_far

LENSES = ("active_dormant", "massive_values", "refined_massive_activations")


def training(name="llama"):
    model = models.build(name).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def tables(seen):
    return [seen.compute(i).tables for i in range(len(LENSES))]


def equal(some, others):
    return all(
        a[name].values.shape == b[name].values.shape and is_close(a[name].values, b[name].values)
        for a, b in zip(some, others, strict=True)
        for name in a
    )


def steps(model, batches, forward):
    """All forwards first, one backward behind them; what was seen, and the gradients."""
    with manyheads.watch(model, *LENSES) as seen:
        sum(forward(model, ids) for ids in batches).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return tables(seen), grads


def loss(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


BATCHES = [models.tokens(2, 12, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """By layer and of the whole model: as many samples as prompts, the same values, the same gradients."""
    model = training()
    want, grads = steps(model, BATCHES, loss)
    assert len(want[0]["sink"].values) == 4
    if not reentrant:
        got, again = steps(model, BATCHES, lambda m, ids: checkpoint(loss, m, ids, use_reentrant=False))
        assert equal(got, want) and all(is_close(a, b, CLOSE) for a, b in zip(again, grads, strict=True))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got, again = steps(model, BATCHES, loss)
    assert equal(got, want) and all(is_close(a, b, CLOSE) for a, b in zip(again, grads, strict=True))


def test_a_wrong_count_is_seen(monkeypatch):
    """The control: a backward pass that is not told from a forward doubles the samples."""
    monkeypatch.setattr(hook_chain, "recomputing", lambda: False)
    model = training()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got, _ = steps(model, BATCHES, loss)
    assert len(got[0]["sink"].values) > 4


def test_edits_act_when_a_layer_is_computed_again():
    """Only what watches is spared the second time: gradients under an ablation are those without checkpointing."""
    grads = []
    for on in (False, True):
        model = training()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with manyheads.use(model, "ablate:heads=0.1+1.2"):
            loss(model, BATCHES[0]).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(is_close(a, b, CLOSE) for a, b in zip(*grads, strict=True))


def albert(**changes):
    sizes = {
        "vocab_size": models.VOCAB, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 6,
        "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return AlbertModel(AlbertConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize("changes", [{}, {"num_hidden_groups": 2}, {"num_hidden_groups": 3, "inner_group_num": 2}])
def test_layers_that_share_a_module(changes):
    """Every depth is a layer of its own, in the order of the forward, with the weights that it had there."""
    model, ids = albert(attn_implementation="eager", **changes), models.tokens(2, 12)
    with manyheads.watch(model, *LENSES) as seen, torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
        model(models.tokens(3, 12, seed=1))
    sink = seen.compute().tables["sink"]
    maps = [x for layer in maps for x in (layer if isinstance(layer, tuple) else (layer,))]
    want = np.stack([x[:, :, 1:, 0].mean(-1).numpy() for x in maps], 1)
    assert sink.values.shape == (5, len(maps), 4) and sink.layers == tuple(range(len(maps)))
    assert is_close(sink.values[:2], want, CLOSE) and len(set(sink.sites)) == len(maps)
    assert is_far(want[:, :-1], want[:, 1:])  # depths differ: a mean over them is another thing
    for lens, count in ((1, len(maps)), (2, 6)):  # the residual stream is that of blocks, of one or two layers
        assert all(t.values.shape[:2] == (5, count) for t in seen.compute(lens).tables.values())
    with pytest.raises(UserError, match="finds no attention"), manyheads.use(model, "ablate:heads=11.0"):
        pass  # a depth cannot be named where all share the module


def test_a_model_called_twice_in_a_larger_one_reads_more_prompts():
    """Two calls of one model are two forwards, whatever stands around it; so is a module called by itself."""

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = models.build("bert")

        def forward(self, a, b):
            return self.tower(a).logits, self.tower(b).logits

    model = Pair()
    with manyheads.watch(model, "active_dormant") as seen, torch.no_grad():
        model(*BATCHES)
    alone = models.tiny("bert")
    with manyheads.watch(alone, "active_dormant") as each, torch.no_grad():
        for ids in BATCHES:
            alone(ids)
    got, want = (s.compute().tables["sink"].values for s in (seen, each))
    assert got.shape == (4, 2, 4) and is_close(got, want)
    block = alone.bert.encoder.layer[0]
    with manyheads.watch(alone, "active_dormant:layers=0") as seen, torch.no_grad():
        for _ in range(3):
            block(torch.randn(2, 9, 32))
    assert seen.compute().tables["sink"].values.shape == (6, 1, 4)


def vision_language():
    torch.manual_seed(0)
    text = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 4, "in_channels": 3}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_what_did_not_run_is_said():
    """Words only: the language layers are watched, and a warning names the tower; nothing at all is still refused."""
    model, ids = vision_language(), torch.randint(2, 59, (1, 24))
    for lenses in (("active_dormant",), LENSES):
        with (
            pytest.warns(UserWarning, match=r"2 of 4 attention modules; the model did not run model\.visual"),
            manyheads.watch(model, *lenses) as seen,
            torch.no_grad(),
        ):
            model(ids)
        assert seen.compute().tables["sink"].values.shape == (1, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with manyheads.watch(model, "active_dormant:layers=0+1") as seen, torch.no_grad():
            model(ids)  # what was asked for ran
    with pytest.raises(UserError, match="never called"), manyheads.watch(model, "active_dormant"):
        pass


@pytest.mark.parametrize("spec", ["sag", "headhunter:heads=0.1", "headhunter", "pab"])
def test_guidance_is_refused_on_language_models(spec):
    with pytest.raises(UserError, match="acts on denoisers"), manyheads.use(models.tiny("llama"), spec):
        pass


def test_a_forward_that_fails_ends():
    """The next one begins anew: what is called by itself after an error is no further layer."""
    model = models.build("bert")
    block = model.bert.encoder.layer[0]
    with manyheads.watch(model, "active_dormant:layers=0") as seen, torch.no_grad():
        with pytest.raises(IndexError):
            model(models.tokens(1, 12) + 10_000)
        for _ in range(2):
            block(torch.randn(2, 9, 32))
    assert seen.compute().tables["sink"].values.shape == (4, 1, 4)
