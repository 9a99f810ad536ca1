# SPDX-License-Identifier: Apache-2.0
"""Sequences with a label each, of three modalities, parted so that no group stands in two parts.

``brown``     bytes of the 500 samples of the Brown corpus, by its four major groups of genres; a sample is a group
``fsdd``      the Free Spoken Digit Dataset: raw waveforms at 8 kHz by digit; a speaker is a group
``osuleaf``   outlines of leaves by species, 427 steps; ``acsf1``: power drawn by appliances, 1,460 steps. Both of the
              UCR archive, as aeon ships them, with its own test part
``tones``     made here: two tones far apart, of which the second is two octaves higher or lower; 1,024 steps
"""

import hashlib
import io
import wave
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["DATASETS", "Item", "Labelled", "labelled"]

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a data set before it is read.

    Attributes:
        classes: that there are.
        floor: share of the test part that is of the class most frequent there: what a guess reaches.
        kind: ``bytes``, ``waveform`` or ``series``.
    """

    classes: int
    floor: float
    kind: Literal["bytes", "waveform", "series"]


DATASETS = {
    "brown": Facts(4, 0.41, "bytes"), "fsdd": Facts(10, 0.1, "waveform"), "osuleaf": Facts(6, 55 / 242, "series"),
    "acsf1": Facts(10, 0.1, "series"), "tones": Facts(2, 0.5, "waveform"),
}  # fmt: skip
_GENRES = {"press": "abc", "general prose": "defgh", "learned": "j", "fiction": "klmnpr"}  # letters of Brown's samples
_TEST, _VALIDATION = 0.2, 0.1  # shares of each class, where its publishers have not parted a set
_SPEAKERS: dict[str, Part] = {"george": "test", "lucas": "validation"}  # the other four are trained on
_UCR = {"osuleaf": "OSULeaf", "acsf1": "ACSF1"}


@dataclass(frozen=True, slots=True)
class Item:
    """A sequence.

    Attributes:
        name: of it alone.
        values: uint8 ``[T]`` bytes, or float32 ``[T, channels]`` of mean 0 and variance 1.
        label: number of its class.
        group: what it shares with others, of which all are in one part.
        part: ``train``, ``validation`` or ``test``.
    """

    name: str
    values: Tensor
    label: int
    group: str
    part: Part


@dataclass(frozen=True, slots=True)
class Labelled:
    """A data set.

    Attributes:
        classes: names of what labels number.
        items: all sequences, those of a part in an order that mixes the classes.
    """

    classes: tuple[str, ...]
    items: tuple[Item, ...]

    def part(self, name: str) -> list[Item]:
        """Sequences of a part."""
        return [item for item in self.items if item.part == name]


def labelled(name: str) -> Labelled:
    """The data set called ``name``, one of :data:`DATASETS`.

    Raises:
        UserError: there is none of that name, or its file cannot be had.
    """
    if name not in DATASETS:
        raise UserError(f"there are no labelled sequences {name!r}; there are {', '.join(DATASETS)}")
    made = {"brown": _brown, "fsdd": _fsdd, "tones": _tones}
    found = made[name]() if name in made else _ucr(_UCR[name])
    return replace(found, items=tuple(sorted(found.items, key=lambda item: _mixed(item.name))))


def _mixed(name: str) -> bytes:
    """An order that says nothing and is the same everywhere."""
    return hashlib.sha256(name.encode()).digest()


def _parted(items: Sequence[Item], shares: dict[Part, float]) -> list[Item]:
    """Items of which each is its own group, with so large a part of every class put aside."""
    found = []
    for label in sorted({item.label for item in items}):
        rest = sorted((item for item in items if item.label == label), key=lambda item: _mixed(item.name))
        count = len(rest)
        for part, share in shares.items():
            few = round(share * count)
            found += [replace(item, part=part) for item in rest[:few]]
            rest = rest[few:]
        found += rest
    return found


def _brown() -> Labelled:
    from .texts import corpus

    genres = {letter: i for i, letters in enumerate(_GENRES.values()) for letter in letters}
    items = []
    for text in corpus("brown"):
        code = text.name.rpartition(" ")[2]  # ca01
        values = torch.frombuffer(bytearray(text.content.encode()), dtype=torch.uint8)
        items.append(Item(code, values, genres[code[1]], code, "train"))
    return Labelled(tuple(_GENRES), tuple(_parted(items, {"test": _TEST, "validation": _VALIDATION})))


def _fsdd() -> Labelled:
    from . import files

    items = []
    with zipfile.ZipFile(files.local("fsdd") or files.path("free-spoken-digit-dataset")) as archive:
        for member in archive.namelist():
            if not member.endswith(".wav"):
                continue
            name = member.rpartition("/")[2].removesuffix(".wav")
            digit, speaker, _ = name.split("_")
            with wave.open(io.BytesIO(archive.read(member))) as clip:
                samples = np.frombuffer(clip.readframes(clip.getnframes()), dtype="<i2").astype(np.float32)
            items.append(Item(name, _standard(samples), int(digit), speaker, _SPEAKERS.get(speaker, "train")))
    return Labelled(tuple(map(str, range(10))), tuple(items))


def _ucr(name: str) -> Labelled:
    from . import files

    items: dict[Part, list[Item]] = {"train": [], "test": []}
    with zipfile.ZipFile(files.path("aeon")) as archive:
        for part in ("train", "test"):
            member = f"aeon/datasets/data/{name}/{name}_{part.upper()}.ts"
            _, _, data = archive.read(member).decode().partition("@data")
            for i, line in enumerate(data.split()):
                values, _, label = line.rpartition(":")
                series = _standard(np.array(values.split(","), dtype=np.float32))
                items[part].append(Item(f"{part}-{i}", series, int(label), f"{part}-{i}", part))
    names = sorted({item.label for item in items["train"]})
    both = [*_parted(items["train"], {"validation": _TEST}), *items["test"]]
    return Labelled(tuple(map(str, names)), tuple(replace(item, label=names.index(item.label)) for item in both))


def _tones(count: int = 40, length: int = 1024) -> Labelled:
    """Pairs of tones of an eighth of the length, in the first and in the last quarter, in noise, by their order."""
    rng, items, steps = np.random.default_rng(0), [], np.arange(length // 8)
    parts: tuple[Part, ...] = (*("train",) * 7, "validation", "test", "test")
    for pitch in range(10):  # a group
        for i in range(count):
            low = 0.02 * 1.07**pitch * rng.uniform(1, 1.05)
            tones = [np.sin(2 * np.pi * (low * ratio * steps + rng.uniform())) for ratio in (1, 4)]
            values = 0.1 * rng.standard_normal(length)
            for tone, first in zip(tones if i % 2 else tones[::-1], (0, 3 * length // 4), strict=True):
                at = first + rng.integers(length // 8)
                values[at : at + len(tone)] += tone
            series = _standard(values.astype(np.float32))
            items.append(Item(f"{pitch}-{i}", series, i % 2, f"pitch {pitch}", parts[(7 * pitch) % 10]))
    return Labelled(("falling", "rising"), tuple(items))


def _standard(values: np.ndarray) -> Tensor:
    """``[T]`` as ``[T, 1]`` of mean 0 and variance 1."""
    found = torch.from_numpy(values)[:, None]
    return (found - found.mean()) / found.std().clamp(min=1e-6)
