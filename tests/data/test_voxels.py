# SPDX-License-Identifier: Apache-2.0
"""Edits of voxel objects: each against a loop over voxels, and nothing tells the target but source and instruction."""

import math

import pytest
import torch
from tests.tolerance import DRAWN, share_error

from manyheads.data.voxels import INSTRUCTIONS, draw, edited, held_out, inside, spread, targets
from manyheads.errors import UserError

SIDE = 8
STEPS = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]


@pytest.fixture(scope="module")
def edits():
    return draw(64, SIDE, torch.Generator().manual_seed(1))


def by_hand(voxels, instruction):
    """The edit of one object by sets of places."""
    filled = {tuple(p) for p in voxels.nonzero().tolist()}

    def around(p):
        return [tuple(a + b for a, b in zip(p, step, strict=True)) for step in STEPS]

    if instruction == "grow":
        made = filled | {q for p in filled for q in around(p) if all(0 <= c < SIDE for c in q)}
    elif instruction == "hollow":
        made = {p for p in filled if not set(around(p)) <= filled}
    elif instruction == "delete":
        middle = (min(p[0] for p in filled) + max(p[0] for p in filled)) / 2
        made = {p for p in filled if p[0] <= middle}
    else:
        top = max(p[2] for p in filled)
        layer = [p for p in filled if p[2] == top]
        first = [math.floor(sum(p[axis] for p in layer) / len(layer)) for axis in (0, 1)]
        made = filled | {(first[0] + i, first[1] + j, top + 1 + k) for i in (0, 1) for j in (0, 1) for k in (0, 1)}
    out = torch.zeros_like(voxels)
    for p in made:
        out[p] = True
    return out


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_an_edit_is_that_of_a_loop(edits, instruction):
    others = [name for name in INSTRUCTIONS if name != instruction]
    for voxels in edits.source[:16]:
        want = by_hand(voxels, instruction)
        assert torch.equal(edited(voxels[None], instruction)[0], want)
        assert not any(torch.equal(edited(voxels[None], other)[0], want) for other in others)


def test_every_edit_changes_every_object_and_no_two_are_alike(edits):
    all_of = torch.cat([targets(edits.source), edits.source[:, None]], 1).flatten(2)
    for i in range(5):
        for j in range(i):
            assert bool((all_of[:, i] != all_of[:, j]).any(1).all())
    thin = torch.zeros(1, SIDE, SIDE, SIDE, dtype=torch.bool)
    thin[0, 3:5, 3:5, 3:5] = True  # nothing to hollow: such objects are not drawn
    assert torch.equal(edited(thin, "hollow"), thin) and not inside(edits.source).flatten(1).sum(1).eq(0).any()


def test_the_result_is_told_by_source_and_instruction_alone(edits):
    by_name = {name: edited(edits.source, name) for name in INSTRUCTIONS}
    for i, told in enumerate(edits.instruction.tolist()):
        assert torch.equal(edits.target[i], by_name[INSTRUCTIONS[told]][i])


def test_instructions_are_drawn_apart_from_objects():
    """As often one as another for small and for large objects; control: told by size."""
    found = draw(1200, SIDE, torch.Generator().manual_seed(2))
    size = found.source.flatten(1).sum(1)
    large = size > size.median()
    even = torch.full((4,), 0.25)
    for rows in (large, ~large):
        assert share_error(found.instruction[rows].bincount(minlength=4), even) < DRAWN
    assert share_error((large.long() * 2)[large].bincount(minlength=4), even) > 3


def test_what_is_judged_is_never_trained_on():
    generator = torch.Generator().manual_seed(3)
    train, test = draw(400, SIDE, generator), draw(60, SIDE, generator, "test")
    rows = {bytes(x.flatten().byte().tolist()) for x in train.source}
    assert not rows & {bytes(x.flatten().byte().tolist()) for x in test.source}
    assert not held_out(train.source).any() and held_out(test.source).all()
    either = torch.cat([train.source, train.target])  # the hash parts what it is given, whatever made it
    assert 0.05 < float(held_out(either[400:]).float().mean()) < 0.25
    assert torch.equal(held_out(test.source.flip(0)), held_out(test.source).flip(0))
    moved = test.source.roll(1, 1)
    assert not held_out(moved).all()  # control: another object is judged or not by itself


def test_draws_are_told_by_their_seed():
    first, same = (draw(8, SIDE, torch.Generator().manual_seed(5)) for _ in range(2))
    other = draw(8, SIDE, torch.Generator().manual_seed(6))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first.source, other.source)


def test_neighbours_stay_on_the_grid():
    corner = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    corner[0, 0, 0, 0] = True
    assert int(spread(corner).sum()) == 4 and not inside(torch.ones_like(corner))[0, 0].any()
    assert inside(torch.ones_like(corner)).sum() == 1


def test_refusals():
    with pytest.raises(UserError, match="at least 6"):
        draw(1, 4, torch.Generator())
    with pytest.raises(UserError, match="no instruction 'paint'"):
        edited(torch.zeros(1, 6, 6, 6, dtype=torch.bool), "paint")
    with pytest.raises(UserError, match="bool"):
        edited(torch.zeros(1, 6, 6, 6), "add")
