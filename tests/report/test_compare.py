# SPDX-License-Identifier: Apache-2.0
"""The report page: what it says, that it fetches nothing, and that a browser draws it."""

import copy
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest

from manyheads.compare import summarise
from manyheads.report.compare import caveats, headlines
from manyheads.report.compare import page as page_of
from manyheads.report.page import render as html
from tiny import compare as tiny

texts, tokenizer, model, folder, results = (
    tiny.texts, tiny.tokenizer, tiny.model, tiny.folder, tiny.results
)  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(results):
    return html(page_of(summarise(results)))


def test_page_is_small_and_self_contained(page):
    assert len(page) < 1_000_000
    elements = Page(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in attributes if name.startswith("on")]
    assert (
        all(target.strip("'\"").startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
        and "@import" not in page
    )


def test_pictures_are_there_and_named(page):
    svgs = [attributes for tag, attributes in Page(page).elements if tag == "svg"]
    assert len(svgs) == 4 and all(len(a["aria-label"]) > 80 and a["role"] == "img" for a in svgs)
    assert page.count("<path") > 100


def test_untrusted_names_are_escaped(results):
    bad = '<script>alert("x")</script>'
    run = copy.deepcopy(results.run)
    run["model"]["name"], run["command"] = bad, ["manyheads", bad]
    run["skipped"] = {"loss": bad}
    run["sources"] = [{"name": bad, "sha256": "0" * 64}]
    run["environment"]["cpu"] = bad
    rows = [row | {"arm": row["arm"].replace("random", bad)} for row in results.rows]
    for arm in run["arms"]:
        arm["key"], arm["label"] = arm["key"].replace("random", bad), arm["label"].replace("random", bad)
    text = html(page_of(summarise(replace(results, run=run, rows=rows))))
    assert "<script" not in text.lower() and text.count("&lt;script&gt;") >= 6


def test_headlines_follow_the_data(results):
    said = headlines(summarise(results))
    assert len(said) == 2 and said[0].startswith("At a budget of 50 %") and "nats/token" in said[0]
    rows = [
        row | {"value": 0.001} if (row["arm"], row["metric"]) == ("random:budget=0.2", "nats") else row
        for row in results.rows
    ]
    changed = headlines(summarise(replace(results, rows=rows)))
    assert changed[0] == said[0] and "random loses least" in changed[1]
    right = [
        row | {"value": 1.0} if row["arm"].startswith("hashevict") and row["metric"] == "unseen" else row
        for row in results.rows
    ]
    assert (
        "hashevict recalls the most planted constants, 100 %" in headlines(summarise(replace(results, rows=right)))[0]
    )


def test_caveats_follow_the_data(results):
    said = " ".join(caveats(summarise(results)))
    assert "says little about the strategies" in said and "--samples" in said and "not finished" not in said
    cut = replace(results, rows=[row | {"overlaps": True} for row in results.rows if row["task"] == "loss"])
    said = " ".join(caveats(summarise(cut)))
    assert "not finished" in said and "too narrow" in said


def test_partial_runs_are_drawn(results):
    for tasks in ({"loss"}, {"speed"}, {"memory"}, {"needle"}, {"chained"}):
        rows = [row for row in results.rows if row["task"] in tasks]
        assert "</html>" in html(page_of(summarise(replace(results, rows=rows))))


def test_drawing_twice_gives_the_same_page_and_leaves_matplotlib_alone(results, page):
    before = dict(matplotlib.rcParams)
    assert html(page_of(summarise(results))) == page
    assert dict(matplotlib.rcParams) == before
