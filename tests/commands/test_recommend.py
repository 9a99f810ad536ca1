# SPDX-License-Identifier: Apache-2.0
"""The verb ``recommend``: its table, its JSON, its page and its mistakes."""

import json

import pytest

from manyheads.attention.mla import Platform
from manyheads.cli import main
from manyheads.costs import Layer, Setting, card, cards, families, ranked
from manyheads.costs.cards import Card
from manyheads.report.recommend import curves, table


@pytest.fixture
def cli(capsys):
    """Run the command line; return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["recommend", *arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_the_table_names_what_to_try(cli):
    code, out, _ = cli("--length", "65536", "--card", "H100")
    decoders = {one.spec for one in families().values() if one.decoder}
    assert code == 0 and all(spec in out for spec in decoders) and "longt5_tglobal" not in out
    assert "reading the prompt: 65,536 tokens, 1 row, 32 layers, H100" in out
    assert "one more token" in cli("--decode", "--length", "100")[1]
    assert "mra" in cli("--encoder", "--length", "100")[1]


def test_json_is_the_ranking(cli):
    found = json.loads(cli("--json", "--decode", "--card", "rtx4090", "--batch", "2", "--pretrained")[1])
    layer = Layer(length=65536, batch=2)
    setting = Setting(layer=layer, card=card("RTX 4090"), what="decode", parameters=8_030_261_248, pretrained=True)
    assert found["families"] == [one.row() for one in ranked(setting)] and found["setting"]["what"] == "decode"
    assert found["families"] != [one.row() for one in ranked(setting)][::-1]


def test_sizes_of_a_model(cli):
    found = json.loads(cli("--json", "--model", "default", "--train")[1])["setting"]
    assert found["layer"]["heads"] == 6 and found["layers"] == 10 and 15e6 < found["parameters"] < 25e6
    assert found["what"] == "train"


def test_this_machine(cli, monkeypatch):
    from manyheads.costs import cards as cards_

    module = __import__("sys").modules[cards_.__module__]
    monkeypatch.setattr(module, "calibrate", lambda: Card("here", Platform(1e11, 1e10, fused_heads=False), 1e10, True))
    code, out, _ = cli("--card", "this", "--length", "512")
    assert code == 0 and "here measured here" in out and "here" not in cli("--card", "cpu")[1].split("from")[0][-30:]


def test_a_page_and_a_picture(cli, tmp_path):
    page, picture = tmp_path / "new" / "families.html", tmp_path / "families.svg"
    code, out, _ = cli("--length", "8192", "--out", str(page))
    text = page.read_text()
    assert code == 0 and f"written: {page}" in out and "Which family, at 8,192 tokens on H100?" in text
    assert "<svg" in text and "arXiv 2405.17381" in text
    assert cli("--out", str(picture))[0] == 0 and picture.read_text().lstrip().startswith("<svg")


def test_the_picture_has_a_line_for_each_family():
    setting = Setting(layer=Layer(length=4096), card=card("h100"), what="decode")
    drawn, few = curves(setting), ["full", "linear"]
    assert all(one.entry.title in drawn for one in ranked(setting))
    assert [one.entry.name for one in ranked(setting, few)] != few == sorted(few)
    assert [column.name for column in table(ranked(setting), setting).columns][1:3] == ["attention", "moved"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--card", "h99"], cards()[0]),
        (["--length", "0"], "length"),
        (["--decode", "--train"], "--decode and --train"),
        (["--encoder", "--decode"], "whole sequences"),
        (["--out", "families.png"], ".html"),
        (["--model", "/nowhere/at/all"], "no such folder"),
        (["--batch", "0"], "batch"),
    ],
)
def test_mistakes_cost_a_line(cli, arguments, said):
    code, out, err = cli(*arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and said in err and len(err.splitlines()) <= 2
