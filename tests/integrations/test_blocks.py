# SPDX-License-Identifier: Apache-2.0
"""The residual stream through the port: what a block is; reading changes nothing, changing does, all is undone."""

import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers

import manyheads
from manyheads.errors import UserError
from manyheads.integrations.blocks import block_of, output_of
from manyheads.integrations.transformers import find_sites
from manyheads.strategy import AttentionWatch, Residual
from oracles import models
from oracles.fingerprint import assert_same, of_model
from tolerance import CLOSE, assert_close, error, is_close


class Read(Residual):
    def residual(self, site, hidden, state):
        state.setdefault("hidden", []).append((site.name, hidden))
        return hidden


@dataclass(frozen=True, kw_only=True)
class Shift(Residual):
    by: float = 1.0

    def residual(self, site, hidden, state):
        return torch.cat([hidden[..., :1] + self.by, hidden[..., 1:]], -1)  # a norm takes a shift of all channels out


@pytest.mark.parametrize("name", models.ALL)
def test_reading_changes_no_bit_and_each_block_is_read_once(name):
    model = models.tiny(name)
    plain = models.forward(name, model)
    before = of_model(model)
    read = Read()
    with manyheads.use(model, read) as port:
        assert torch.equal(models.forward(name, model), plain)
    assert_same(of_model(model), before)
    seen = [len(kept.get("hidden", [])) for kept in port.state(read).values()]
    blocks = {id(block_of(model, site.name)) for site, _ in find_sites(model)}
    assert sum(seen) == len(blocks) and max(seen) == 1
    with manyheads.use(model, Shift()):
        assert error(models.forward(name, model), plain) > 1e-3
    with pytest.raises(ZeroDivisionError), manyheads.use(model, Shift()):
        raise ZeroDivisionError
    assert_same(of_model(model), before)
    assert torch.equal(models.forward(name, model), plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "whisper"])
def test_it_is_the_output_of_the_block(name):
    """As the model itself returns hidden states: that of layer n is what enters layer n + 1."""
    model = models.build(name)  # transformers leaves hooks where hidden states were asked for
    read = Read()
    given = models.inputs(name)
    if name in models.SEQ2SEQ:
        given["decoder_input_ids"] = models.tokens(2, 11, seed=1)
    with manyheads.use(model, read) as port, torch.no_grad():
        out = model(**given, output_hidden_states=True)
    states = getattr(out, "decoder_hidden_states", None) or out.hidden_states
    kept = [hidden for state in port.state(read).values() for _, hidden in state.get("hidden", [])]
    mine = kept[-2] if name in models.SEQ2SEQ else kept[0]
    assert_close(mine, states[1], CLOSE)
    assert error(mine, states[0]) > 1e-3


@pytest.mark.parametrize("name", models.ALL)
def test_output_projection_mixes_the_heads(name):
    """Heads through the weight of the site, and the bias, are what the attention module returns."""
    model = models.tiny(name)
    outs, modules = {}, {}

    class Watch(AttentionWatch):
        def watch(self, call, out):
            outs[call.site.name] = out

    handles = []
    for site, module in find_sites(model):
        inner = module if name != "bert" else model.get_submodule(site.name.rpartition(".")[0] + ".output.dense")
        handles.append(
            inner.register_forward_hook(
                lambda m, a, o, s=site.name: modules.update({s: o[0] if isinstance(o, tuple) else o})
            )
        )
    with manyheads.use(model, Watch()):
        models.forward(name, model)
    for handle in handles:
        handle.remove()
    for site, _ in find_sites(model):
        weight = output_of(model, site.name)()
        made = outs[site.name].flatten(2) @ weight.T
        want = modules[site.name]
        bias = (want - made).flatten(0, 1).mean(0)  # the one thing that is missing, the same for every token
        assert_close(made + bias, want, CLOSE)
        assert error(outs[site.name].flip(2).flatten(2) @ weight.T, want) > 1e-2


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model = models.build("llama")
    fast = torch.compile(model, backend="eager")
    ids = models.tokens(2, 12)
    with torch.no_grad():
        plain = fast(ids).logits
        with manyheads.use(model, Shift()):
            assert_close(fast(ids).logits, model(ids).logits)
            assert error(fast(ids).logits, plain) > 1e-3
        assert torch.equal(fast(ids).logits, plain)
    torch._dynamo.reset()


def test_blocks_that_carry_several_streams():
    """Gemma 3n: attention is looked at and one warning says what is not; what needs the stream is refused."""
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8, hidden_size_per_layer_input=8,
        activation_sparsity_pattern=[0.0] * 4, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model, ids = transformers.Gemma3nForCausalLM(config).eval(), models.tokens(2, 15)
    results = []
    for run in (lambda: model.generate(ids, max_new_tokens=5, do_sample=False), lambda: model(results[0][0][:, :-1])):
        with (
            pytest.warns(UserWarning, match=r"gives \[4, 2, \d+, 32\], no residual stream") as said,
            manyheads.watch(model, "active_dormant") as seen,
            torch.no_grad(),
        ):
            out = run()
        assert len([w for w in said if "no residual stream" in str(w.message)]) == 1
        results.append((out, seen.compute().tables))
    decoded, whole = (tables["sink"].values for _, tables in results)
    assert decoded.shape == (2, 4, 4) and is_close(decoded, whole) and "peak" not in results[0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with manyheads.watch(model, "massive_values"), torch.no_grad():
            model(ids)  # asks for no stream
    with pytest.raises(UserError, match="acts on the residual stream"), manyheads.use(model, Shift()), torch.no_grad():
        model(ids)
