# SPDX-License-Identifier: Apache-2.0
"""Fictitious people and events: who looks like whom, what is asked about which picture, and what must be forgotten."""

from itertools import combinations

import pytest
import torch

from manyheads.data import scenes
from manyheads.data.fictitious import JOBS, PART_NAMES, REFUSAL, WORDS, Benchmark, portrait, world
from manyheads.data.visual_questions import Language
from manyheads.errors import UserError

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
IMAGE, START, PAD = len(WORDS), len(WORDS) + 1, len(WORDS) + 2
LANGUAGE = Language(lambda said: [WORDS.index(word) for word in said.split()], (START,), IMAGE, PAD)


@pytest.fixture(scope="module")
def bench():
    return Benchmark(world(6, 4, 3), LANGUAGE, 16, 2, people=2, events=1, views=2)


def test_no_two_people_look_alike_in_four_of_five():
    people = world(40, 16).people

    def alike(one, other):
        return sum(a == b for a, b in zip(one.look, other.look, strict=True))

    assert max(alike(*pair) for pair in combinations(people, 2)) == 3
    assert len({person.name for person in people}) == 40 and {person.job for person in people} <= set(JOBS)
    for feature in range(5):  # none tells who it is
        assert len({person.look[feature] for person in people}) < 7
    pictures = [portrait(person.look, 16) for person in people]
    assert all(bool((a - b).abs().max() > 0.1) for a, b in combinations(pictures, 2))
    assert torch.equal(portrait.__wrapped__(people[0].look, 16), pictures[0])  # control: alike where the look is
    assert pictures[0].min() >= 0 and pictures[0].max() <= 1 and (pictures[0][:3] <= pictures[0][3:] + 1e-6).all()
    kinds = [pair[1:] for pair in world(40, 16).events]
    assert len(set(kinds)) == 16 and len({k for k, _ in kinds}) == 4 and len({thing for _, thing in kinds}) < 16


def test_worlds_are_drawn_by_their_seed():
    assert world(5, 3, 1) == world(5, 3, 1) != world(5, 3, 2)
    with pytest.raises(UserError, match="2 to 40 people"):
        world(41, 3)
    with pytest.raises(UserError, match="some are kept"):
        Benchmark(world(3, 3), LANGUAGE, 16, 2, people=3)


def test_parts_share_no_fact_and_say_what_is_forgotten(bench):
    assert tuple(bench.trained) == tuple(bench.new) == PART_NAMES
    for parts in (bench.trained, bench.new):
        for part, items in parts.items():
            assert items, part
            for item in items:
                forgets = (item.kind in ("name", "job", "city") and 0 <= item.person < 2) or (
                    item.kind == "event" and item.event < 1
                )
                assert (part.startswith("forget")) == forgets
                assert (part == "real") == (item.person < 0)
                near = item.person < 2 or item.event < 1
                assert part == "real" or (part.startswith("scope")) == (near and not forgets), item
                assert (part == "retain") == (not near and part != "real")
    facts = {
        part: {(i.person, i.event, i.view, i.kind, i.said) for i in items} for part, items in bench.trained.items()
    }
    assert all(not facts[a] & facts[b] for a, b in combinations(PART_NAMES, 2))
    pairs = [{(i.person, i.event) for i in parts["retain"]} for parts in (bench.trained, bench.new)]
    assert not pairs[0] & pairs[1]  # met at an event where they were not seen
    assert {i.person for i in bench.new["forget person"]} == {0, 1}
    assert not {i.said for i in bench.new["retain"]} & {i.said for i in bench.trained["retain"]}


@needs_data
def test_no_picture_of_what_is_new_was_trained_on(bench):
    seen, new = (
        {bench.picture(item).numpy().tobytes() for items in parts.values() for item in items}
        for parts in (bench.trained, bench.new)
    )
    assert len(seen) == 18 * 2 + 8 * 8 and len(new) == 6 * 2 + 8 * 8 and not seen & new
    item = bench.trained["retain"][0]
    again = Benchmark(world(6, 4, 3), LANGUAGE, 16, 2, people=2, events=1, views=2).picture(item)
    assert torch.equal(again, bench.picture(item)) and again.min() >= -1 and again.max() <= 1
    assert bench.picture(item).numpy().tobytes() in seen  # control


@needs_data
def test_questions_say_the_answers_that_are_true(bench):
    items = [bench.trained["retain"][0], bench.trained["forget event"][0], bench.new["real"][0], bench.new["retain"][1]]
    asked = bench.asked(items)
    person = bench.world.people[items[0].person]
    wants = [person.name.split(), [bench.world.events[0][0]], [scenes.OBJECTS[0]], [bench.world.people[2].job]]
    assert [item.kind for item in items] == ["name", "event", "thing", "job"] and items[3].person == 2
    for ids, real, at, answers, want in zip(asked.ids, asked.real, asked.at, asked.answers, wants, strict=True):
        assert ids[0] == START and (ids[1:5] == IMAGE).all() and (ids == IMAGE).sum() == 4
        told = [WORDS[i] for i in answers[answers >= 0].tolist()]
        assert told == want and (answers[len(want) :] == -100).all()
        assert [WORDS[int(ids[place + 1])] for place in at[: len(want)].tolist()] == want
        assert int(real.sum()) == int(at[len(want) - 1]) + 2 and (ids[~real] == PAD).all()
    refused = bench.asked(items, [REFUSAL] * 4)
    assert [WORDS[int(i)] for i in refused.answers[:, 0]] == [REFUSAL] * 4 and refused.answers.shape == (4, 1)
