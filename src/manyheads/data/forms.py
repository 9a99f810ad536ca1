# SPDX-License-Identifier: Apache-2.0
"""Generated forms: words with boxes, and the exact label of every word.

A form has a title, fields (a key and its value, which may go on below) and lines of running text. Every word of a value
can be that of any field, and words of keys and values stand in titles and running text too: a word by itself says
little. Of a box by itself one knows as little, for keys stand anywhere and in any order. The key of a value is beside
it, to the left, or above it, in one to three columns.

The order of the words is one of

    fields    the title, key by key with its value, the text: what a form means
    rows      lines from left to right, from the top: what a scanner gives
    columns   one column after the other
    rotated   rows, begun at any word and gone on with from the top
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["FIELDS", "LABELS", "ORDERS", "WORDS", "Form", "Order", "form", "stacked"]

Order = Literal["fields", "rows", "columns", "rotated"]
ORDERS: tuple[Order, ...] = get_args(Order)
_KEYS = {
    "name": (("name",), ("customer",), ("paid", "by")), "date": (("date",), ("day",), ("due", "on")),
    "place": (("place",), ("city",), ("sent", "to")), "amount": (("amount",), ("total",), ("sum", "of")),
}  # fmt: skip
FIELDS = tuple(_KEYS)
_VALUES = (
    "may", "june", "april", "august", "victoria", "florence", "chester", "sydney", "paris", "austin", "jackson",
    "madison", "ten", "twelve", "forty", "ninety", "first", "second", "lincoln", "washington", "charlotte", "dallas",
)  # fmt: skip
_TEXT = ("please", "see", "the", "our", "note", "for", "this", "form", "and", "with", "all", "copies")
_KEY_WORDS = tuple(word for keys in _KEYS.values() for key in keys for word in key)
WORDS = (*_KEY_WORDS, *_VALUES, *_TEXT)
LABELS = ("other", "title", "key", *FIELDS)
_NUMBERS = {word: i for i, word in enumerate(WORDS)}
_LETTER, _SPACE, _LINE, _HEIGHT = 9, 10, 34, 18  # width of a letter, of a space, from line to line, of a word


@dataclass(frozen=True, slots=True)
class Form:
    """A page.

    Attributes:
        words: as they are written, in order.
        boxes: int64 ``[T, 4]``: left, top, right and bottom, from 0 to 1000.
        labels: int64 ``[T]``, numbers of :data:`LABELS`.
        order: of the words.
        style: where keys stand: ``beside`` their values or ``above`` them.
        field: which field of the page a word is of, ``[T]``; -1 for none.
    """

    words: tuple[str, ...]
    boxes: Tensor
    labels: Tensor
    order: Order
    style: Literal["beside", "above"]
    field: Tensor


class _Sheet:
    """A page that is being written."""

    def __init__(self) -> None:
        self.words: list[tuple[str, int, int, int, int, int, int, int]] = []  # word, box, label, field, column

    def line(
        self, words: tuple[str, ...], x: int, y: int, label: int, field: int = -1, column: int = 0, tall: int = _HEIGHT
    ) -> None:
        """Words from ``x`` on in the line whose top is ``y``."""
        for word in words:
            right = x + _LETTER * len(word) * tall // _HEIGHT
            self.words.append((word, x, y, min(right, 1000), min(y + tall, 1000), label, field, column))
            x = right + _SPACE


def form(rng: np.random.Generator, length: int = 48, order: Order | None = None) -> Form:
    """A form of ``length`` words.

    Args:
        rng: of all that is drawn.
        length: 40 or more; running text fills it up.
        order: of the words; drawn when None.

    Raises:
        UserError: it is too short for its fields, or too long for a page.
    """
    if not 40 <= length <= 96:
        raise UserError(f"a form has 40 to 96 words, not {length}")
    style: Literal["beside", "above"] = "beside" if rng.random() < 0.5 else "above"
    sheet, left, y = _Sheet(), int(rng.integers(20, 120)), int(rng.integers(10, 110))
    mixed = (*_KEY_WORDS, *_VALUES, *_TEXT)
    title = tuple(rng.choice(mixed, int(rng.integers(1, 4))))
    sheet.line(title, left + int(rng.integers(0, 300)), y, LABELS.index("title"), tall=int(rng.integers(24, 34)))
    y += 2 * _LINE
    fields = [FIELDS[i] for i in (*rng.permutation(4), *rng.integers(0, 4, int(rng.integers(0, 3))))]
    parts = [
        (field, _KEYS[field][int(rng.integers(3))], tuple(rng.choice(_VALUES, int(rng.integers(1, 3)))),
         tuple(rng.choice(_VALUES, int(rng.integers(0, 2)) if rng.random() < 0.6 else 0)))
        for field in fields
    ]  # fmt: skip
    used = len(title) + sum(len(key) + len(first) + len(wrapped) for _, key, first, wrapped in parts)
    above = int(rng.integers(0, length - used + 1))  # words of running text above the fields
    y = _running(sheet, rng, above, left, y)
    columns = int(rng.integers(1, 3)) if style == "beside" else int(rng.integers(2, 4))
    edges = [left + (960 - left) * c // columns for c in range(columns)]
    edges = [edge + int(rng.integers(0, 40)) for edge in edges]
    apart = int(rng.integers(130, 220))
    for first_of in range(0, len(parts), columns):
        deep = 0
        for column, (field, key, first, wrapped) in enumerate(parts[first_of : first_of + columns]):
            number, label = first_of + column, LABELS.index(field)
            x, below = edges[column], 0 if style == "beside" else _LINE
            right = x + apart if style == "beside" else x
            sheet.line(key, x, y, LABELS.index("key"), number, column)
            sheet.line(first, right, y + below, label, number, column)
            if wrapped:
                sheet.line(wrapped, right, y + below + _LINE, label, number, column)
            deep = max(deep, below + _LINE * (1 + len(wrapped)))
        y += deep
    _running(sheet, rng, length - used - above, left, y + _LINE)
    return _ordered(sheet, rng, style, order or ORDERS[int(rng.integers(len(ORDERS)))])


def _running(sheet: _Sheet, rng: np.random.Generator, count: int, left: int, y: int) -> int:
    """``count`` words of running text in lines from ``y`` on; the top of what follows."""
    pools = (_TEXT, _KEY_WORDS, _VALUES)
    while count > 0:
        words = tuple(str(rng.choice(pools[int(rng.choice(3, p=(0.5, 0.25, 0.25)))])) for _ in range(min(count, 10)))
        sheet.line(words, left, y, 0)
        count -= len(words)
        y += _LINE
    return y


def _ordered(sheet: _Sheet, rng: np.random.Generator, style: Literal["beside", "above"], order: Order) -> Form:
    rows = sorted(range(len(sheet.words)), key=lambda i: (sheet.words[i][2], sheet.words[i][1]))
    at = {
        "fields": list(range(len(rows))), "rows": rows,
        "columns": sorted(rows, key=lambda i: sheet.words[i][7]),
        "rotated": [*rows[(turn := int(rng.integers(len(rows)))) :], *rows[:turn]],
    }[order]  # fmt: skip
    words, *numbers = zip(*(sheet.words[i] for i in at), strict=True)
    table = torch.tensor(numbers).T
    return Form(
        tuple(map(str, words)), table[:, :4].contiguous(), table[:, 4].clone(), order, style, table[:, 5].clone()
    )


def stacked(forms: list[Form]) -> Tensor:
    """Numbers of words and boxes of forms of one length, int64 ``[N, T, 5]``."""
    words = torch.tensor([[_NUMBERS[word] for word in each.words] for each in forms])
    return torch.cat([words[..., None], torch.stack([each.boxes for each in forms])], 2)
