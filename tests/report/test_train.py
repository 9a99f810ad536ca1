# SPDX-License-Identifier: Apache-2.0
"""`compare --train` as it is typed, and the page it leaves behind."""

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from manyheads.cli import main
from manyheads.compare.results import Results
from manyheads.compare.train import budget
from manyheads.compare.train.summary import summarise
from manyheads.report.page import render as html
from manyheads.report.train import caveats, headlines
from manyheads.report.train import page as page_of

TINY = budget.Size(
    dim=16, layers=1, heads=2, length=128, tokens=128, budget=7_000, rates=(3e-3, 1e-2), seeds=2, samples=4, reach=2,
    lengths=(128, 160), pairs=2, recall_length=12, recall_vocab=10, recall_batch=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return tmp_path_factory.mktemp("typed")


@pytest.fixture
def cli(capsys, at, monkeypatch):
    """Runs a command in one folder with tiny sizes."""
    monkeypatch.chdir(at)
    for name in ("CPU", "QUICK"):
        monkeypatch.setattr(f"manyheads.compare.train.run.{name}", TINY)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


TYPED = ("compare", "--train", "--strategies", "softmax:window=16", "--out", "t")


@pytest.fixture
def results(cli, at):
    if not (at / "t").exists():
        code, out, err = cli(*TYPED)
        assert code == 0 and "softmax:window=16" in out and "t/report.html" in out and "training 2" in err, err
    return Results.read(at / "t")


def test_report_json_and_resume(cli, at, results):
    page = (at / "t" / "report.html").read_text()
    rows = (at / "t" / "rows.jsonl").stat().st_mtime_ns
    for command in (("report", "t"), TYPED, ("compare", "--resume", "t")):
        code, out, _ = cli(*command)
        assert code == 0 and "softmax:window=16" in out and (at / "t" / "report.html").read_text() == page
    assert (at / "t" / "rows.jsonl").stat().st_mtime_ns == rows
    code, out, err = cli("report", "t", "--json")
    document = json.loads(out)
    assert code == 0 and err == "" and document["kind"] == "train" and document["finished"]
    assert [arm["arm"] for arm in document["arms"]] == ["softmax", "softmax:window=16"]
    arm = document["arms"][1]
    assert (
        arm["figures"]["loss"]["delta"]["contexts"] == 2 and arm["training_tokens_per_second"]["ratio_to_softmax"] > 0
    )
    assert set(arm["state_bytes"]) == {"128", "160"} and (at / arm["model"] / "model.safetensors").is_file()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


def test_page_is_self_contained_and_has_its_pictures(results):
    page = html(page_of(summarise(results)))
    elements = Page(page).elements
    assert len(page) < 1_000_000
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith("#")
    assert all(target.strip("'\"").startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    svgs = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(svgs) == 5 and all(len(a["aria-label"]) > 60 for a in svgs)
    assert "Decoder.load" in page and html(page_of(summarise(results))) == page


def test_what_it_says_follows_the_data(results):
    rows = [
        row | {"value": row["value"] - 1} if row["arm"].endswith("=16") and row["task"] == "judge" else row
        for row in results.rows
    ]
    said = headlines(summarise(replace(results, rows=rows)))
    assert said[0].startswith("softmax:window=16 has the lowest loss")
    assert "not finished" not in " ".join(caveats(summarise(results)))
    cut = [row for row in rows if row["task"] in ("tune", "train")]
    assert "not finished" in " ".join(caveats(summarise(replace(results, rows=cut))))


def test_partial_runs_are_drawn(results):
    for tasks in (("tune",), ("tune", "train", "judge")):
        rows = [row for row in results.rows if row["task"] in tasks]
        assert "</html>" in html(page_of(summarise(replace(results, rows=rows))))
    run = {k: v for k, v in results.run.items() if k not in ("seconds", "sources", "peak_rss_bytes")}
    assert "not finished" in html(page_of(summarise(replace(results, run=run, rows=rows))))
    half = [row for row in results.rows if row["task"] == "tune" or row.get("seed") == 0]
    assert "</html>" in html(page_of(summarise(replace(results, rows=half)))) and html(
        page_of(summarise(replace(results, rows=[])))
    )


def test_untrusted_names_are_escaped(results):
    bad = '<script>alert("x")</script>'
    run = copy.deepcopy(results.run)
    run["model"]["name"], run["command"], run["skipped"] = bad, ["manyheads", bad], {"needle": bad}
    run["arms"][1]["key"] = bad
    rows = [row | {"arm": row["arm"].replace("softmax:window=16", bad)} for row in results.rows]
    assert "<script" not in html(page_of(summarise(replace(results, run=run, rows=rows)))).lower()


BAD = [
    (["--strategies", "sofmax"], "did you mean softmax"),
    (["--strategies", "snapkv"], "no token mixer"),
    (["--strategies", "softmax:window=0"], "at least 1"),
    (["--budget", "lots"], "not 'lots'"),
    (["--budget", "1k"], "too small"),
    (["--minutes", "0"], "above 0"),
    (["--minutes", "1", "--budget", "1M"], "not both"),
    (["--budgets", "0.5"], "--budgets does not go with --train"),
    (["--model", "x/y"], "--model does not go with --train"),
    (["--tasks", "loss"], "--tasks does not go with --train"),
    (["--lengths", "64,128"], "one training length"),
    (["--lengths", "8"], "at least 32"),
    (["--text", "missing.txt"], "no such file"),
    (["--text", "short.txt"], "too short"),
    (["--device", "gpu0"], "unknown device"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(cli, at, options, word):
    (at / "short.txt").write_text("too little")
    before = sorted(p.name for p in at.iterdir())
    code, out, err = cli("compare", "--train", *options, "--out", "bad")
    assert code == 2 and out == "" and word in err and len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ") and sorted(p.name for p in at.iterdir()) == before


@pytest.mark.parametrize("option", ["--budget", "--minutes", "--seeds"])
def test_options_of_training_need_it(cli, option):
    code, _, err = cli("compare", option, "2")
    assert code == 2 and f"{option} goes with --train" in err and len(err.strip().splitlines()) == 1


def test_own_text(cli, at):
    (at / "story.txt").write_text("It was a dark and stormy night, and the rain fell in torrents. " * 400)
    code, _, _ = cli(
        "compare", "--train", "--text", "story.txt", "--strategies", "softmax", "--out", "o", "--seeds", "1"
    )
    run = Results.read(at / "o").run
    assert code == 0 and run["texts"]["files"] == 1 and run["settings"]["seeds"] == 1
    assert "cut in three" in (at / "o" / "report.html").read_text()
