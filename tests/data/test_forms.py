# SPDX-License-Identifier: Apache-2.0
"""Generated forms: labels follow from the page, and neither a word nor a box tells them by itself."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from manyheads.data.forms import _KEYS, FIELDS, LABELS, ORDERS, WORDS, form, stacked
from manyheads.errors import UserError

VALUE = LABELS.index(FIELDS[0])


def drawn(count, seed=0, **given):
    rng = np.random.default_rng(seed)
    return [form(rng, **given) for _ in range(count)]


@pytest.fixture(scope="module")
def many():
    return drawn(800)


def key_beside(page, i):
    """The key of the value at ``i`` by where it stands alone: in the lines above it or its own, nothing else between.

    Beside: the nearest key to the left in the line that the value begins in. Above: the key that starts where it does.
    """
    x, y = page.boxes[i, 0].item(), page.boxes[i, 1].item()
    keys = [j for j, label in enumerate(page.labels.tolist()) if label == 2]
    if page.style == "beside":  # the value's first line is the lowest at or above it that has a key to its left
        left = [j for j in keys if page.boxes[j, 2] <= x and page.boxes[j, 1] <= y]
        # keys of earlier rows stand above: the lowest row, then the nearest to the left
        return max(left, key=lambda j: (page.boxes[j, 1].item(), page.boxes[j, 0].item()))
    above = [j for j in keys if page.boxes[j, 1] < y and page.boxes[j, 0] <= x]
    row = max(page.boxes[j, 1].item() for j in above)
    return max((j for j in above if page.boxes[j, 1] == row), key=lambda j: page.boxes[j, 0].item())


def test_the_label_of_a_value_is_its_keys_by_geometry(many):
    of = {word: field for field, keys in _KEYS.items() for key in keys for word in key}
    checked = 0
    for page in many[:80]:
        for i, label in enumerate(page.labels.tolist()):
            if label >= VALUE:
                assert of[page.words[key_beside(page, i)]] == LABELS[label], (page, i)
                checked += 1
    assert checked > 600


def test_every_form_has_all_fields_a_title_and_its_length(many):
    for page in many[:300]:
        labels = page.labels.tolist()
        assert len(labels) == len(page.words) == len(page.boxes) == 48
        assert set(range(1, len(LABELS))) <= set(labels)
        tall = page.boxes[:, 3] - page.boxes[:, 1]
        assert tall[page.labels == 1].min() > tall[page.labels != 1].max()
        assert all(word in WORDS for word in page.words)
        assert ((page.field >= 0) == (page.labels >= 2)).all()
    assert {page.order for page in many} == set(ORDERS) and {page.style for page in many} == {"beside", "above"}
    assert any(
        len({y for y, f in zip(p.boxes[:, 1].tolist(), p.field.tolist(), strict=True) if f == 0}) > 2 for p in many
    )  # wrapped


@pytest.mark.parametrize("length", [40, 96])
def test_boxes_are_on_the_page_and_apart(length):
    for page in drawn(80, length=length):
        boxes = page.boxes
        assert boxes.min() >= 0 and boxes.max() <= 1000 and (boxes[:, 2:] > boxes[:, :2]).all()
        both = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
        assert ((both > 0).all(-1) == torch.eye(len(boxes), dtype=torch.bool)).all()


def best_guess(pages, judged, feature):
    """Share of words of values whose field the most frequent one by ``feature(page, i)`` is, learned on ``pages``."""
    counts = defaultdict(Counter)
    for page in pages:
        for i, label in enumerate(page.labels.tolist()):
            if label >= VALUE:
                counts[feature(page, i)][label] += 1
    hits = [
        bool(counts[feature(page, i)]) and counts[feature(page, i)].most_common(1)[0][0] == label
        for page in judged for i, label in enumerate(page.labels.tolist()) if label >= VALUE
    ]  # fmt: skip
    return sum(hits) / len(hits)


def test_neither_a_word_nor_a_place_tells_the_field(many):
    pages, judged = many[:600], many[600:]
    features = {
        "word": lambda p, i: p.words[i], "number": lambda p, i: i,
        "place": lambda p, i: tuple((p.boxes[i] // 125).tolist()),
        "column": lambda p, i: int(p.boxes[i, 0]) // 60, "row": lambda p, i: int(p.boxes[i, 1]) // 34,
        "style and order": lambda p, i: (p.style, p.order),
        "words of the line before": lambda p, i: p.words[i - 1] in _KEYS,
    }  # fmt: skip
    for name, feature in features.items():
        assert best_guess(pages, judged, feature) < 0.32, name
    key = best_guess(pages, judged, lambda p, i: p.words[key_beside(p, i)])  # control: the page does
    assert key == 1.0


def test_a_word_can_have_many_labels(many):
    seen = defaultdict(Counter)
    for page in many:
        for word, label in zip(page.words, page.labels.tolist(), strict=True):
            seen[word][label] += 1
    for keys in _KEYS.values():
        for word in (word for key in keys for word in key):
            assert {0, 1, 2} <= set(seen[word])
    best = sum(counts.most_common(1)[0][1] for counts in seen.values()) / sum(c.total() for c in seen.values())
    common = sum(counts[0] for counts in seen.values()) / sum(c.total() for c in seen.values())
    assert 0.6 < common <= best < common + 0.02  # by itself no word is worth more than the most frequent label


def test_orders_are_of_one_page():
    pages = {order: form(np.random.default_rng(4), order=order) for order in ORDERS}
    found = {order: sorted(zip(p.words, map(tuple, p.boxes.tolist()), p.labels.tolist(), strict=True))
             for order, p in pages.items()}  # fmt: skip
    assert all(content == found["fields"] for content in found.values())
    tops = pages["rows"].boxes[:, 1].tolist()
    assert tops == sorted(tops) and len({pages[order].words for order in ORDERS}) == 4
    turn = pages["rotated"].words
    assert any(turn == pages["rows"].words[i:] + pages["rows"].words[:i] for i in range(48))
    fields = [f for f in pages["fields"].field.tolist() if f >= 0]
    assert fields == sorted(fields)


def test_pages_repeat_by_their_seed_alone(many):
    again = drawn(20)
    assert all(a.words == b.words and torch.equal(a.boxes, b.boxes) for a, b in zip(again, many, strict=False))
    assert len({page.words for page in [*many, *drawn(200, seed=1)]}) == 1000


def test_numbers_are_those_of_words_and_lengths_are_bounded(many):
    table = stacked(many[:3])
    assert table.shape == (3, 48, 5) and table.dtype == torch.int64
    assert [WORDS[i] for i in table[2, :, 0].tolist()] == list(many[2].words)
    assert torch.equal(table[1, :, 1:], many[1].boxes)
    for length in (39, 97):
        with pytest.raises(UserError, match="40 to 96"):
            form(np.random.default_rng(0), length)
