# SPDX-License-Identifier: Apache-2.0
"""The README says what is true: its table is the catalogue's, its commands and pictures exist."""

import re
from pathlib import Path

from manyheads import catalog

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(text: str) -> str:
    return text.split("<!-- catalogue -->\n")[1].split("\n<!-- /catalogue -->")[0]


def test_the_table_is_generated():
    """After a change of the catalogue: `manyheads list --markdown`, pasted between the two marks."""
    assert table(README) == catalog.markdown(catalog.papers() + catalog.baselines())
    assert table(README.replace("`snapkv`", "`snapkw`")) != table(README)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
