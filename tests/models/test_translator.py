# SPDX-License-Identifier: Apache-2.0
"""A small translation model learns a language made up, says the same in batches as alone, and is a plain checkpoint."""

import numpy as np
import pytest
import torch

from manyheads import models
from manyheads.data import files
from manyheads.data.translations import IDIOMS, made_up, multi30k
from manyheads.errors import UserError
from manyheads.inspect.signal_run import inspect_signals
from manyheads.inspect.translations import read_translations
from manyheads.lenses.attention_confidence import scores
from manyheads.models.translator import batches, collate, likelihoods, new_tokenizer, translate
from manyheads.recipes import translation
from manyheads.report import inspect as shown_by
from tolerance import CLOSE, SAME, assert_close, is_far

PAIRS = made_up(64, np.random.default_rng(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the recipe, hardly trained, from a file of pairs."""
    place = tmp_path_factory.mktemp("translation")
    (place / "pairs.tsv").write_text("\n".join("\t".join(pair) for pair in PAIRS))
    given = ["--pairs", place / "pairs.tsv", "--out", place / "model", "--budget", "3 steps", "--vocab", "320"]
    assert translation.main([str(x) for x in [*given, "--dim", 32, "--layers", 2, "--batch", 16]]) == 0
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    return models.load_translator(folder / "model")


def test_a_sentence_is_translated_alike_in_any_company(loaded):
    model, tokenizer = loaded
    sentences = [source for source, _ in PAIRS[:5]]
    together = translate(model, tokenizer, sentences, longest=6)
    assert together == [translate(model, tokenizer, [one], longest=6)[0] for one in sentences]
    assert [one.source[-1] for one in together] == [1] * 5  # the token that ends a sentence
    rows = [(one.source, one.target) for one in together]
    alone = torch.cat([likelihoods(model, collate([row])) for row in rows])
    assert_close(likelihoods(model, collate(rows)), alone, SAME)
    wrong = collate(rows)
    wrong["attention_mask"] = torch.ones_like(wrong["attention_mask"])  # padding as if it were source
    assert is_far(likelihoods(model, wrong), alone, SAME)


def test_what_the_decoder_reads_is_one_behind_what_it_says():
    batch = collate([([5, 6, 1], [7, 8, 1]), ([5, 1], [9, 1])])
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 9, 0]]
    assert batch["labels"].tolist() == [[7, 8, 1], [9, 1, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_an_epoch_has_every_pair_once():
    tokenizer = new_tokenizer([text for pair in PAIRS for text in pair], 320)
    get_batch = batches(tokenizer, PAIRS, 16, 0, "cpu")
    epochs = [[get_batch(4 * epoch + i)["input_ids"] for i in range(4)] for epoch in (0, 1)]
    seen = [sorted(tuple(row[row != 0].tolist()) for ids in epoch for row in ids) for epoch in epochs]
    assert seen[0] == seen[1] == sorted(tuple(ids) for ids in tokenizer([source for source, _ in PAIRS])["input_ids"])
    assert not all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))  # in another order


def test_the_language_made_up_has_idioms():
    pairs = made_up(400, np.random.default_rng(1), idioms=0.5)
    with_idiom = [target for _, target in pairs if any(" ".join(said) in target for said in IDIOMS.values())]
    assert 150 < len(with_idiom) < 250
    assert not [target for _, target in made_up(50, np.random.default_rng(1), idioms=0.0) if "zaxo" in target]


def test_inspect_ranks_translations(loaded, folder):
    model, tokenizer = loaded
    (folder / "said.txt").write_text("\n".join([f"{a}\t{b}" for a, b in PAIRS[:5]] + [PAIRS[5][0]]))
    signals = read_translations(folder / "said.txt", model, tokenizer)
    seen = inspect_signals(model, signals, ["attention_confidence"])
    found = seen.others["cross"].found["attention_confidence"].records["sentences"]
    given = {"input_ids": signals[0].values["input_ids"], "decoder_input_ids": signals[0].values["decoder_input_ids"]}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        a = model(**given, output_attentions=True).cross_attentions[0][0].mean(0)
    model.set_attn_implementation("sdpa")
    mine = next(row for row in found if row["prompt"] == 0)
    assert_close(mine["confidence"], scores(a.double().T)["confidence"], 8 * CLOSE)
    page = str(shown_by.page(seen.others["cross"]))
    assert "What each word of a translation attends to" in str(shown_by.page(seen)) and PAIRS[5][0] in page
    assert len(signals[0].words) == len(signals[0].ids) == a.shape[0]
    with pytest.raises(UserError, match="sentence a line"):
        read_translations(folder / "none.txt", model, tokenizer)
    with pytest.raises(UserError, match="no encoder-decoder"):
        models.load_translator(models.default_path())


def test_pairs_of_a_file(folder):
    assert translation.pairs_in(folder / "pairs.tsv") == PAIRS
    (folder / "bad.tsv").write_text("alone\n")
    with pytest.raises(UserError, match="without a translation"):
        translation.pairs_in(folder / "bad.tsv")


def test_multi30k():
    if files.local("multi30k-test-en") is None or files.local("multi30k-test-de") is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    test = multi30k("test")
    assert len(test) == 1000 and test[0][1].startswith("A man in an orange hat")
