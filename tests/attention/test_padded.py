# SPDX-License-Identifier: Apache-2.0
"""Slot storage against a model of it in plain Python: a list of the columns that each row and head still holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads import UserError
from manyheads.attention.padded import PaddedCache, nbytes

B, H = 2, 2
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4), st.integers(0, 3)),
        st.tuples(st.just("keep"), st.integers(1, 6), st.integers(0, 99)),
        st.tuples(st.just("select"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("narrow"), st.integers(1, 5), st.just(0)),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def content(column, row, head):
    """What is stored for a column: a number that only it has."""
    return 1000 * column + 10 * row + head + 1


class Model:
    """Rows of (origin row, valid flags), and per row and head the columns held, in order; None is an empty slot."""

    def __init__(self):
        self.rows, self.valid, self.held = (
            list(range(B)),
            [[] for _ in range(B)],
            [[[] for _ in range(H)] for _ in range(B)],
        )

    def check(self, slots):
        columns, positions = slots.columns().tolist(), slots.positions().tolist()
        assert slots.counts().tolist() == [sum(v) for v in self.valid]
        for b, valid in enumerate(self.valid):
            for h in range(H):
                want = [c if c is not None and valid[c] else -1 for c in self.held[b][h]]
                assert columns[b][h] == want
                assert positions[b][h] == [sum(valid[:c]) if c >= 0 else -1 for c in want]
                for n, c in enumerate(want):
                    if c >= 0:
                        assert slots.keys[b, h, n, 0] == -slots.values[b, h, n, 0] == content(c, self.rows[b], h)


@given(first=st.integers(1, 7), padding=st.integers(0, 4), operations=OPERATIONS)
def test_against_lists(first, padding, operations):
    model, slots = Model(), None
    for kind, n, m in [("append", first, padding), *operations]:
        if kind == "append":
            seen = len(model.valid[0])
            k = torch.tensor(
                [[[[float(content(seen + t, r, h))] for t in range(n)] for h in range(H)] for r in model.rows]
            )
            slots = PaddedCache.empty(k, -k) if slots is None else slots
            slots.update(k, -k)
            marks = [[not (b == 0 and t < m) for t in range(n)] for b in range(len(model.rows))]
            if m:
                slots.mark(torch.tensor(marks))
            for b in range(len(model.rows)):
                model.valid[b] += marks[b]
                for held in model.held[b]:
                    held += range(seen, seen + n)
        elif kind == "keep":
            n = min(n, slots.size)
            generator = torch.Generator().manual_seed(m)
            order = torch.rand(len(model.rows), H, slots.size, generator=generator).argsort(-1)[..., :n]
            kept = torch.rand(order.shape, generator=generator) < 0.8
            columns = slots.columns()
            slots.keep(order, kept)
            for b in range(len(model.rows)):
                for h in range(H):
                    now = [int(columns[b, h, i]) if kept[b, h, j] else -1 for j, i in enumerate(order[b, h].tolist())]
                    model.held[b][h] = [c if c >= 0 else None for c in now]
        elif kind == "select":
            rows = [[0], [1, 0], [0, 0, 1], [1, 1]][n]
            rows = [min(r, len(model.rows) - 1) for r in rows]
            slots.reorder(torch.tensor(rows))
            model.rows = [model.rows[r] for r in rows]
            model.valid = [list(model.valid[r]) for r in rows]
            model.held = [[list(h) for h in model.held[r]] for r in rows]
        else:
            n = min(n, slots.size)
            slots.narrow(slots.size - n, n)
            model.held = [[h[len(h) - n :] for h in row] for row in model.held]
        model.check(slots)


@given(
    seen=st.integers(2, 8),
    width=st.integers(1, 8),
    queries=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 50),
)
def test_visible_looks_up_the_column(seen, width, queries, heads, seed):
    """Slot n of head h is seen where the model's mask allows its column; without a mask, where causality does."""
    generator = torch.Generator().manual_seed(seed)
    k, width, queries = torch.randn(B, H, seen, 1), min(width, seen), min(queries, seen)
    slots = PaddedCache.empty(k, k)
    slots.update(k, k)
    assert slots.visible(None, queries) is None  # nothing dropped: as an ordinary cache
    order = torch.rand(B, H, seen, generator=generator).argsort(-1)[..., : max(1, seen - 1)]
    # A model whose mask spans W columns has a window of that size: older slots are dropped by the store.
    order = torch.where(order < seen - width, seen - 1, order)
    kept = torch.rand(order.shape, generator=generator) < 0.8
    slots.keep(order, kept)
    mask = torch.rand(B, heads, queries, width, generator=generator) < 0.6
    got, causal = slots.visible(mask, queries), slots.visible(None, queries)
    for b, h, t, n in torch.cartesian_prod(
        *(torch.arange(x) for x in (B, max(heads, H), queries, order.shape[-1]))
    ).tolist():
        own = h // (max(heads, H) // H)
        column = int(slots.columns()[b, own, n])
        allowed = (
            column >= 0 and bool(mask[b, h if heads > 1 else 0, t, column - (seen - width)])
            if heads in (1, max(heads, H))
            else None
        )
        assert allowed is None or bool(got[b, h, t, n]) == allowed
        if h < H:
            column = int(slots.columns()[b, h, n])
            assert bool(causal[b, h, t, n]) == (0 <= column <= seen - queries + t)


def test_crop_is_undone_or_refused():
    k = torch.randn(1, 2, 6, 3)
    slots = PaddedCache.empty(k, k)
    slots.update(k, k)
    slots.mark(torch.tensor([[False] + [True] * 5]))
    slots.crop(2)
    assert slots.seen == slots.size == 4 and slots.positions()[0, 0].tolist() == [-1, 0, 1, 2]
    slots.keep(torch.tensor([[[1, 2], [1, 3]]]), torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(UserError, match="cannot be cropped"):
        slots.crop(1)


def test_bytes_count_each_storage_once():
    base = torch.zeros(10)
    assert nbytes(base, base[:3], None, torch.zeros(2, dtype=torch.int8)) == 42
