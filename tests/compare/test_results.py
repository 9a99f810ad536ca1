# SPDX-License-Identifier: Apache-2.0
"""Rows that survive: repeated, torn, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from manyheads import UserError
from manyheads.compare import Results, compare, summarise


def quality(rows):
    return [row for row in rows if row["task"] != "speed"]


def small(model, tokenizer, texts, out, **changes):
    settings = {"tasks": ["loss", "needle"], "lengths": [400, 500], "samples": 3} | changes
    return compare(model, tokenizer, texts, ["random", "hashevict"], [0.3], out=out, **settings)


def test_the_same_command_gives_the_same_figures(model, tokenizer, texts, tmp_path):
    one, two = (small(model, tokenizer, texts, tmp_path / name) for name in "ab")
    assert one.rows == two.rows and one.rows
    assert summarise(one).document()["arms"] == summarise(two).document()["arms"]
    other = small(model, tokenizer, texts, tmp_path / "c", seed=1)
    assert [r["value"] for r in other.rows] != [r["value"] for r in one.rows]


@pytest.mark.parametrize("cut", ["line", "unit", "garbage"])
def test_a_torn_end_is_dropped_and_done_again(model, tokenizer, texts, tmp_path, cut):
    whole = small(model, tokenizer, texts, tmp_path / "whole")
    path = small(model, tokenizer, texts, tmp_path / "torn").folder / "rows.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    text = {
        "line": "".join(lines[:-4]) + lines[-4][:25],
        "unit": "".join(lines[:-4]),
        "garbage": "".join(lines[:-1]) + "\0\0\n",
    }
    path.write_text(text[cut])
    read = Results.read(path.parent)
    assert not read.finished and 0 < len(read.rows) < len(whole.rows) and all(r in whole.rows for r in read.rows)
    assert not summarise(read).document()["finished"]
    again = small(model, tokenizer, texts, tmp_path / "torn")
    assert again.rows == whole.rows and again.finished
    assert Results.read(again.folder).rows == whole.rows
    assert not [p for p in again.folder.iterdir() if p.name.startswith(".")]


def test_other_settings_do_not_mix(model, tokenizer, texts, tmp_path):
    small(model, tokenizer, texts, tmp_path)
    with pytest.raises(UserError, match=r"other settings \(settings.seed\)"):
        small(model, tokenizer, texts, tmp_path, seed=5)
    with pytest.raises(UserError, match=r"texts\.sha256"):
        small(model, tokenizer, texts[1:], tmp_path)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        Results.read(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Results.read(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        Results.read(tmp_path)


def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path, monkeypatch):
    """kill -9 between two units, then --resume from another folder: the same rows but for the timings."""
    from manyheads.cli import main

    source = tmp_path / "source"
    source.mkdir()
    (source / "a.py").write_text("".join(f"def f{i}(x):\n    return x + {i * 37 % 101}\n\n" for i in range(4000)))
    options = [
        "--model",
        str(folder),
        "--text",
        str(source),
        "--strategies",
        "snapkv:window_size=8,keydiff",
        "--budgets",
        "0.3",
    ]
    options += ["--tasks", "loss,needle,speed", "--lengths", ",".join(map(str, range(300, 900, 60))), "--samples", "4"]
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "manyheads", "compare", *options, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    rows = out / "rows.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    left = Results.read(out)
    assert left.rows and not left.finished
    monkeypatch.chdir(tmp_path)
    for arguments in (["--resume", "killed"], [*options, "--out", "whole"]):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *arguments, "--json"])
        assert stop.value.code == 0
    killed, whole = Results.read(out), Results.read(tmp_path / "whole")
    assert quality(killed.rows) == quality(whole.rows) and len(killed.rows) == len(whole.rows)
    same = ("settings", "model", "texts", "arms", "units", "sources")
    assert {k: killed.run[k] for k in same} == {k: whole.run[k] for k in same}


def test_numbers_of_a_summary(results):
    document = summarise(results).document()
    assert json.loads(json.dumps(document)) == document
    arms = {arm["arm"]: arm for arm in document["arms"]}
    full = arms["full"]
    assert full["kept"] == 1 and "delta" not in full["figures"]["loss"] and full["decode_ms"]["ratio_to_full"] == 1
    half, fifth = (arms[f"random:budget={b}"] for b in (0.5, 0.2))
    assert half["kept"] == pytest.approx(0.5, rel=0.05) and fifth["kept"] == pytest.approx(0.2, rel=0.05)
    loss = half["figures"]["loss"]
    assert loss["n"] == 8 and loss["contexts"] == 4
    assert loss["value"] - full["figures"]["loss"]["value"] == pytest.approx(loss["delta"]["value"])
    for arm in document["arms"]:
        for figure in arm["figures"].values():
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_reported_bytes_are_held_bytes(results, model):
    """2 layers, 2 key/value heads, 16 dimensions, keys and values, 4 bytes; and nothing but a little bookkeeping."""
    plain = 800 * 2 * 2 * 16 * 2 * 4
    held = {arm.key: arm.bytes for arm in summarise(results).arms}
    assert plain <= held["full"] <= 1.01 * plain
    assert 0.5 * plain <= held["snapkv:window_size=8,budget=0.5"] <= 0.55 * plain


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_nothing_is_written_where_nothing_can_be(tmp_path, folder, capsys):
    from manyheads.cli import main

    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--model", str(folder), "--out", str(tmp_path / "file" / "out")])
    assert stop.value.code == 2 and "cannot write" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
