# SPDX-License-Identifier: Apache-2.0
"""Pooling: latents attend to what the design says, padding on either side is no matter, and files give it again."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu

from manyheads import UserError, parse
from manyheads.convert._poolers import Mean, last
from manyheads.convert.pooling import LatentPooler
from manyheads.converter import encoder_of
from manyheads.integrations.bidirectional import is_bidirectional
from manyheads.models.text_encoder import TextEncoder
from oracles.conversions import LAYERS, WIDTH, tiny
from oracles.texts import words_tokenizer
from tolerance import FORMULA, SAME, assert_close, is_far

HEADS, LATENTS = 6, 5
DESIGNS = {
    "1": "pooling:mask=causal,pooling=eos", "2": "pooling:mask=causal,pooling=last_layer,heads=6,latents=5,mult=2",
    "3": "pooling:mask=causal,pooling=layers,heads=6,latents=5,mult=2",
    "4": "pooling:pooling=last_layer,heads=6,latents=5,mult=2", "5": "pooling:heads=6,latents=5,mult=2",
    "mean": "pooling:pooling=mean",
}  # fmt: skip
TEXTS = ["w5 w9 w11", "w7", "w8 w3 w2 w30 w12 w9"]
LIMIT = 16 * FORMULA  # three norms, an attention, four products


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latent(layers, causal):
    """A pooler all of whose weights say something."""
    made = LatentPooler(WIDTH, layers, causal, LATENTS, HEADS, 2).double()
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter += 0.2 * drawn(*parameter.shape, seed=i)
    return made


def norm(x, module):
    middle = x - x.mean(-1, keepdim=True)
    return middle / (middle.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def reference(pooler, tokens, layered):
    """The vector of one text, from the rows ``[S, D]`` that its latents attend to, a head at a time."""
    u = norm(tokens, pooler.norm_kv)
    u = u + pooler.layer if layered else u
    z, d = pooler.latents, WIDTH // HEADS
    q, k, v = norm(z, pooler.norm_q) @ pooler.q.weight.T, u @ pooler.k.weight.T, u @ pooler.v.weight.T
    heads = []
    for head in range(HEADS):
        at = slice(head * d, (head + 1) * d)
        heads.append((q[:, at] @ k[:, at].T / d**0.5).softmax(-1) @ v[:, at])
    x = z + torch.cat(heads, -1) @ pooler.o.weight.T
    value, gate = (norm(x, pooler.norm_x) @ pooler.up.weight.T + pooler.up.bias).split(2 * WIDTH, -1)
    return (x + (value * gelu(gate)) @ pooler.down.weight.T + pooler.down.bias).mean(0)


@pytest.mark.parametrize("layers", [0, LAYERS])
@pytest.mark.parametrize("causal", [False, True])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), left=st.booleans(), more=st.integers(0, 2))
def test_latents_attend_to_what_the_design_says_and_to_no_padding(layers, causal, lengths, left, more):
    pooler, size = latent(layers, causal), max(lengths) + more
    states = torch.full((len(lengths), layers + 1, size, WIDTH), torch.nan, dtype=torch.float64)
    mask, want = torch.zeros(len(lengths), size).bool(), []
    with torch.no_grad():
        for i, length in enumerate(lengths):
            own = drawn(layers + 1, length, WIDTH, seed=i)
            at = slice(size - length, size) if left else slice(length)
            states[i, :, at], mask[i, at] = own, True
            if layers:
                tokens = own[1:, -1] if causal else own[1:].mean(1)  # not the embeddings
            else:
                tokens = own[-1, -1:] if causal else own[-1]
            want.append(reference(pooler, tokens, layers > 0))
        got = pooler(states if layers else states[:, -1], mask)
    assert_close(got, torch.stack(want), LIMIT)


@torch.no_grad()
def test_special_cases():
    h, mask = drawn(2, 4, WIDTH), torch.ones(2, 4).bool()
    pooler = latent(0, False)
    got = pooler(h, mask)
    pooler.latents.copy_(pooler.latents[torch.tensor([3, 0, 4, 1, 2])])
    assert_close(pooler(h, mask), got, LIMIT)  # the order of latents says nothing
    assert is_far(pooler(h, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()), got, LIMIT)
    new = LatentPooler(WIDTH, 0, False, LATENTS, HEADS, 2).double()
    new.latents.zero_()
    assert_close(new(h, mask), norm(h, new.norm_kv).mean(1), LIMIT)  # begins as the mean of normalised states
    one = drawn(2, 1, WIDTH)
    alone = latent(0, True)
    alone.q.weight.mul_(7)  # over one key there is nothing to choose
    got = alone(one, mask[:, :1])
    alone.q.weight.zero_()
    assert_close(alone(one, mask[:, :1]), got, LIMIT)
    odd = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(last(h, odd), torch.stack([h[0, 2], h[1, 0]]))


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_designs_on_a_model_and_in_a_file(name, side, tmp_path):
    made = encoder_of(tiny("llama"), words_tokenizer(), DESIGNS[name])
    made.tokenizer.padding_side = side
    read = made.read(TEXTS)
    together = made.embed(read)
    assert_close(together.norm(dim=1), torch.ones(3), SAME)
    assert_close(together, torch.cat([made.embed(made.read([text])) for text in TEXTS]), SAME)
    assert is_bidirectional(made.model) == ("causal" not in DESIGNS[name])
    ends = read["input_ids"].gather(
        1, (read["attention_mask"] * torch.arange(read["input_ids"].shape[1])).argmax(1)[:, None]
    )
    assert bool((ends == 1).all()) == ("causal" in DESIGNS[name])  # w1 ends texts
    if name in "123":
        states = made.model(**read, output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 1
    made.float().save(tmp_path)
    again = TextEncoder.load(tmp_path, dtype=torch.float32)
    assert_close(again.encode(TEXTS), made.encode(TEXTS), SAME)
    modules = [one["type"].rpartition(".")[2] for one in json.loads((tmp_path / "modules.json").read_text())]
    own = name in "2345"
    assert modules == ["Transformer", "SentencePooler" if own else "Pooling", "Normalize"]
    assert json.loads((tmp_path / "config.json").read_text()).get("output_hidden_states", False) == (name in "35")


@pytest.mark.parametrize("name", DESIGNS)
def test_sentence_transformers_loads_it(name, tmp_path):
    theirs = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    made = encoder_of(tiny("llama"), words_tokenizer(), DESIGNS[name]).float()
    made.save(tmp_path)
    found = theirs.SentenceTransformer(str(tmp_path), device="cpu", **{f"trust{'_'}remote_code": name in "2345"})
    assert_close(found.encode(TEXTS), made.encode(TEXTS), SAME)


def test_a_token_that_also_pads_counts_where_it_is_text():
    tokenizer = words_tokenizer()
    tokenizer.pad_token = "w1"  # what ends texts pads too, as in many decoders
    made = encoder_of(tiny("llama"), tokenizer, DESIGNS["5"])
    read = made.read(["w5 w1 w9", "w4"])
    assert read["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [("pooling:mask=left", "mask is"), ("pooling:pooling=max", "pooling is"), ("pooling:latents=0", "1 or more")],
)
def test_fields_that_mean_nothing_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)


def test_heads_that_do_not_divide_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="take heads=6"):
        encoder_of(tiny("llama"), words_tokenizer(), "pooling:heads=7")
    assert isinstance(encoder_of(tiny("gpt2"), words_tokenizer(), DESIGNS["mean"]).pooler, Mean)
