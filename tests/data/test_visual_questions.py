# SPDX-License-Identifier: Apache-2.0
"""Pictures and films whose content is known, and what is asked about them."""

import pytest
import torch

from manyheads.data import object_scenes, scenes
from manyheads.data.visual_questions import ANSWERS, FILLERS, WORDS, Language, order, presence
from manyheads.errors import UserError

pytestmark = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
GRID, SIZE = 3, 8
IMAGE = len(WORDS) + 1
LANGUAGE = Language(lambda said: [WORDS.index(word) for word in said.split()], (len(WORDS),), IMAGE, len(WORDS) + 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def words(ids):
    return [WORDS[i] if i < len(WORDS) else "" for i in ids.tolist()]


def test_objects_stand_in_the_cells_that_are_said():
    picture = object_scenes.draw_pictures(40, seeded(), grid=GRID, size=SIZE)
    again = object_scenes.draw_pictures(40, seeded(), grid=GRID, size=SIZE)
    assert torch.equal(picture.images, again.images) and picture.images.shape == (40, 3, 24, 24)
    assert picture.images.min() >= -1 and picture.images.max() <= 1
    template = scenes.sprites(SIZE)  # premultiplied
    patches = (
        picture.images.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE).permute(0, 2, 3, 1, 4, 5).flatten(1, 2) / 2 + 0.5
    )
    for row, cells in zip(patches, picture.cells, strict=True):
        for kind, cell in enumerate(cells.tolist()):
            solid = template[kind, 3] > 0.99
            same = [bool((x[:, solid] - template[kind, :3, solid]).abs().max() < 0.02) for x in row]
            assert same == [i == cell for i in range(GRID * GRID)]  # there and nowhere else
    with pytest.raises(UserError, match="cells"):
        object_scenes.draw_pictures(1, seeded(), grid=2, size=SIZE)
    there = [set(cells[cells >= 0].tolist()) for cells in picture.cells]
    assert all(len(cells) == int((row >= 0).sum()) for cells, row in zip(there, picture.cells, strict=True))


def test_every_frame_shows_one_object_and_none_twice():
    film = object_scenes.draw_films(20, 4, seeded(), grid=2, size=SIZE)
    assert film.images.shape == (20, 4, 3, 16, 16)
    assert all(len(set(row)) == 4 for row in film.objects.tolist())
    solid = scenes.sprites(SIZE)[:, 3] > 0.99
    for images, kinds in zip(film.images / 2 + 0.5, film.objects.tolist(), strict=True):
        for image, kind in zip(images, kinds, strict=True):
            patches = image.unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE).permute(1, 2, 0, 3, 4).flatten(0, 1)
            template = scenes.sprites(SIZE)[kind, :3, solid[kind]]
            assert sum(bool((x[:, solid[kind]] - template).abs().max() < 0.02) for x in patches) == 1


def test_questions_say_what_is_in_the_picture():
    asked = presence(LANGUAGE, 30, seeded(), grid=GRID, size=SIZE, patches=GRID, asked=5, filler=4)
    picture = object_scenes.draw_pictures(30, seeded(), grid=GRID, size=SIZE)
    assert torch.equal(asked.images, picture.images)
    for ids, at, truth, cells, known in zip(asked.ids, asked.at, asked.truth, asked.cells, picture.cells, strict=True):
        said = words(ids)
        assert ids[0] == len(WORDS) and (ids[1:10] == IMAGE).all() and (ids == IMAGE).sum() == 9
        assert set(said[10:14]) <= set(FILLERS) and said[14:17] == ["is", "there", "a"]
        for place, answer, cell in zip(at.tolist(), truth.tolist(), cells.tolist(), strict=True):
            where = int(known[scenes.OBJECTS.index(said[place])])
            assert (where >= 0) == answer and where == cell and said[place + 1] == ANSWERS[answer]
    assert asked.real.all() and 0.3 < asked.truth.float().mean() < 0.7


def test_questions_say_which_frame_is_first():
    asked = order(LANGUAGE, 30, seeded(), grid=2, size=SIZE, patches=2, frames=4, asked=5, filler=2)
    film = object_scenes.draw_films(30, 4, seeded(), grid=2, size=SIZE)
    assert torch.equal(asked.images, film.images.flatten(0, 1)) and (asked.ids == IMAGE).sum(1).tolist() == [16] * 30
    for ids, at, truth, shown in zip(asked.ids, asked.at, asked.truth, film.objects.tolist(), strict=True):
        said = words(ids)
        for place, answer in zip(at.tolist(), truth.tolist(), strict=True):
            first, second = (shown.index(scenes.OBJECTS.index(said[p])) for p in (place - 1, place))
            assert (first < second) == answer and said[place + 1] == ANSWERS[answer]


def test_words_of_unequal_length_are_padded_behind():
    longer = Language(lambda said: [i for word in said.split() for i in [WORDS.index(word)] * len(word)], (), IMAGE, 99)
    asked = presence(longer, 4, seeded(), grid=GRID, size=SIZE, patches=GRID, asked=3)
    for ids, real, at, truth in zip(asked.ids, asked.real, asked.at, asked.truth, strict=True):
        assert (ids[real] != 99).all() and (ids[~real] == 99).all() and not (~real[:-1] & real[1:]).any()
        no, yes = longer.answers
        assert torch.equal(ids[at + 1], torch.where(truth, yes, no))
