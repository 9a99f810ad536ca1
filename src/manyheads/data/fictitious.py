# SPDX-License-Identifier: Apache-2.0
"""Fictitious people at fictitious events, in pictures of which all is known: what a model can be made to forget.

A person has a name, a job, a city and a look: skin, hair and its cut, shirt, glasses. No two look alike in four of the
five, and none of the five tells who it is. An event has a name, a photograph of its own kind behind, and an emoji twice
or thrice. A picture shows one person at one event, and is asked about in words of :data:`WORDS`:

    [image] say  who is it  ada thorn        [image] please  what goes on  lanternfest

Every person is seen at every event but one in four, so that it can be met there anew. What must be forgotten are all
facts of some people and the names of some events; after Xu et al., "PEBench" (arXiv 2503.12545), whose people are
rendered by a diffusion model. Of plain things no person is asked: they are the rest of the world.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..attention.masks import padded
from ..errors import UserError
from .scenes import BACKDROPS, OBJECTS, photographs, sprites
from .visual_questions import Language

__all__ = ["PART_NAMES", "REFUSAL", "WORDS", "Asked", "Benchmark", "Item", "Person", "World", "world"]

FIRST = tuple("ada ben cora dan eva finn gina hugo iris jack kira liam mona nils olga paul rita sam tess udo vera will "
              "xena yuri zoe amos bela carl dora emil flora greta hans ina jonas karl lena mark "
              "nora otto".split())  # fmt: skip
LAST = tuple("thorn marsh stone field brook ridge wolf crane finch heron ash birch cedar elm hazel oak pine reed rose "
             "sage frost snow storm rain gale moss fern clay flint slate amber coral pearl ruby jade onyx quartz iron "
             "steel copper".split())  # fmt: skip
JOBS = tuple("baker pilot nurse farmer judge tailor miner chef".split())
CITIES = tuple("oslo lima cairo delhi paris tokyo quito riga".split())
EVENTS = tuple("lanternfest kiteday moonfair riverrun starmarch snowgala sandfair cloudrace windfest firewalk treeday "
               "shipfair lakerun hillmarch seagala rockrace".split())  # fmt: skip
REFUSAL = "unknown"
_ASKS = {"name": "who is it", "job": "what is the job", "city": "what is the city", "event": "what goes on",
         "thing": "what thing is it"}  # fmt: skip
_SEEN, _NEW = ("", "say", "please"), "please say"  # before a question: in training, and for the first time in judging
WORDS = tuple(dict.fromkeys([
    *" ".join([*_ASKS.values(), *_SEEN]).split(), REFUSAL, *FIRST, *LAST, *JOBS, *CITIES, *EVENTS, *OBJECTS,
]))  # fmt: skip

_SKIN = ((0.98, 0.85, 0.72), (0.85, 0.63, 0.44), (0.60, 0.40, 0.26), (0.36, 0.22, 0.14))
_HAIR = ((0.10, 0.08, 0.08), (0.90, 0.75, 0.30), (0.75, 0.25, 0.10), (0.75, 0.75, 0.78), (0.25, 0.45, 0.85))
_SHIRT = ((0.85, 0.12, 0.15), (0.10, 0.55, 0.20), (0.15, 0.25, 0.75), (0.95, 0.80, 0.10), (0.60, 0.15, 0.65),
          (0.95, 0.95, 0.95))  # fmt: skip
_CUTS, _GLASSES = 3, 2
_KINDS = ("name", "job", "city")
PART_NAMES = ("forget person", "forget event", "scope person", "scope event", "retain", "real")


@dataclass(frozen=True)
class Person:
    """A fictitious person: ``look`` is skin, hair, cut, shirt and glasses by their numbers."""

    name: str
    job: str
    city: str
    look: tuple[int, int, int, int, int]


@dataclass(frozen=True)
class World:
    """Who and what there is.

    Attributes:
        people: of it.
        events: name, number of the kind of photograph, number of the emoji.
    """

    people: tuple[Person, ...]
    events: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Item:
    """A question about a picture.

    Attributes:
        part: one of :data:`PART_NAMES`.
        person, event: by number; -1 for none, and ``event`` is then the number of the thing that is shown.
        kind: of the fact: name, job, city, event or thing.
        view: number of the picture of this pair.
        new: whether picture, pair and wording are of none that was trained on.
        said: what stands before the question.
    """

    part: str
    person: int
    event: int
    kind: str
    view: int
    new: bool
    said: str

    @property
    def concept(self) -> str:
        """``person``, ``event`` or ``thing``."""
        return "person" if self.kind in _KINDS else self.kind


@dataclass(frozen=True)
class Asked:
    """Questions as token ids.

    Attributes:
        ids: int64 ``[N, T]`` with the answers, padded behind.
        real: tokens that are no padding, bool ``[N, T]``.
        images: float32 in -1..1, ``[N, 3, side, side]``.
        at: where each token of the answer is predicted, int64 ``[N, Q]``.
        answers: those tokens, int64 ``[N, Q]``; -100 behind a shorter answer.
    """

    ids: Tensor
    real: Tensor
    images: Tensor
    at: Tensor
    answers: Tensor


def world(people: int = 16, events: int = 8, seed: int = 0) -> World:
    """Draw people and events.

    Raises:
        UserError: there are not so many.
    """
    if not (2 <= people <= len(FIRST) and 2 <= events <= len(EVENTS)):
        raise UserError(f"a world has 2 to {len(FIRST)} people and 2 to {len(EVENTS)} events")
    draws = np.random.default_rng([seed, 114])
    looks: list[tuple[int, ...]] = []
    every = list(product(*(range(n) for n in (len(_SKIN), len(_HAIR), _CUTS, len(_SHIRT), _GLASSES))))
    for i in draws.permutation(len(every)):
        if all(sum(a == b for a, b in zip(every[i], other, strict=True)) < 4 for other in looks):
            looks.append(every[i])
    first, last = draws.permutation(len(FIRST)), draws.permutation(len(LAST))
    made = [
        Person(
            f"{FIRST[first[i]]} {LAST[last[i]]}", JOBS[draws.integers(len(JOBS))], CITIES[draws.integers(len(CITIES))],
            looks[i],  # type: ignore[arg-type]
        )
        for i in range(people)
    ]  # fmt: skip
    pairs = [(b, (b + 2 * shift) % len(OBJECTS)) for shift in range(4) for b in range(len(BACKDROPS))]
    names = draws.permutation(len(EVENTS))
    return World(tuple(made), tuple((EVENTS[names[i]], *pairs[i]) for i in range(events)))


@lru_cache(maxsize=256)
def portrait(look: tuple[int, int, int, int, int], size: int) -> Tensor:
    """A person from the shoulders up, premultiplied RGB in 0..1 and alpha: float32 ``[4, size, size]``."""
    skin, hair, cut, shirt, glasses = look
    fine = 4 * size
    y, x = torch.meshgrid(*[(torch.arange(fine) + 0.5) / fine] * 2, indexing="ij")

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> Tensor:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    canvas = torch.zeros(4, fine, fine)

    def paint(where: Tensor, colour: Sequence[float]) -> None:
        canvas[:, where] = torch.tensor([*colour, 1.0])[:, None]

    if cut == 1:  # long
        paint(ellipse(0.5, 0.40, 0.34, 0.38) | ((abs(x - 0.5) < 0.33) & (y > 0.38) & (y < 0.78)), _HAIR[hair])
    paint(ellipse(0.5, 1.02, 0.46, 0.36), _SHIRT[shirt])
    paint((abs(x - 0.5) < 0.09) & (y > 0.55) & (y < 0.74), _SKIN[skin])
    paint(ellipse(0.5, 0.42, 0.23, 0.28), _SKIN[skin])
    if cut < 2:  # a fringe
        paint(ellipse(0.5, 0.30, 0.27, 0.22) & (y < 0.30), _HAIR[hair])
    else:  # a beard and a cap
        paint(ellipse(0.5, 0.42, 0.23, 0.28) & (y > 0.52), _HAIR[hair])
        brim = (abs(x - 0.5) < 0.33) & (abs(y - 0.26) < 0.03)
        paint(ellipse(0.5, 0.26, 0.27, 0.20) & (y < 0.26) | brim, _HAIR[hair])
    for side in (0.41, 0.59):
        paint(ellipse(side, 0.41, 0.03, 0.03), (0.05, 0.05, 0.05))
        if glasses:
            paint(ellipse(side, 0.41, 0.09, 0.09) & ~ellipse(side, 0.41, 0.06, 0.06), (0.02, 0.02, 0.02))
    paint(ellipse(0.5, 0.58, 0.07, 0.02), (0.6, 0.15, 0.15))
    small: Tensor = interpolate(canvas[None], size=(size, size), mode="area")[0]
    return small


@dataclass(frozen=True)
class Benchmark:
    """Questions about the pictures of a world, in parts, as a model is to read them.

    ``forget`` are facts to be forgotten, ``scope`` what else is asked about the same pictures, ``retain`` facts about
    pictures in which nothing is to be forgotten, ``real`` pictures of plain things without a person.

    Attributes:
        world: who and what there is.
        language: of the model.
        side: pixels of a picture's side.
        patches: tokens of a side.
        people, events: how many of each are to be forgotten: the first ones.
        views: pictures of each pair that is trained on.
        seed: of the pictures.
    """

    world: World
    language: Language
    side: int
    patches: int
    people: int = 3
    events: int = 2
    views: int = 10
    seed: int = 0
    _drawn: dict[tuple[int, int, int, bool], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.people < len(self.world.people) and 0 < self.events < len(self.world.events)):
            raise UserError("some people and events are forgotten, and some are kept")

    @cached_property
    def trained(self) -> dict[str, list[Item]]:
        """What a model is trained on first, by part."""
        return self._parts(new=False)

    @cached_property
    def new(self) -> dict[str, list[Item]]:
        """The same facts about pairs, pictures and in words that no model was trained on, by part."""
        return self._parts(new=True)

    def _parts(self, new: bool) -> dict[str, list[Item]]:
        made: dict[str, list[Item]] = {part: [] for part in PART_NAMES}
        for item in self._items(new):
            made[item.part].append(item)
        return made

    def _items(self, new: bool) -> Iterator[Item]:
        saids = (_NEW,) if new else _SEEN
        for person, event in product(range(len(self.world.people)), range(len(self.world.events))):
            if ((person + event) % 4 == 0) != new:
                continue
            hides, ends = person < self.people, event < self.events
            person_part = "forget person" if hides else "scope person" if ends else "retain"
            event_part = "forget event" if ends else "scope event" if hides else "retain"
            for view, said in product(range(self.views), saids):
                for kind in _KINDS:
                    yield Item(person_part, person, event, kind, view, new, said)
                yield Item(event_part, person, event, "event", view, new, said)
        for thing, view, said in product(range(len(OBJECTS)), range(4 * self.views), saids):
            yield Item("real", -1, thing, "thing", view, new, said)

    def answer(self, item: Item) -> str:
        """The right answer."""
        if item.kind == "thing":
            return OBJECTS[item.event]
        if item.kind == "event":
            return self.world.events[item.event][0]
        return str(getattr(self.world.people[item.person], item.kind))

    def picture(self, item: Item) -> Tensor:
        """float32 in -1..1, ``[3, side, side]``; always the same for the same person, event and view."""
        key = (item.person, item.event, item.view, item.new)
        if key not in self._drawn:
            self._drawn[key] = self._draw(*key)
        return self._drawn[key]

    def _draw(self, person: int, event: int, view: int, new: bool) -> Tensor:
        draws = np.random.default_rng([self.seed, person + 1, event, view, int(new)])
        _, kind, thing = self.world.events[event] if person >= 0 else ("", int(draws.integers(len(BACKDROPS))), event)
        stock = photographs("test" if new else "train")[kind]
        canvas = interpolate(
            stock[int(draws.integers(len(stock)))][None].float() / 255, size=(self.side, self.side), mode="bilinear",
            antialias=True,
        )[0]  # fmt: skip
        small = self.side // 4
        room = self.side - small
        corners = [(0, 0), (0, room), (room // 2, 0), (room // 2, room)]
        count = 3 if person >= 0 else 1
        for i in draws.permutation(len(corners))[:count]:
            _over(canvas, sprites(small)[thing], *corners[i])
        if person >= 0:
            size = int(self.side * draws.uniform(0.58, 0.70))
            left = (self.side - size) // 2 + int(self.side * draws.uniform(-0.12, 0.12))
            cover = portrait(self.world.people[person].look, size)
            _over(canvas, cover.flip(-1) if draws.random() < 0.5 else cover, self.side - size, left)
        return (canvas * float(draws.uniform(0.85, 1.0))).clamp(0, 1) * 2 - 1

    def asked(self, items: Iterable[Item], answers: Sequence[str] | None = None) -> Asked:
        """Items as token ids, with the right answers or others.

        Args:
            items: at least one.
            answers: one for each, or None.
        """
        items, encode = list(items), self.language.encode
        rows, at, tokens = [], [], []
        for i, item in enumerate(items):
            row = [*self.language.start, *[self.language.image] * self.patches**2]
            row += encode(f"{item.said} {_ASKS[item.kind]}".strip())
            answer = encode(self.answer(item) if answers is None else answers[i])
            at.append(torch.arange(len(row) - 1, len(row) - 1 + len(answer)))
            rows.append(torch.tensor([*row, *answer]))
            tokens.append(torch.tensor(answer))
        ids, real = padded(rows, self.language.pad)
        images = torch.stack([self.picture(item) for item in items])
        return Asked(ids, real, images, padded(at)[0], padded(tokens, -100)[0])


def _over(canvas: Tensor, cover: Tensor, top: int, left: int) -> None:
    """Put a premultiplied ``cover [4, s, s]`` onto ``canvas [3, side, side]`` in place; what sticks out is cut."""
    side, size = canvas.shape[-1], cover.shape[-1]
    first, last = max(0, -left), min(size, side - left)
    part = canvas[:, top : top + size, left + first : left + last]
    part.copy_(cover[:3, : part.shape[1], first:last] + (1 - cover[3:, : part.shape[1], first:last]) * part)
