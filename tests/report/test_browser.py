# SPDX-License-Identifier: Apache-2.0
"""Every page in Chromium: fits the width, says first what was found, its pictures have names, nothing is wrong."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from manyheads.data.texts import standard_library
from manyheads.diffusion.token_maps import WordMaps
from manyheads.experiment.checks import CheckResult
from manyheads.experiment.claim import ClaimRun
from manyheads.experiment.estimates import Estimate
from manyheads.report import claims, compare, doctor, inspect, maps
from manyheads.report.page import Headline, Page, Section, Text, render
from manyheads.report.summary import Summary
from manyheads.report.table import Cell, Column, Table
from tiny import compare as language
from tiny import inspect as looked

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

# What is wrong with the page as it is drawn.
FAULTS = """
const seen = (e) => e.getClientRects().length > 0, faults = [], width = document.documentElement.clientWidth;
const named = (e) => (e.getAttribute("alt") ?? e.getAttribute("aria-label") ?? "").trim().length > 3;
if (document.documentElement.scrollWidth > width) faults.push("scrolls sideways");
for (const e of document.querySelectorAll("main *"))
  if (seen(e) && !e.closest(".wide, .token-view, svg") && e.getBoundingClientRect().right > width + 1)
    faults.push("sticks out: " + e.outerHTML.slice(0, 80));
const first = document.querySelector("main").firstElementChild, lines = first.querySelectorAll("li");
if (first.className !== "headlines" || !lines.length) faults.push("says nothing first");
for (const e of lines) if (e.textContent.trim().length < 15) faults.push("a headline of nothing");
for (const e of document.querySelectorAll("img, svg:not(.store)"))
  if (seen(e) && !named(e)) faults.push("a picture without a name: " + e.outerHTML.slice(0, 80));
for (const e of document.querySelectorAll("svg:not(.store)"))
  if (seen(e) && e.getBoundingClientRect().height < 20) faults.push("a picture of no height");
for (const e of document.querySelectorAll("td, li, figcaption"))
  if (/\\b(undefined|nan|None)\\b/.test(e.textContent)) faults.push("no value: " + e.textContent.slice(0, 80));
return faults;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its driver here")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


def faults(browser, path, width):
    """What the browser finds wrong with a page at a width in CSS pixels, its console included."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(path.as_uri())
    return browser.execute_script(FAULTS) + [entry["message"] for entry in browser.get_log("browser")]


def page_of_compare(place):
    texts = standard_library()[:30]
    specs = ["random", "snapkv:window_size=8,kernel_size=5"]
    results = language_run(texts, specs, place)
    return compare.page(Summary(results))


def language_run(texts, specs, place):
    from manyheads.comparison import compare as run

    return run(
        language.tiny(), language.make_tokenizer(texts), texts, specs, [0.5, 0.2], lengths=[320], samples=2, rounds=1,
        out=place, command=["manyheads", "compare"],
    )  # fmt: skip


def page_of_claims(place):
    effect = Estimate(0.1, -0.2, 0.4, 24, 8, "bootstrap over contexts", 0.1)
    checks = (CheckResult(check=f"loss of {'w' * 90} lower than full", word="inconclusive", effect=effect, needed=90),)
    run = ClaimRun(size="cpu", device="cpu", tier="proxy", checks=checks, command="manyheads claims run pab")
    shown = [claims.Shown(slug="pab", statement="It holds. " * 40, run=run),
             claims.Shown(slug="sag", statement="It fails.", error="ValueError: " + "w" * 200)]  # fmt: skip
    return claims.page(shown, {"command": ["manyheads", "claims"], "date": "2026-01-01"})


def page_of_train(place):
    from manyheads.comparison_train import TrainingSize, compare_trained

    size = TrainingSize(
        dim=16, layers=1, heads=2, length=128, tokens=128, budget=5_000, rates=(3e-3, 1e-2), seeds=2, samples=4,
        reach=2, lengths=(128, 160), pairs=4, recall_length=20, recall_vocab=10, recall_batch=4,
    )  # fmt: skip
    results = compare_trained(None, ["softmax:window=16"], size=size, out=place, command=["manyheads", "compare"])
    return compare.page(Summary(results))


def page_of_inspect(place):
    from manyheads.inspect.run import inspect_model

    texts = standard_library()[:12]
    seen = inspect_model(
        looked.make_model(), looked.make_tokenizer(texts), texts, ["sinks", "massive", "rhythm", "spans:system=0-9"],
        length=96, samples=2, ablate="sink",
    )  # fmt: skip
    return inspect.page(seen)


def page_of_doctor(place):
    from manyheads.inspect.doctor import diagnose

    texts = standard_library()[:12]
    return doctor.page(diagnose(looked.make_model(), looked.make_tokenizer(texts), texts, length=96, samples=2))


def page_of_generate(place):
    def draw():
        return torch.rand(2, 2, 1, 6, 7)

    layers, steps = ({"cond": {n: draw() for n in range(3)}} for _ in range(2))
    found = WordMaps(("red", "cat"), ("share of attention",) * 2, {"cond": draw()}, layers, steps)
    images = [np.random.default_rng(r).integers(0, 256, (32, 40, 3)).astype(np.uint8) for r in range(2)]
    return maps.page(images, found, prompts=["a red cat, " * 30, "w" * 300], facts={"command": "w" * 400})


PAGES = {
    "compare": page_of_compare, "claims": page_of_claims, "train": page_of_train, "inspect": page_of_inspect,
    "doctor": page_of_doctor, "generate": page_of_generate,
}  # fmt: skip


@pytest.mark.parametrize("verb", PAGES)
def test_a_browser_finds_nothing_wrong(browser, tmp_path, verb):
    text = render(PAGES[verb](tmp_path / "run"))
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    assert len(text.encode()) <= 1_000_000
    for width in (1280, 900):
        assert faults(browser, path, width) == []


SIMPLE = Page("t", "A page", "in a line", [Headline("Something was found here.")], [Section("s", [Text("words")])])
WIDE = Table([Column(f"column {i}") for i in range(60)], [[Cell("12.345", "1 to 2")] * 60])


def spoiled(text, old, new):
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text, None),
        (lambda text: render(replace(SIMPLE, sections=[Section("s", [WIDE])])), None),
        (lambda text: spoiled(render(replace(SIMPLE, sections=[Section("s", [WIDE])])), '"wide"', '""'), "sideways"),
        (lambda text: spoiled(text, "words", '<b style="position: fixed; left: 1279px">words</b>'), "sticks out"),
        (lambda text: render(replace(SIMPLE, headlines=[])), "says nothing first"),
        (lambda text: spoiled(text, "words", '<img src="data:," alt="">'), "without a name"),
        (lambda text: spoiled(text, "<p", '<img src="https://example.org/x" alt="a picture"><p'), "Content Security"),
        (lambda text: spoiled(text, "Something was found here.", "undefined was found here."), "no value"),
    ],
    ids=["as it is", "a wide table", "a bare table", "out", "no headline", "no name", "network", "undefined"],
)  # fmt: skip
def test_what_a_browser_would_find(browser, tmp_path, change, fault):
    path = tmp_path / "page.html"
    path.write_text(change(render(SIMPLE)), encoding="utf-8")
    found = faults(browser, path, 1280)
    assert (found == []) if fault is None else any(fault in one for one in found), found
