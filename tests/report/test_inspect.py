# SPDX-License-Identifier: Apache-2.0
"""The pages: small, self-contained, nothing from outside becomes markup, and a browser draws them and answers."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from manyheads.formatting import number
from manyheads.heads import HeadTable
from manyheads.inspect.run import inspect_model
from manyheads.lens import Lens, LensResult, PerToken, RunningMean, table
from manyheads.report import doctor, heads, inspect
from manyheads.report.colours import LEVELS, Scale, pixels, scale_of
from manyheads.report.page import render as html
from manyheads.report.plots import Heat, Panel, Series, heat, lines, stacked
from manyheads.report.token_view import word
from tiny import inspect as tiny
from tolerance import is_close

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BAD = "<script>alert(1)</script>"

texts, tokenizer, model, folder, evil, seen, found, cli = (
    tiny.texts, tiny.tokenizer, tiny.model, tiny.folder, tiny.evil, tiny.seen, tiny.found, tiny.cli
)  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._at = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._at = tag

    def handle_data(self, data):
        if self._at == "script":
            self.scripts.append(data)

    def handle_endtag(self, tag):
        self._at = None


@dataclass(frozen=True, kw_only=True)
class Evil(Lens):
    """A lens whose every name would like to be markup, with every kind of finding."""

    def update(self, view, found):
        ones = torch.ones(*view.call.q.shape[:2])
        view.memory.setdefault("a", RunningMean()).add(ones * torch.arange(view.call.q.shape[1]), ones, view.fresh)
        view.memory.setdefault("b", RunningMean()).add(ones[:, 0] * 3, ones[:, 0], view.fresh)
        view.memory.setdefault("s", PerToken()).add(view.query_positions.float().expand(len(ones), -1), view.fresh)

    def compute(self, sites):
        tables = {f"{BAD}a": table(f"{BAD}x", sites, "a"), f"{BAD}b": table(f"{BAD}b", sites, "b")}
        tables["signed"] = HeadTable("signed", tables[f"{BAD}a"].sites, tables[f"{BAD}a"].values - 1.5)
        tables["nothing"] = HeadTable("nothing", tables[f"{BAD}a"].sites, tables[f"{BAD}a"].values * np.nan)
        wide = [np.stack([row, -row], -1) for row in sites[0][1]["s"].rows()]
        channels = {f"{BAD}c": np.arange(24.0).reshape(2, 4, 3)}
        records = {f"{BAD}r": [{f"{BAD}k": BAD, "prompt": 0, "column": 1}]}
        series = {f"{BAD}s": sites[0][1]["s"].rows(), "wide": wide, "empty": [row * np.nan for row in wide]}
        return LensResult(tables, series, channels, records=records, notes=[f"{BAD} note"])


def checked(text, least=1):
    """Only our script, named by its hash; no way to fetch anything; no handlers."""
    elements = Page(text).elements
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None] and not any("src" in s for s in scripts)
    data, code = Page(text).scripts
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = next(a["content"] for t, a in elements if a.get("http-equiv"))
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not {tag for tag, _ in elements} & {"link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in text and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert text.count("<svg") >= least and all("aria-label" in a for t, a in elements if t == "svg")
    return json.loads(data)


def test_pages_are_small_and_self_contained(seen, found):
    text = html(inspect.page(seen))
    data = checked(text, 10)
    assert len(text) < 1_000_000 and len(data["maps"]) == 8 and len(data["series"]) >= 5
    table = next(t for t in data["tables"].values() if "rank" in t)
    mean = seen.found["active_dormant"].tables["sink"].mean
    assert is_close(table["mean"], mean, 1e-3) and table["count"] == 8
    assert "n = 2" in text and "transformers" in text and "seed 0" in text
    other = html(doctor.page(found))
    checked(other, 5)
    assert len(other) < 1_000_000
    assert html(inspect.page(seen)) == text


def test_nothing_from_outside_becomes_markup(model, tokenizer, evil):
    seen = inspect_model(
        model, tokenizer, evil, [Evil()], length=200, samples=1, origin=BAD, command=["manyheads", BAD],
        roles={"who": "<b onclick"},
    )  # fmt: skip
    text = html(inspect.page(seen))
    data = checked(text)
    assert BAD not in text and "<b onclick" not in text and "</textarea>" not in text
    assert text.count("&lt;script&gt;") >= 8
    assert "".join(data["prompts"][0]["tokens"]).startswith("<script>alert") and "who" in data["prompts"][0]["roles"]
    assert "\u2028" not in text.partition('id="data">')[2].partition("</script>")[0]


def test_the_heads_of_a_large_model_fit(model, tokenizer, texts, monkeypatch):
    seen = inspect_model(model, tokenizer, texts, ["sinks"], length=256, samples=1)
    whole = html(inspect.page(seen))
    monkeypatch.setattr(heads, "_MAPS", 4_000)
    small = html(inspect.page(seen))
    sizes = [len("".join(checked(text)["maps"].values())) for text in (whole, small)]
    assert sizes[1] <= 8 * 1200 < sizes[0] and min(checked(small)["cell"]) > max(checked(whole)["cell"]) >= 1


def levels_of(png):
    """Size and palette indices of a PNG, read by hand."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {}
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        data = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + data)
        found[kind] = data
        at += 12 + size
    wide, high = struct.unpack(">II", found[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(found[b"IDAT"]), np.uint8).reshape(high, wide + 1)
    assert len(found[b"PLTE"]) == 3 * (LEVELS + 1) and found[b"tRNS"][-1] == 0
    return rows[:, 1:]


def test_pictures_say_the_values():
    values = np.array([[0.0, 0.5, 1.0], [np.nan, 0.25, 2.0]])
    scale = scale_of(values)
    levels = levels_of(pixels(scale.levels(values)))
    assert levels.tolist() == [[0, 16, 32], [LEVELS, 8, LEVELS - 1]]
    signed = scale_of(np.array([-3.0, 1.0]))
    assert signed == Scale(-3, 3, signed=True) and signed.levels(np.array([0.0])) == LEVELS // 2
    log = scale_of(np.array([0.001, 0.1, 10.0]), log=True)
    assert log.levels(np.array([0.001, 0.1, 10.0])).tolist() == [0, 31, LEVELS - 1] or log.low == 0.001
    assert scale_of(np.array([-1.0, 2.0]), log=True) is None and scale_of(np.array([np.nan])) is None
    made = heat([Heat(values)], ["0", "<1>"], list("abc"), scale=scale, alt="<x>", axes=("layer", "head"), tag="t0")
    assert "&lt;1&gt;" in made and 'aria-label="&lt;x&gt;"' in made and 'data-map="t0"' in made
    assert [number(v) for v in (0.0, 1234.5, 0.1234, 1e-5, 2e6, np.nan)] == [
        "0", "1,234", "0.123", "1.0e-5", "2.0e6", "–",
    ]  # fmt: skip


def test_a_card_names_its_greatest_heads():
    """Not its least: the order in which a table ranks is said once."""
    scores = HeadTable("x", ("a", "b"), np.array([[0.1, 0.9], [0.4, 0.2]]))
    assert heads.card_of(scores, "x", {}, ["a", "b"]).said == "greatest: 0.1: 0.9; 1.0: 0.4; 1.1: 0.2"
    layers = HeadTable("x", ("a", "b"), np.array([[0.3], [0.7]]))
    assert heads.layer_card(layers, "x").said == "greatest: 1: 0.7; 0: 0.3"


def test_lines_and_bars():
    plot = lines([Panel([Series("<a>", [0, 1, 2, 3], [1, np.nan, 3, 2], [0, 0, 2, 1], [2, 2, 4, 3])], x="<x>")], "<n>")
    assert "&lt;x&gt;" in plot and 'aria-label="&lt;n&gt;"' in plot and "<x>" not in plot
    assert lines([Panel([Series("a", [0], [np.nan])])], "n") == ""
    flow = stacked(["0", "1"], [("<a>", [0.2, 0.5]), ("b", [0.8, 0.5])], "n", "x")
    edges = [
        [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
        for path in re.findall(r'<path d="([^"]*)"[^>]*fill: #(?:0072b2|d55e00)', flow)
    ]
    wide = [max(x) - min(x) for x in edges][:4]
    assert [w / (wide[0] + wide[2]) for w in wide] == pytest.approx([0.2, 0.5, 0.8, 0.5], abs=2e-3)
    assert "&lt;a&gt;" in flow and word("a\n\n") == "a↵↵\n" and word("\x07\u202e") == "··"


DRIVER = """
<script>
window.addEventListener("load", () => {
  const image = document.querySelector("image[data-map]"), box = image.getBoundingClientRect();
  const at = {clientX: box.left + box.width * .9, clientY: box.top + box.height * .9, bubbles: true};
  image.dispatchEvent(new MouseEvent("mousemove", at));
  const said = document.getElementById("tip").textContent;
  image.dispatchEvent(new MouseEvent("click", at));
  const select = document.getElementById("series");
  select.value = select.options.length - 1;
  select.dispatchEvent(new Event("change"));
  document.getElementById("log").click();
  document.title = JSON.stringify({
    said, head: document.querySelector("#viewer b").textContent, open: !document.getElementById("viewer").hidden,
    shown: document.getElementById("shown").textContent, tokens: document.getElementById("token-view").children.length,
    log: document.querySelectorAll("[data-form=log]:not([hidden])").length,
  });
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_it_and_answers(seen, tmp_path):
    text = html(inspect.page(seen))
    # The driver is a second script, so the policy has to let it in; the page's own stays as it is.
    loose = re.sub(r"script-src '[^']+'", "script-src 'unsafe-inline'", text).replace("</body>", DRIVER)
    path, log = tmp_path / "page.html", tmp_path / "net.json"
    path.write_text(loose, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2000", "--virtual-time-budget=3000",
        f"--log-net-log={log}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout
    told = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&amp;", "&"))
    table = seen.found["active_dormant"].tables["sink"]
    low, high = (bound[1, 3] for bound in table.interval())
    want = [float(x) for x in re.findall(r"[\d.e-]+(?= \(|(?= to)|\))", told["said"].partition(":")[2])]
    assert told["said"].startswith("1.3: ") and f"of {8}" in told["said"]
    assert want == pytest.approx([table.mean[1, 3], low, high], rel=0.02)
    assert told["head"] == "Head 1.3" and told["open"] and told["tokens"] == 96 and told["log"] > 0
    assert told["shown"] == "loss of the token, nats"
    asked = set(re.findall(r'"url":"https?://([^/:"]+)', log.read_text()))
    assert not [host for host in asked if not re.search(r"(^|\.)(google|gstatic|googleapis|gvt1)\.com$", host)]


@pytest.mark.slow
def test_the_same_map_is_drawn_once(seen):
    """Several scores may be the attention to the first token: the page draws it once and names it then."""
    spec = next(spec for spec in seen.found if spec.startswith("active_dormant"))
    sink, own = seen.found[spec].tables["sink"], seen.found["attention"]
    by_less = dataclasses.replace(sink, values=sink.values + 1e-6)

    def cards(first):
        found = {**seen.found, "attention": dataclasses.replace(own, tables={**own.tables, "first token": first})}
        shown = _groups(inspect.page(dataclasses.replace(seen, found=found)))
        return {(group.title, card.title): card for group in shown for card in group.cards}

    alike, unlike = cards(by_less), cards(dataclasses.replace(sink, values=1.1 * sink.values))
    assert not alike["attention", "first token"].picture and unlike["attention", "first token"].picture  # the control
    assert alike["attention", "first token"].said == "the map of sink of active_dormant"
    assert all(card.picture for (_, name), card in alike.items() if name in ("sink", "itself", "entropy"))


def _groups(page):
    from manyheads.report.page import Cards

    return [part for section in page.sections for part in section.parts if isinstance(part, Cards)]
