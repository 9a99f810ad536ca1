# SPDX-License-Identifier: Apache-2.0
"""An order of the cells of a grid in which what stands together lies together: a generalised Hilbert curve.

Hilbert's curve needs sides of a power of two. Here a box of any sides is cut into two, three or five, and these are
walked so that each begins beside the end of the one before (the scheme known as *gilbert*). A step goes to a cell that
shares a face, except that where a side is odd a few steps cut a corner.
"""

from collections.abc import Iterator
from functools import cache

__all__ = ["hilbert_order"]

Edge = tuple[int, int]  # an axis, and cells along it with the sign of the direction
Cell = tuple[int, int, int]


@cache
def hilbert_order(frames: int, height: int, width: int) -> tuple[int, ...]:
    """Numbers ``(f * height + y) * width + x`` of all cells, in the order of the curve.

    Args:
        frames, height, width: cells along each axis, at least 1.
    """
    sides = {2: width, 1: height, 0: frames}
    a, b, c = sorted(sides.items(), key=lambda side: -side[1])
    return tuple((f * height + y) * width + x for f, y, x in _walk((0, 0, 0), a, b, c))


def _moved(cell: Cell, *edges: Edge) -> Cell:
    at = list(cell)
    for axis, count in edges:
        at[axis] += count
    return at[0], at[1], at[2]


def _sign(edge: Edge) -> int:
    return 1 if edge[1] > 0 else -1


def _half(edge: Edge) -> Edge:
    """About half of it, an even number of cells where there is a choice."""
    size = abs(edge[1]) // 2
    if size % 2 and abs(edge[1]) > 2:
        size += 1
    return edge[0], _sign(edge) * size


def _less(edge: Edge, other: Edge) -> Edge:
    return edge[0], edge[1] - other[1]


def _back(edge: Edge) -> Edge:
    return edge[0], -edge[1]


def _end(edge: Edge) -> Edge:
    """To its last cell."""
    return edge[0], edge[1] - _sign(edge)


def _walk(at: Cell, a: Edge, b: Edge, c: Edge) -> Iterator[Cell]:
    """Cells of the box with the corner ``at`` and these edges, from that corner to the far end of ``a``."""
    wide, high, deep = (abs(edge[1]) for edge in (a, b, c))
    if 1 in (wide * high, wide * deep, high * deep):
        edge = max((a, b, c), key=lambda e: abs(e[1]))
        for i in range(abs(edge[1])):
            yield _moved(at, (edge[0], i * _sign(edge)))
        return
    a2, b2, c2 = _half(a), _half(b), _half(c)
    a1, b1, c1 = _less(a, a2), _less(b, b2), _less(c, c2)
    if 2 * wide > 3 * high and 2 * wide > 3 * deep:  # long: one after the other
        pieces = [(at, a2, b, c), (_moved(at, a2), a1, b, c)]
    elif 3 * high > 4 * deep:  # flat: out along b, over along a, back along b
        pieces = [
            (at, b2, c, a2), (_moved(at, b2), a, b1, c), (_moved(at, _end(a), _end(b2)), _back(b2), c, _back(a1)),
        ]  # fmt: skip
    elif 3 * deep > 4 * high:
        pieces = [
            (at, c2, a2, b), (_moved(at, c2), a, b, c1), (_moved(at, _end(a), _end(c2)), _back(c2), _back(a1), b),
        ]  # fmt: skip
    else:
        pieces = [
            (at, b2, c2, a2),
            (_moved(at, b2), c, a2, b1),
            (_moved(at, _end(b2), _end(c)), a, _back(b2), _back(c1)),
            (_moved(at, _end(a), b2, _end(c)), _back(c), _back(a1), b1),
            (_moved(at, _end(a), _end(b2)), _back(b2), c2, _back(a1)),
        ]
    for piece in pieces:
        yield from _walk(*piece)
