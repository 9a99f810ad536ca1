# SPDX-License-Identifier: Apache-2.0
"""The page of attention maps: self-contained, true to the maps, deaf to markup from outside; a browser answers."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import manyheads
from manyheads.diffusion.token_maps import TokenMaps, WordMaps, maps
from manyheads.errors import UserError
from manyheads.report import maps as maps_page
from manyheads.report.colours import halved
from manyheads.report.page import render as html
from tolerance import nearly

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
BAD = "</script><script>alert(1)</script>"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.scripts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def checked(text):
    """Well formed, only our script by its hash, nothing that fetches, no handlers; its data."""
    page = Page(text)
    assert not page.open
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [s.get("type") for s in scripts] == ["application/json", None] and not any("src" in s for s in scripts)
    data, code = page.scripts
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base"}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in text and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    return json.loads(data)


def read(grid, row, name):
    """A map back out of the page's data, ``[frames, h, w]``."""
    one = grid["maps"][row][name]
    levels = np.frombuffer(base64.b64decode(one["data"]), np.uint8).reshape(-1, grid["h"], grid["w"])
    return one["low"] + (one["high"] - one["low"]) * levels / 255


def picture(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def some(names=("red", "cat"), rows=2, frames=1, side=6, layers=(0, 3), steps=(0, 5, 9)):
    source = torch.Generator().manual_seed(0)

    def draw():
        return torch.rand(rows, len(names), frames, side, side + 1, generator=source)

    branches = ("uncond", "cond")
    return WordMaps(
        names, ("share of attention",) * len(names), {b: draw() for b in branches},
        {b: {n: draw() for n in layers} for b in branches}, {b: {n: draw() for n in steps} for b in branches},
    )  # fmt: skip


def render(*given, **more):
    return html(maps_page.page(*given, **more))


def pictures(rows=2):
    return [np.random.default_rng(r).integers(0, 256, (16, 20, 3)).astype(np.uint8) for r in range(rows)]


def test_the_data_are_the_maps_and_the_images():
    found, images = some(), pictures()
    text = render(images, found, prompts=["one", "two"], facts={"seed": "7"})
    data = checked(text)
    assert data["branches"] == ["cond", "uncond"] and data["names"] == ["red", "cat"] and ">7<" in text
    for branch, view in data["views"].items():
        pairs = [(view["mean"], found.maps[branch])]
        pairs += [(view["layers"][str(n)], x) for n, x in found.layers[branch].items()]
        pairs += [(view["steps"][str(n)], x) for n, x in found.steps[branch].items()]
        assert len(pairs) == 6
        for grid, want in pairs:
            for row in range(2):
                for name in range(2):
                    kept = want[row, name].double().numpy()
                    half = (kept.max() - kept.min()) / 255 / 2
                    assert np.abs(read(grid, row, name) - kept).max() <= half + 1e-9
                    assert np.abs(read(grid, row, name) - want[1 - row, name].double().numpy()).max() > 10 * half
    every = [x for by in (found.layers, found.steps) for b in by.values() for x in b.values()] + [*found.maps.values()]
    assert data["tops"] == nearly([max(float(x[:, c].max()) for x in every) for c in range(2)])
    for row, image in enumerate(images):
        assert np.array_equal(picture(data["pictures"][row][0]), image)


def test_images_of_all_kinds():
    floats = torch.rand(16, 20, 3, generator=torch.Generator().manual_seed(0))
    whole = (floats.numpy() * 255).round().astype(np.uint8)
    for image in (floats, floats.numpy(), whole, Image.fromarray(whole), np.dstack([whole, whole[..., :1]])):
        data = checked(render([image], some(rows=1)))
        assert np.array_equal(picture(data["pictures"][0][0]), whole)
    video = np.stack(pictures(5))
    for given in (video, [Image.fromarray(frame) for frame in video], list(video)):
        data = checked(render([given], some(rows=1, frames=3)))
        shown = [picture(source) for source in data["pictures"][0]]
        assert data["frames"] == 3 and np.array_equal(np.stack(shown), video)
        assert len(base64.b64decode(data["views"]["cond"]["mean"]["maps"][0][0]["data"])) == 3 * 6 * 7
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    (source,) = checked(render([noise], some(rows=1)))["pictures"][0]
    assert source.startswith("data:image/jpeg") and picture(source).shape == noise.shape


def test_nothing_from_outside_becomes_markup():
    text = render(
        pictures(), some((BAD, "<u>&\u2028")), title=BAD, prompts=[BAD, "<i>"], facts={BAD: f"{BAD}<i onclick=x>"}
    )
    data = checked(text)
    assert data["names"] == [BAD, "<u>&\u2028"] and BAD not in text and "<i>" not in text and "<u>&" not in text
    assert (
        text.count("&lt;script&gt;") >= 6 and "\u2028" not in text.partition('id="data">')[2].partition("</script>")[0]
    )


def test_maps_that_are_not_there_and_maps_that_are_flat():
    found = some()
    found.layers["cond"][0][:, 1] = torch.nan
    found.maps["cond"][0, 0] = 0.25
    data = checked(render(pictures(), found))
    assert data["views"]["cond"]["layers"]["0"]["maps"][0][1] is None
    assert (read(data["views"]["cond"]["mean"], 0, 0) == 0.25).all()
    found.maps["cond"][:, 1] = torch.nan
    assert "not seen here" in render(pictures(), found)


def test_many_maps_fit(monkeypatch):
    found = some(side=31, layers=range(8))
    monkeypatch.setattr(maps_page, "_BYTES", 40_000)
    text = render(pictures(), found)
    data = checked(text)["views"]["cond"]
    assert data["mean"]["h"] == 31 and data["layers"]["0"]["h"] <= 8 and "coarser" in text
    x = np.arange(15.0).reshape(3, 5)
    assert halved(x).tolist() == [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    with pytest.raises(UserError, match="1 images for maps of"):
        render(pictures(1), found)
    with pytest.raises(UserError, match="1 prompts for 2 images"):
        render(pictures(), found, prompts=["one"])
    with pytest.raises(UserError, match="H, W, 3"):
        render([np.zeros(5)] * 2, found)


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_from_a_pipeline_to_the_page(name):
    pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
    from oracles import pipelines

    make, go = pipelines.RUNS[name]
    pipe = make()
    strategy = TokenMaps(tokens=(1, 3), received=True, queries=(5,), per_step=True)
    with manyheads.use(pipe, strategy) as port:
        go(pipe)
    found = maps(port, strategy, words=("cat", "dog"))
    video = name == "wan"
    images = [np.stack(pictures(9))] if video else pictures()
    data = checked(render(images, found))
    assert data["names"] == ["cat", "dog", "received", "from 5"] and data["branches"] == ["cond", "uncond"]
    assert data["frames"] == found.maps["cond"].shape[2] == (3 if video else 1)
    assert data["units"] == ["share of attention"] * 2 + ["times a uniform share"] * 2
    for branch in data["branches"]:
        assert list(data["views"][branch]["steps"]) == ["0", "1", "2", "3"]
        for c in range(4):
            want = found.maps[branch][0, c].double().numpy()
            assert np.abs(read(data["views"][branch]["mean"], 0, c) - want).max() <= np.ptp(want) / 509


DRIVER = """
<script>
window.addEventListener("load", () => {
  const by = (id) => document.getElementById(id), told = {};
  const card = document.querySelectorAll("[data-name]")[3], heat = card.querySelector(".heat");
  const set = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("input")); };
  const state = () => [
    card.querySelector(".said").textContent, heat.getAttribute("href"),
    card.querySelectorAll(".ends span")[2].textContent,
  ];
  told.first = state();
  const box = heat.getBoundingClientRect();
  const at = {clientX: box.left + box.width * .99, clientY: box.top + box.height * .01, bubbles: true};
  heat.dispatchEvent(new MouseEvent("mousemove", at));
  told.tip = by("tip").textContent;
  set("step", 2);
  told.step = state();
  told.stepIs = by("step-is").textContent;
  set("layer", "3");
  told.layer = state();
  told.stepAfter = by("step").value;
  set("branch", "uncond");
  told.uncond = state();
  set("scale", "all");
  told.all = state();
  set("opacity", 25);
  told.opacity = getComputedStyle(heat).opacity;
  by("clear").click();
  told.clear = state();
  told.open = !by("tools").hidden;
  document.title = JSON.stringify(told);
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_draws_it_and_answers(tmp_path):
    found = some()
    text = render(pictures(), found)
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

    def said(x):
        row, column = divmod(int(x.argmax()), x.shape[1])
        return [float(x.max()), row, column, float(x.mean())]

    for key, x in (
        ("first", found.maps["cond"]), ("step", found.steps["cond"][5]), ("layer", found.layers["cond"][3]),
        ("uncond", found.layers["uncond"][3]),
    ):  # fmt: skip
        got = [float(v) for v in re.findall(r"[\d.]+", told[key][0])]
        assert got == pytest.approx(said(x[1, 1, 0].numpy()), rel=6e-3), key
    assert told["stepIs"] == "5" and told["stepAfter"] == "0" and told["open"] and told["opacity"] == "0.25"
    assert float(re.search(r": ([\d.]+)", told["tip"])[1]) == pytest.approx(
        float(found.maps["cond"][1, 1, 0, 0, -1]), abs=5e-3
    )
    assert told["tip"].endswith("share of attention, row 0, column 6") and told["tip"].startswith("cat")
    every = [x for by in (found.layers, found.steps) for b in by.values() for x in b.values()] + [*found.maps.values()]
    assert float(told["all"][2]) == pytest.approx(max(float(x.max()) for x in every), rel=6e-3)
    drawn = [told[key][1] for key in ("first", "step", "layer", "uncond", "all", "clear")]
    assert len(set(drawn)) == 6 and picture(drawn[-1])[..., 3].min() < 255 == picture(drawn[0])[..., 3].min()
    asked = set(re.findall(r'"url":"https?://([^/:"]+)', log.read_text()))
    assert not [host for host in asked if not re.search(r"(^|\.)(google|gstatic|googleapis|gvt1)\.com$", host)]
