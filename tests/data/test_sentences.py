# SPDX-License-Identifier: Apache-2.0
"""Sentences and pairs are read from the files that hold them, whatever folder of an archive they stand in."""

import zipfile

import pytest

from manyheads.data import files
from manyheads.data.sentences import Pair, Request, pairs, requests


@pytest.mark.parametrize("home", ["snips/", "JointBERT-e21014/data/snips/"])
def test_requests_of_either_packing(home, monkeypatch, tmp_path):
    place = tmp_path / "held.zip"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("JointBERT-e21014/data/atis/train/label", "O\n")
        for part in ("train", "dev", "test"):
            archive.writestr(f"{home}{part}/label", "Play\nRate\n")
            archive.writestr(f"{home}{part}/seq.in", f"play it {part} \nfive stars\n")
            archive.writestr(f"{home}{part}/seq.out", "O O B-what\nB-stars O\n")
    monkeypatch.setattr(files, "local", lambda name: place if home == "snips/" else None)
    monkeypatch.setattr(files, "path", lambda name: place)
    found = requests()
    assert found[0] == Request("train 0", "play it train", "Play", "train", ("O", "O", "B-what")) and len(found) == 6
    assert [one.part for one in found] == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2


def test_pairs_of_either_form(monkeypatch):
    head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    held = {
        "sick-train": f"{head}7\ta b\tc\t4.5\tNEUTRAL\n", "sick-test": f"{head}8\td\te\t1\tENTAILMENT \n",
        "sts-2014-images": "3.6\ta\tb\n\tnot judged\tx\n0\tc\td\n",
    }  # fmt: skip
    monkeypatch.setattr(files, "text", held.__getitem__)
    assert pairs("sick") == [
        Pair("train 7", "a b", "c", 4.5, "NEUTRAL", "train"), Pair("test 8", "d", "e", 1.0, "ENTAILMENT", "test"),
    ]  # fmt: skip
    found = pairs("sts-2014-images")
    assert [(one.name, one.score, one.part) for one in found] == [("0", 3.6, "test"), ("2", 0.0, "test")]
