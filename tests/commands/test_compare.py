# SPDX-License-Identifier: Apache-2.0
"""The verbs `compare` and `report` as they are typed."""

import json

import pytest

from manyheads.cli import main
from manyheads.compare import Results
from tiny import compare as tiny

texts, tokenizer, model, folder = tiny.texts, tiny.tokenizer, tiny.model, tiny.folder

FAST = [
    "--strategies",
    "random,snapkv:window_size=8",
    "--budgets",
    "0.3",
    "--tasks",
    "loss,memory",
    "--lengths",
    "200",
    "--samples",
    "3",
]


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_compare_then_report(cli, folder, tmp_path):
    code, out, err = cli("compare", "--model", str(folder), *FAST)
    assert code == 0 and "snapkv:window_size=8" in out and "seed 0" in out and "manyheads-report/report.html" in out
    assert "loss, 200 tokens" in err
    page = tmp_path / "manyheads-report" / "report.html"
    before = page.read_text()
    page.unlink()
    code, again, _ = cli("report", "manyheads-report")
    assert code == 0 and again == out and page.read_text() == before
    code, out, err = cli("report", "manyheads-report", "--json")
    assert code == 0 and err == "" and json.loads(out)["finished"]


def test_json_is_all_that_is_printed(cli, folder):
    code, out, err = cli("compare", "--model", str(folder), *FAST, "--json", "--out", "x")
    document = json.loads(out)
    assert (
        code == 0
        and err == ""
        and [a["arm"] for a in document["arms"]] == ["full", "random:budget=0.3", "snapkv:window_size=8,budget=0.3"]
    )
    assert document["settings"]["seed"] == 0 and document["command"][0] == "manyheads"


def test_folders(cli, folder, tmp_path):
    """A second run without --out gets a folder of its own; a finished one is shown again, not measured again."""
    base = ("compare", "--model", str(folder), *FAST)
    assert cli(*base)[0] == 0 and cli(*base)[0] == 0
    assert (tmp_path / "manyheads-report-2" / "report.html").exists()
    rows = (tmp_path / "manyheads-report" / "rows.jsonl").stat().st_mtime_ns
    assert cli(*base, "--out", "manyheads-report")[0] == 0 and cli("compare", "--resume", "manyheads-report")[0] == 0
    assert (tmp_path / "manyheads-report" / "rows.jsonl").stat().st_mtime_ns == rows
    code, _, err = cli(*base, "--seed", "3", "--out", "manyheads-report")
    assert code == 2 and "finished run of other options" in err
    path = tmp_path / "manyheads-report" / "rows.jsonl"
    path.write_text("")
    assert cli(*base)[0] == 0 and Results.read(tmp_path / "manyheads-report").finished
    assert not (tmp_path / "manyheads-report-3").exists()


def test_own_text(cli, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "story.txt").write_text(
        "It was a dark and stormy night, and the rain fell in torrents. " * 200
    )
    code, _, _ = cli("compare", "--model", str(folder), "--text", "mine", *FAST, "--out", "o")
    run = Results.read(tmp_path / "o").run
    assert code == 0 and run["texts"]["files"] == 1 and run["sources"][0]["name"] == "story.txt"


BAD = [
    (["--strategies", "snapvk"], "did you mean snapkv"),
    (["--strategies", "snapkv:windwo_size=3"], "window_size"),
    (["--strategies", "snapkv:kernel_size=x"], "kernel_size=x"),
    (["--strategies", "lightning"], "unknown strategy|no strategy yet"),
    (["--budgets", "0"], "above 0"),
    (["--budgets=-0.5"], "above 0"),
    (["--budgets", "1.5"], "at most 1.0"),
    (["--budgets", "half"], "not 'half'"),
    (["--strategies", "snapkv", "--budgets", "8"], "protected"),
    (["--text", "missing.txt"], "no such file"),
    (["--text", "binary"], "not UTF-8"),
    (["--text", "short.txt"], "too short"),
    (["--tasks", "lose"], "did you mean loss"),
    (["--lengths", "many"], "number of tokens"),
    (["--lengths", "8"], "at least 32"),
    (["--lengths", "100000"], "too long"),
    (["--model", "missing/folder/deep"], "no such folder"),
    (["--device", "gpu0"], "unknown device"),
    (["--samples", "0"], "samples"),
    (["--resume", "nowhere"], "no run"),
    (["--nonsense"], "nonsense"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(cli, folder, tmp_path, options, word):
    import re

    (tmp_path / "binary").write_bytes(b"\0\1\2")
    (tmp_path / "short.txt").write_text("too little")
    before = sorted(p.name for p in tmp_path.iterdir())
    model = [] if "--model" in options or "--resume" in options else ["--model", str(folder)]
    code, out, err = (
        cli("compare", *model, *options, "--out", "out") if "--resume" not in options else cli("compare", *options)
    )
    assert code == 2 and out == "" and re.search(word, err), err
    first, *rest = err.strip().splitlines()
    assert first.startswith("error: ") and len(rest) == (options == ["--nonsense"] or "--samples" in options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_no_gpu_is_said(cli, folder):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, _, err = cli("compare", "--model", str(folder), "--device", "cuda")
    assert code == 2 and "no GPU" in err


def test_a_model_without_a_way_in_is_refused(cli, tmp_path, tokenizer):
    from transformers import BertConfig, BertForMaskedLM

    place = tmp_path / "bert"
    config = BertConfig(vocab_size=1500, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    code, _, err = cli("compare", "--model", str(place))
    assert code == 2 and len(err.strip().splitlines()) == 1 and "error:" in err


def test_quick_is_small(cli, folder, tmp_path):
    code, _, _ = cli("compare", "--model", str(folder), "--quick", "--out", "q")
    settings = Results.read(tmp_path / "q").run["settings"]
    assert code == 0 and settings["lengths"] == [512] and settings["samples"] == 3
    assert settings["strategies"] == [
        "full",
        *(f"{s}:budget=0.25" for s in ("random", "streaming_llm", "snapkv", "keydiff")),
        "hedge:window_size=128,budget=0.1",
    ]
