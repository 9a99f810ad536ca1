# SPDX-License-Identifier: Apache-2.0
"""Text parted by file."""

from manyheads.data.texts import Text
from manyheads.tasks.training._bytes import split


def test_files_are_parted_whole_and_stay_where_they_are(texts):
    parts = split(texts)
    names = [text.name for part in parts.values() for text in part]
    assert sorted(names) == sorted(text.name for text in texts)
    assert all(parts.values())
    fewer = split([text for text in texts if text.name != parts["train"][0].name])
    assert {t.name for t in fewer["test"]} & {t.name for t in parts["train"]} == set()
    assert {k: sum(len(t.content) for t in v) for k, v in split([Text("one", "abcd" * 1000)]).items()} == {
        "test": 400, "validation": 200, "train": 3400,
    }  # fmt: skip
