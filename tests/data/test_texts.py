# SPDX-License-Identifier: Apache-2.0
"""Corpora by name: WikiText by article, the Brown corpus as it is printed."""

import io
import tarfile

import pytest

from manyheads.data import files, texts
from manyheads.errors import UserError

WIKI = " \n = Du Fu = \n \n Du Fu was a poet . \n = = Life = = \n He wrote . \n"
WIKI += " = <unk> @-@ class ship = \n \n Two ships . \n"
BROWN = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` No/rb ''/'' ./.\n\n\n\tIt/pps ended/vbd (/( late/rb )/) ./.\n"


@pytest.fixture
def brown(tmp_path, monkeypatch):
    path = tmp_path / "brown.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("package/cb02", BROWN), ("package/ca01", BROWN), ("package/README", "a/b")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    monkeypatch.setattr(files, "path", lambda name: path)


def test_wikitext_is_cut_into_articles_and_loses_nothing(monkeypatch):
    monkeypatch.setattr(files, "text", lambda name: WIKI)
    found = texts.corpus("wikitext")
    assert [text.content.split("\n")[0] for text in found] == [" = Du Fu = ", " = <unk> @-@ class ship = "] * 2
    assert "".join(text.content for text in found).replace("\n", "") == 2 * WIKI.replace("\n", "")[1:]
    assert " = = Life = = " in found[0].content  # a section begins no article


def test_brown_is_running_text_of_its_samples(brown):
    found = texts.corpus("brown")
    assert [text.name for text in found] == ["brown, ca01", "brown, cb02"]
    assert found[0].content == 'The jury said, "No".\nIt ended (late).\n'


def test_other_names_are_refused():
    with pytest.raises(UserError, match="wikitext"):
        texts.corpus("wikipedia")
