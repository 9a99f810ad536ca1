# SPDX-License-Identifier: Apache-2.0
"""Minimal pairs: the sentence as a whole is judged, of every paradigm the same number, and padding says nothing."""

import json
from dataclasses import replace

import pytest
import torch

from manyheads.tasks.training.byte_lm import ByteLM
from manyheads.tasks.training.minimal_pairs import MinimalPairs

from .conftest import SOFTMAX, TEXT, context, values

PAIRS = [("Cats sleep.", "Cats sleeps."), ("Who left?", "Who leaves left then?"), ("It rains.", "It rain.")]


@pytest.fixture
def blimp(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "bias" / "blimp"
    folder.mkdir(parents=True)
    for name in ("agreement", "islands"):
        lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in PAIRS]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path / "data"))
    return folder


class Likes:
    """Stands for a model that finds one byte likelier than all others, wherever it stands."""

    def __init__(self, byte):
        self.byte = byte

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 256)
        logits[..., self.byte] = 3.0
        return logits, None


def judged(task, byte):
    return {row.sample: row.value for row in task.rows(context([]), SOFTMAX, 0, Likes(byte))}


def test_the_likelier_sentence_is_preferred_whatever_the_padding(blimp):
    found = judged(MinimalPairs(**TEXT, each_of=2), ord("s"))
    assert sorted(found) == ["agreement 0", "agreement 1", "islands 0", "islands 1"]
    # One more byte costs more than an s gains; who counted padding, or the mean of a byte, would say otherwise.
    assert set(found.values()) == {1.0}
    swapped = [json.dumps({"sentence_good": bad, "sentence_bad": good}) for good, bad in PAIRS]
    for path in blimp.iterdir():
        path.write_text("\n".join(swapped))
    assert set(judged(MinimalPairs(**TEXT, each_of=2), ord("s")).values()) == {0.0}


def test_the_models_are_those_of_byte_lm(measured, blimp, tmp_path):
    text = ByteLM(**TEXT)
    results = measured(text, MinimalPairs(**TEXT, each_of=3), seeds=2)
    assert len(values(results, "preferred")) == 2 * 6
    assert len({row.about["order"] for row in results.rows if row.metric == "training_nll"}) == 2
    assert len(list((tmp_path / "run" / "models" / "softmax").glob("seed-*"))) == 2  # none was trained twice


def test_without_the_files_it_says_what_to_do(tmp_path, monkeypatch, texts):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("MANYHEADS_DATA", str(tmp_path / "empty"))
    assert "67 files" in MinimalPairs().unsupported_reason(context(texts))
    assert replace(MinimalPairs(), each_of=5).metric("preferred").floor == 0.5
