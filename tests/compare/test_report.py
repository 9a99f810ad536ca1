# SPDX-License-Identifier: Apache-2.0
"""The report page: what it says, that it fetches nothing, and that a browser draws it."""

import copy
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from manyheads.compare import summarise
from manyheads.compare.report import caveats, headlines, render, write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(results):
    return render(summarise(results))


def test_page_is_small_and_self_contained(page):
    assert len(page) < 1_000_000
    elements = Page(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith("#")
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
    text = render(summarise(replace(results, run=run, rows=rows)))
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
        assert "</html>" in render(summarise(replace(results, rows=rows)))


def test_drawing_twice_gives_the_same_page_and_leaves_matplotlib_alone(results, page):
    before = dict(matplotlib.rcParams)
    assert render(summarise(results)) == page
    assert dict(matplotlib.rcParams) == before


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_it(results, tmp_path):
    path = write_report(summarise(results))
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
        "--window-size=1200,3200", f"--log-net-log={log}", path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    image = matplotlib.image.imread(shot)[..., :3]
    assert image.shape[:2] == (3200, 1200)
    # Colours of strategies are there in number, spread over the height of the page: the pictures are drawn.
    blue = (np.abs(image - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.06).any(1).nonzero()[0]
    orange = (np.abs(image - np.array([0xD5, 0x5E, 0]) / 255).max(-1) < 0.06).any(1).nonzero()[0]
    assert len(blue) > 100 and len(orange) > 100 and blue.max() - blue.min() > 600
    # What the browser asks for on its own account goes to its maker; the page asks for nothing.
    asked = set(re.findall(r'"url":"https?://([^/:"]+)', log.read_text()))
    assert not [host for host in asked if not re.search(r"(^|\.)(google|gstatic|googleapis|gvt1)\.com$", host)]
