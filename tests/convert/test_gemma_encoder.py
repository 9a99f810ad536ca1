# SPDX-License-Identifier: Apache-2.0
"""Gemma encoder: tokens see both sides, in a file too; poolers are their formulas, padding is no matter."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface

from manyheads import UserError, parse
from manyheads.conversion import EncoderDesign
from manyheads.convert._poolers import Ends, Mean, Memory, Probe, mean
from manyheads.converter import convert_model, encoder_of
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.bidirectional import dropped_out, is_bidirectional
from manyheads.integrations.precision import cast
from manyheads.models.text_encoder import FILE, TextEncoder
from manyheads.recipes.text_encoder import train_encoder
from manyheads.training.encoding import class_loss, list_loss, pair_loss, score_loss, tune
from oracles.conversions import WIDTH, WORDS, tiny
from oracles.texts import words_tokenizer
from tolerance import DEEP, FORMULA, SAME, assert_close, is_far

DECODERS = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
POOLERS = {
    "mean": Mean(), "first 2": Ends(2, last=False), "last": Ends(), "query": Probe(WIDTH, 2, 3),
    "kv": Memory(WIDTH, 2, 5),
}  # fmt: skip


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def random_poolers():
    """Weights that are neither zero nor one."""
    for pooler in POOLERS.values():
        pooler.double()
        for i, parameter in enumerate(pooler.parameters()):
            parameter.data += 0.3 * drawn(*parameter.shape, seed=i)


def encoder(kind="llama", spec="gemma_encoder", outputs=0, **more):
    return encoder_of(tiny(kind), words_tokenizer(), spec, outputs=outputs, **more)


def everything_visible(model, ids):
    """States of a decoder that is given a mask over all pairs."""
    return model.base_model(input_ids=ids, attention_mask=torch.ones(len(ids), 1, *2 * ids.shape[1:]).bool())[0]


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "gemma3"])
@pytest.mark.parametrize("how", ["eager", "sdpa"])
@torch.no_grad()
def test_states_are_those_under_a_mask_of_all_pairs(kind, how):
    model, ids = tiny(kind), (torch.arange(18).view(2, 9) * 7) % WORDS
    model.set_attn_implementation(how)
    before = model(ids)[0]
    made = encoder_of(model, words_tokenizer(), "gemma_encoder")
    got, want = made.model(input_ids=ids)[0], everything_visible(model, ids)
    assert_close(got, want, SAME)  # norms of some compute in float32
    assert is_far(got, model.base_model(input_ids=ids)[0], SAME)
    assert torch.equal(before, model(ids)[0])  # the decoder stays one


@torch.no_grad()
def test_windows_reach_as_far_behind_as_before():
    model = tiny("gemma3", num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=3)
    made = encoder_of(model, words_tokenizer(), "gemma_encoder").model
    ids = torch.arange(9)[None] + 3
    other = ids.clone()
    other[0, 4] = 40
    moved = ((made(ids)[0] - made(other)[0]).norm(dim=-1) > 1e-6)[0]
    assert moved.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("spec", ["gemma_encoder", "gemma_encoder:mask=causal,pooler=last"])
def test_a_file_keeps_what_tokens_see(kind, spec, tmp_path):
    made = encoder(kind, spec, outputs=3).float()
    texts = ["w5 w9 w11", "w7", "w8 w3 w2 w30 w12 w9"]
    assert is_bidirectional(made.model) == ("causal" not in spec)
    made.save(tmp_path)
    again = TextEncoder.load(tmp_path, dtype=torch.float32)
    again.tokenizer = made.tokenizer  # transformers loads that of the model's type, which this one is not
    assert is_bidirectional(again.model) == is_bidirectional(made.model)
    assert_close(again.encode(texts), made.encode(texts), SAME)
    assert_close(again.predict(texts), made.eval().predict(texts), SAME)
    if "causal" in spec:
        return
    config = json.loads((tmp_path / "config.json").read_text())  # one that loses its flag is told
    config.pop("is_causal", None)
    config.pop("use_bidirectional_attention", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="saw both sides when it was saved and do not here"):
        TextEncoder.load(tmp_path)


def test_the_probe_asks_the_model_and_not_its_config():
    assert is_bidirectional(tiny("bert")) and not is_bidirectional(tiny("llama"))
    liar = tiny("llama")
    liar.config.is_causal = False
    assert is_bidirectional(liar)

    def deaf(module, q, k, v, mask, scaling, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("deaf", deaf)
    liar.set_attn_implementation("deaf")
    assert liar.config.is_causal is False and not is_bidirectional(liar)
    with pytest.raises(UserError, match="does not heed the mask"):
        encoder_of(liar, words_tokenizer(), "gemma_encoder")


@pytest.mark.parametrize("name", POOLERS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), left=st.booleans(), more=st.integers(0, 3))
def test_padding_and_what_it_holds_change_no_vector(name, lengths, left, more):
    pooler, size = POOLERS[name], max(lengths) + more
    states, mask = (
        torch.full((len(lengths), size, WIDTH), torch.nan, dtype=torch.float64),
        torch.zeros(len(lengths), size),
    )
    alone = []
    for i, length in enumerate(lengths):
        row = drawn(1, length, WIDTH, seed=i)
        at = slice(size - length, size) if left else slice(length)
        states[i, at], mask[i, at] = row[0], 1
        alone.append(pooler(row, torch.ones(1, length).bool()))
    assert_close(pooler(states, mask.bool()), torch.cat(alone), FORMULA)


def test_poolers_are_their_formulas():
    h, full = drawn(2, 7, WIDTH), torch.ones(2, 7).bool()
    assert_close(POOLERS["mean"](h, full), h.mean(1), FORMULA)
    assert_close(POOLERS["first 2"](h, full), h[:, :2].mean(1), FORMULA)
    assert torch.equal(POOLERS["last"](h, full), h[:, -1])
    assert_close(Ends(9)(h, full), h.mean(1), FORMULA)  # all of a shorter text
    query, kv = POOLERS["query"], POOLERS["kv"]
    d = WIDTH // 2
    with torch.no_grad():
        want = torch.zeros(2, WIDTH, dtype=torch.float64)
        for probe in query.probes:
            heads = []
            for part in (slice(0, d), slice(d, WIDTH)):
                scores = (query.k(h)[..., part] * probe[part]).sum(-1) / d**0.5
                heads.append((scores.softmax(1)[..., None] * query.v(h)[..., part]).sum(1))
            want += query.o(torch.cat(heads, -1)) / len(query.probes)
        assert_close(query(h, full), want, 4 * FORMULA)
        heads = []
        for part in (slice(0, d), slice(d, WIDTH)):
            scores = kv.q(h)[..., part] @ kv.keys[:, part].T / d**0.5
            heads.append(scores.softmax(-1) @ kv.values[:, part])
        assert_close(kv(h, full), (h + kv.o(torch.cat(heads, -1))).mean(1), 4 * FORMULA)
    for new in (Probe(WIDTH), Memory(WIDTH)):  # both begin as the mean
        assert_close(new.double()(h, full), h.mean(1), FORMULA)
    mask = full.clone()
    mask[:, 5:] = False
    assert is_far(mean(h, mask), h.mean(1), FORMULA)  # the oracle above tells a mean over padding apart


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_a_batch_is_its_texts_alone_whatever_side_is_padded(kind, side):
    made = encoder(kind, "gemma_encoder:pooler=last")
    made.tokenizer.padding_side = side
    texts = ["w5 w9 w11", "w7", "w8 w3 w2 w30 w12 w9"]
    together = made.embed(made.read(texts))
    assert_close(together, torch.cat([made.embed(made.read([text])) for text in texts]), SAME)
    read = made.read(texts)
    read["input_ids"][read["attention_mask"] == 0] = 33
    assert_close(made.embed(read), together, DEEP)


def test_dropout_is_of_training_alone_and_goes_again():
    made = encoder(spec="gemma_encoder:dropout=0.5")
    model, read, out = made.model, made.read(["w5 w9 w11 w4"]), []
    layer = model.layers[0]
    want = made.eval().embed(read)
    with pytest.raises(RuntimeError, match="enough"), dropped_out(model, 0.5):
        assert torch.equal(made.eval().embed(read), want)
        made.train()
        with torch.no_grad():
            layer.mlp.register_forward_hook(lambda *given: out.append(given[-1]))
            assert is_far(made.embed(read), want, SAME)
        assert layer.self_attn.attention_dropout == 0.5
        raise RuntimeError("enough")
    assert layer.self_attn.attention_dropout == 0 and model.config.attention_dropout == 0
    assert abs(float((out[0] == 0).double().mean()) - 0.5) < 0.2
    assert torch.equal(made.embed(read), want)  # still in training mode
    with dropped_out(tiny("bert"), 0.5):
        pass


def test_losses_are_their_formulas():
    said = drawn(6, 1)
    grades = torch.tensor([[1.0, 0, 0], [0, 2, 2]])
    want = -(said.view(2, 3).log_softmax(1) * torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])).sum(1).mean().float()
    assert_close(list_loss(lambda _: said, (None, grades)), want, 4 * SAME)
    scores = torch.tensor([1.0, 2, 3, 4, 5, 1])
    assert_close(score_loss(lambda _: said, (None, scores)), (said[:, 0].float() - scores).square().mean(), SAME)
    texts = [drawn(3, 5, seed=i) for i in range(3)]
    unit = [x / x.norm(dim=1, keepdim=True) for x in texts]
    found = (20 * unit[0] @ torch.cat(unit[1:]).T).log_softmax(1)[:, :3].diagonal()
    plain = SimpleNamespace(embed=lambda x: x)
    assert_close(pair_loss(plain, texts), -found.mean().float(), 20 * SAME)
    logits, labels = drawn(4, 3), torch.tensor([0, 2, 1, 1])
    assert_close(class_loss(lambda _: logits, (None, labels)), cross_entropy(logits.float(), labels), SAME)


@pytest.mark.parametrize("train", ["all", "lora", "head"])
@pytest.mark.parametrize("pooler", ["mean", "query"])
def test_training_learns_the_class_and_touches_what_it_says(train, pooler):
    torch.manual_seed(0)
    made = encoder("qwen3", f"gemma_encoder:pooler={pooler},dropout=0.05", outputs=2).float()
    texts = [[f"w{10 + i} w{j} w{20 + i}" for i in range(6)] for j in (4, 5)]
    before = {name: p.clone() for name, p in made.named_parameters()}

    def batch(step):
        return made.read([*texts[0], *texts[1]]), torch.tensor([0] * 6 + [1] * 6)

    state = tune(made, batch, class_loss, 30, lr=5e-3, head_lr=2e-2, train=train, rank=4)
    assert state.losses[-1] < 0.5 * state.losses[0] and not made.training
    after = dict(made.named_parameters())
    assert list(after) == list(before) and all(p.requires_grad for p in after.values())
    moved = {name.split(".")[0] for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved - {"pooler"} == ({"head"} if train == "head" else {"head", "model"})
    assert ("pooler" in moved) == (pooler == "query")


@pytest.mark.parametrize("kind", ["classes", "scores", "pairs"])
def test_the_recipe_learns_each_kind_of_line(kind):
    rows = [[f"w{10 + i} w{4 + i % 2}", f"w{4 + i % 2}"] for i in range(16)]
    if kind == "scores":
        rows = [[a, b, f"{i % 2}"] for i, (a, b) in enumerate(rows)]
    if kind == "pairs":
        rows = [[f"w{10 + i}", f"w{30 + i}", f"w{30 + (i + 1) % 8}"] for i in range(8)]
    state = []
    made, classes = train_encoder(
        encoder("qwen3", "gemma_encoder:dropout=0").float(), rows, kind, budget=30, lr=3e-3, head_lr=1e-2, batch=8,
        on_step=lambda s: state.append(float(s.loss)),
    )  # fmt: skip
    assert state[-1] < 0.5 * state[0] and classes == (("w4", "w5") if kind == "classes" else ())
    assert made.outputs == {"classes": 2, "scores": 1, "pairs": 0}[kind]
    for wrong, said in ((rows[:3], "do not fill a batch"), ([*rows, ["w4", " "]], "line")):
        with pytest.raises(UserError, match=said):
            train_encoder(made, wrong, kind, batch=8)


@pytest.mark.parametrize("spec", ["gemma_encoder", "gemma_encoder:pooler=last", "gemma_encoder:pooler=query"])
def test_sentence_transformers_loads_it(spec, tmp_path):
    theirs = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    made, texts = encoder(spec=spec).float(), ["w5 w9 w11", "w7"]
    made.save(tmp_path)
    found = theirs.SentenceTransformer(str(tmp_path), device="cpu", **{f"trust{'_'}remote_code": "query" in spec})
    assert_close(found.encode(texts), made.encode(texts), SAME)


def test_the_files_are_those_that_sentence_transformers_reads(tmp_path):
    made = encoder(spec="gemma_encoder:pooler=query")
    made.save(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [(one["path"], one["type"]) for one in modules] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "manyheads.models.text_encoder.SentencePooler"),
    ]
    encoder(spec="gemma_encoder").save(tmp_path)  # in its place: no weights of the other are left
    said = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert said["pooling_mode_mean_tokens"] and not said["pooling_mode_lasttoken"]
    assert said["word_embedding_dimension"] == WIDTH and not (tmp_path / "1_Pooling" / "model.safetensors").exists()
    assert json.loads((tmp_path / "sentence_bert_config.json").read_text()) == {"max_seq_length": 512}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gemma_encoder:mask=left", "mask is"), ("gemma_encoder:pooler=max", "pooler is"),
        ("gemma_encoder:count=0", "count is 1"),
        ("gemma_encoder:mask=causal,pooler=first", "see nothing of the text"), ("gemma_encoder:dropout=1", "below 1"),
    ],
)  # fmt: skip
def test_fields_that_mean_nothing_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="makes no encoder"):
        encoder_of(tiny("llama"), words_tokenizer(), "minitron")
    with pytest.raises(UserError, match="encoder_of"):
        convert_model(tiny("llama"), "gemma_encoder", None)
    with pytest.raises(UserError, match="this one is of bert"):
        encoder_of(tiny("bert"), words_tokenizer(), "gemma_encoder")
    with pytest.raises(UserError, match="no pooler of this package"):
        TextEncoder(tiny("bert"), words_tokenizer(), EncoderDesign(pooler="torch.nn:Identity"))
    with pytest.raises(UserError, match="without a token"):
        encoder().read(["w4", " "])
    with pytest.raises(UserError, match="holds no encoder"):
        TextEncoder.load(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(UserError, match="holds no encoder"):
        TextEncoder.load(tmp_path)
    made = ModelAnatomy(tiny("llama"))
    assert parse("gemma_encoder:head=linear").design(made).hidden == 0


def test_rotary_frequencies_keep_their_precision():
    """In bfloat16 a model's own buffers that are no weights stay as transformers makes them."""
    model = cast(tiny("llama"), torch.bfloat16)
    before = model.model.rotary_emb.inv_freq.clone()
    made = encoder_of(model, words_tokenizer(), "gemma_encoder:pooler=query", outputs=3)
    after = made.model.rotary_emb.inv_freq
    assert after.dtype == before.dtype != torch.bfloat16 and torch.equal(after, before)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}


def test_the_head_and_the_dropout_are_those_asked_for():
    anatomy = ModelAnatomy(tiny("llama"))
    found = [parse(f"gemma_encoder{fields}").design(anatomy) for fields in ("", ":head=linear,dropout=0.3")]
    assert [(design.hidden, design.dropout) for design in found] == [(WIDTH, 0.1), (0, 0.3)]
