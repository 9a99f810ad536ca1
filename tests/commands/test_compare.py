# SPDX-License-Identifier: Apache-2.0
"""The verbs `compare` and `report` as they are typed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from manyheads.cli import main
from manyheads.experiment import Results
from tiny import compare as tiny
from tiny import pipelines

texts, tokenizer, model, folder = tiny.texts, tiny.tokenizer, tiny.model, tiny.folder
folders = pipelines.folders

FAST = [
    "--strategies",
    "random,snapkv:window_size=8",
    "--budgets",
    "0.3",
    "--tasks",
    "perplexity,memory",
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
    assert "perplexity, 200 tokens" in err
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
    assert document["experiment"]["seed"] == 0 and document["command"][0] == "manyheads"
    assert {metric["metric"] for metric in document["metrics"]} == {"token_nll", "cache"}


def test_folders(cli, folder, tmp_path):
    """A second run without --out gets a folder of its own; a finished one is shown again, not measured again."""
    base = ("compare", "--model", str(folder), *FAST)
    assert cli(*base)[0] == 0 and cli(*base)[0] == 0
    assert (tmp_path / "manyheads-report-2" / "report.html").exists()
    units = sorted((tmp_path / "manyheads-report" / "units").iterdir())
    before = [unit.stat().st_mtime_ns for unit in units]
    assert cli(*base, "--out", "manyheads-report")[0] == 0 and cli("compare", "--resume", "manyheads-report")[0] == 0
    assert [unit.stat().st_mtime_ns for unit in units] == before
    code, _, err = cli(*base, "--seed", "3", "--out", "manyheads-report")
    assert code == 2 and "finished run of other options" in err
    code, _, err = cli("compare", "--resume", "manyheads-report", "--seed", "3")
    assert code == 2 and "leave --seed away" in err
    units[0].unlink()
    assert cli(*base)[0] == 0 and Results.read(tmp_path / "manyheads-report").finished
    assert not (tmp_path / "manyheads-report-3").exists()


def test_a_pipeline_is_compared(cli, folders, tmp_path):
    """A folder with model_index.json is a pipeline; what acts on language models alone is refused there."""
    base = ("compare", "--model", str(folders["moving"]), "--strategies", "pab:upper=1000,lower=1", "--samples", "2")
    code, out, err = cli(*base, "--out", "p")
    assert code == 0 and "PSNR to the plain image" in out and "seconds an image" in out and "budget" not in out, err
    results = Results.read(tmp_path / "p")
    assert {row.task for row in results.rows} == {"fidelity", "denoising_cost"}
    (near,) = {row.value for row in results.rows if (row.arm, row.metric) == ("full", "psnr")}
    others = [row.value for row in results.rows if row.arm != "full" and row.metric == "psnr"]
    assert near == 100 and len(others) == 2 and max(others) < 100
    for wrong, said in (
        (("--strategies", "snapkv"), "snapkv does not act on pipeline"), (("--lengths", "200"), "leave --lengths away"),
        (("--tasks", "perplexity"), "perplexity does not measure on a pipeline"),
    ):  # fmt: skip
        code, out, err = cli("compare", "--model", str(folders["moving"]), "--strategies", "pab", *wrong, "--out", "q")
        assert code == 2 and said in err and not (tmp_path / "q").exists()
    code, _, err = cli("compare", "--model", str(folders["moving"]))
    assert code == 2 and "--strategies" in err


def test_a_lens_that_edits_is_an_arm(cli, folder, tmp_path):
    """Head 0.0 without its output predicts otherwise than the whole model, on the same contexts."""
    code, out, err = cli(
        "compare", "--model", str(folder), "--strategies", "ablate:heads=0.0+1.1", "--tasks", "perplexity",
        "--lengths", "64", "--samples", "3", "--out", "e",
    )  # fmt: skip
    assert code == 0 and "ablate:heads=0.0+1.1" in out, err
    values = {}
    for row in Results.read(tmp_path / "e").rows:
        values.setdefault(row.arm, {})[row.sample] = row.value
    assert values["full"].keys() == values["ablate:heads=0.0+1.1"].keys()
    assert all(values["full"][sample] != values["ablate:heads=0.0+1.1"][sample] for sample in values["full"])


def test_workers_give_what_a_serial_run_gives(cli, folder, tmp_path):
    base = ("compare", "--model", str(folder), *FAST[:-4], "--lengths", "128,200", "--samples", "3")
    base = tuple("perplexity,niah_single,memory" if part == "perplexity,memory" else part for part in base)
    for name, more in (("serial", ()), ("workers", ("--workers", "2"))):
        code, _, err = cli(*base, *more, "--out", name)
        assert code == 0, err
    serial, workers = Results.read(tmp_path / "serial"), Results.read(tmp_path / "workers")
    assert serial.rows == workers.rows and len(serial.run["units"]) > 2
    assert cli(*base, "--workers", "2", "--ray", "local")[0] == 2


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_killed_and_resumed_equals_uninterrupted(cli, folder, tmp_path):
    """kill -9 between two units, then --resume: the same rows."""
    options = ["--model", str(folder), "--strategies", "snapkv:window_size=8,keydiff", "--budgets", "0.3"]
    options += ["--tasks", "niah_single", "--lengths", ",".join(map(str, range(300, 900, 100))), "--samples", "4"]
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "manyheads", "compare", *options, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline and not list(out.glob("units/*.jsonl")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert not Results.read(out).finished
    for arguments in (["--resume", "killed"], [*options, "--out", "whole"]):
        assert cli("compare", *arguments, "--json")[0] == 0
    killed, whole = Results.read(out), Results.read(tmp_path / "whole")
    assert killed.rows == whole.rows and killed.run["experiment"] == whole.run["experiment"]


def test_own_text(cli, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "story.txt").write_text(
        "It was a dark and stormy night, and the rain fell in torrents. " * 200
    )
    code, _, _ = cli("compare", "--model", str(folder), "--text", "mine", *FAST, "--out", "o")
    run = Results.read(tmp_path / "o").run
    assert code == 0 and run["texts"]["files"] == 1


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
    (["--tasks", "perplexty"], "did you mean perplexity"),
    (["--lengths", "many"], "number of tokens"),
    (["--lengths", "8"], "at least 32"),
    (["--lengths", "100000"], "reads 2048 tokens"),
    (["--model", "missing/folder/deep"], "no such folder"),
    (["--device", "gpu0"], "unknown device"),
    (["--dtype", "half"], "use float32, bfloat16, float16"),
    (["--samples", "0"], "samples"),
    (["--resume", "nowhere"], "no run"),
    (["--nonsense"], "nonsense"),
]
TRAINED = ["--train", "--tasks", "sequence_classification:data=tones"]
BAD_TRAINED = [
    (["--strategies", "coca"], "sees the past only"),
    (["--budget", "1M"], "--budget does not go with --tasks"),
    (["--lengths", "256"], "--lengths does not go with --tasks"),
    (["--model", "x"], "--model does not go with --train"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(cli, folder, tmp_path, options, word):
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


@pytest.mark.parametrize(("options", "word"), BAD_TRAINED, ids=[options[0] for options, _ in BAD_TRAINED])
def test_tasks_of_a_training_say_their_own_sizes(cli, options, word):
    code, out, err = cli("compare", *TRAINED, *options, "--out", "out")
    assert code == 2 and out == "" and re.search(word, err), err
    assert len(err.strip().splitlines()) == 1


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


def test_dtype_is_the_checkpoints_or_the_one_given(cli, folder, tmp_path):
    """So that bytes of cache are those of use; float16 checkpoints are bfloat16 here, where float16 is slow."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "half")
    held = {}
    for name, more in {"half": (), "float32": ("--dtype", "float32"), "plain": ()}.items():
        place = folder if name == "plain" else tmp_path / "half"
        code, _, err = cli("compare", "--model", str(place), "--quick", "--tasks", "memory", *more, "--out", name)
        assert code == 0, err
        results = Results.read(tmp_path / name)
        held[results.run["model"]["dtype"]] = next(row.value for row in results.rows if row.arm == "full")
    assert held["float32"] == 2 * held["bfloat16"] and len(held) == 2


def test_quick_is_small(cli, folder, tmp_path):
    code, _, err = cli("compare", "--model", str(folder), "--quick", "--tasks", "perplexity", "--out", "q")
    assert code == 0, err
    run = Results.read(tmp_path / "q").run["experiment"]
    assert run["tasks"]["perplexity"]["lengths"] == "(512,)" and run["tasks"]["perplexity"]["samples"] == "3"
    assert [arm["key"] for arm in run["arms"]] == [
        "full",
        *(f"{s}:budget=0.25" for s in ("random", "streaming_llm", "snapkv", "keydiff")),
        "hedge:window_size=128,budget=0.1",
    ]


@pytest.mark.parametrize(
    ("name", "chats", "want"), [("default", False, "code"), ("a/chat", True, "prose"), ("a/Coder-1B", True, "code"),
                                ("a/base", False, "code"), ("a/decoder", True, "prose")],
)  # fmt: skip
def test_the_text_fits_the_model(monkeypatch, name, chats, want):
    from manyheads.comparison import _fitting
    from manyheads.experiment import CausalLM

    monkeypatch.setattr(CausalLM, "chats", property(lambda subject: chats))
    assert _fitting(CausalLM(name)) == want
