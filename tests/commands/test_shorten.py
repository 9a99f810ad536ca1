# SPDX-License-Identifier: Apache-2.0
"""The verb ``shorten``: what it prints and writes, weights that are used again, and its mistakes."""

import json

import pytest

from manyheads.cli import main
from manyheads.text_reducing import TextWeights

PROGRAM = """def area(width, height):
    # both in metres
    if width < 0:
        raise ValueError("below 0")
    return width * height
"""


@pytest.fixture
def cli(capsys):
    """Run the verb; return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["shorten", *arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def file(tmp_path):
    (tmp_path / "area.py").write_text(PROGRAM)
    return str(tmp_path / "area.py")


def test_prints_what_is_left(cli, file):
    code, out, _ = cli(file, "--strategy", "slimcode:budget=0.8")
    assert code == 0 and "def area(width, height)" in out and "metres" not in out
    assert len(cli(file, "--strategy", "dietcode:budget=8")[1].split()) < len(out.split())


def test_a_folder_has_the_page_and_the_weights(cli, file, tmp_path):
    place = tmp_path / "out"
    code, out, _ = cli(file, "--out", str(place))
    page = (place / "shortened.html").read_text()
    assert code == 0 and "of" in out and "cut" in page and "What attention weighs" in page and "<script>" not in page
    weights = TextWeights.load(place / "weights.json")
    assert set(weights.statements) == {"method", "if", "raise", "return"}
    left = list(place.rglob("area.py"))
    assert len(left) == 1
    again = json.loads(cli(file, "--weights", str(place / "weights.json"), "--json")[1])
    assert again["files"][0]["text"] == left[0].read_text().strip()
    assert again["files"][0]["left"] <= 0.6 * again["files"][0]["tokens"] + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "snapkv"], "shortens no texts"),
        (["--strategy", "dietcode:budget=2.5"], "at most 1.0"),
        (["--weights", "nowhere.json"], "no weights of words"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(cli, file, arguments, said):
    code, _, err = cli(file, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1


def test_other_files_are_refused(cli, tmp_path):
    (tmp_path / "x.c").write_text("int main() { return 0; }\n")
    assert "no Python file" in cli(str(tmp_path / "x.c"))[2]
    (tmp_path / "bad.py").write_text("def (:\n")
    code, _, err = cli(str(tmp_path / "bad.py"), "--strategy", "slimcode")
    assert code == 2 and "only Python programs" in err
