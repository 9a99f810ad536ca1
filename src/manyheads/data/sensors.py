# SPDX-License-Identifier: Apache-2.0
"""Recordings of body sensors: a phone in the pocket and a watch on the wrist of 23 people who stand up, walk and turn.

Each recording is one execution of the sequence that clinics time ("up and go"): seated, standing up, walking, turning,
walking back, turning, sitting down. Accelerometer and gyroscope of both devices are brought to one clock.
"""

import csv
import io
import zipfile
from dataclasses import dataclass

import numpy as np

from ..errors import UserError

__all__ = ["ACTIVITIES", "CHANNELS", "RATE", "Recording", "read_csv", "recordings"]

RATE = 25  # frames a second
ACTIVITIES = ("seated", "sitting down", "standing up", "turning", "walking")
CHANNELS = tuple(f"{place} {kind} {axis}" for place in ("phone", "watch") for kind in ("acc", "gyro") for axis in "xyz")


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What sensors of one person saw.

    Attributes:
        name: of it alone.
        person: who wore them.
        values: float32 ``[T, channels]``, m/s^2 and rad/s where the set is the public one.
        labels: of each frame, ``T`` of them; empty where nobody said.
        channels: names of the columns.
    """

    name: str
    person: str
    values: np.ndarray
    labels: tuple[str, ...]
    channels: tuple[str, ...]


def recordings() -> list[Recording]:
    """The public recordings, 25 frames a second, in their own order.

    Raises:
        UserError: the file cannot be had.
    """
    from . import files

    found = []
    with zipfile.ZipFile(files.path("sp-sw-har")) as archive:
        for member in sorted(archive.namelist()):
            if not member.endswith("_sp.csv"):
                continue
            phone, watch = (_device(archive.read(f"{member[:-7]}_{kind}.csv")) for kind in ("sp", "sw"))
            start, end = (f(phone[0][edge], watch[0][edge]) for f, edge in ((max, 0), (min, -1)))
            edges = np.arange(start, end, 1000 / RATE)
            if len(edges) < 2:
                continue
            values = np.concatenate([_binned(times, x, edges) for times, x, _ in (phone, watch)], 1)
            middles = (edges[:-1] + edges[1:]) / 2
            at = np.searchsorted(phone[0], middles).clip(max=len(phone[0]) - 1)
            name = member.rpartition("/")[2].removesuffix("_sp.csv")
            labels = tuple(phone[2][i] for i in at)
            found.append(Recording(name, name.partition("_")[0], values, labels, CHANNELS))
    return found


def _device(content: bytes) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Times in ms ``[N]``, values ``[N, 6]`` and labels of a file of one device."""
    rows = list(csv.reader(io.StringIO(content.decode())))[1:]
    table = np.array([row[:7] for row in rows], np.float64)
    return table[:, 6], table[:, :6], [row[7].strip().lower().replace("_", " ") for row in rows]


def _binned(times: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of ``values [N, C]`` between edges; where nothing was measured, on the line between neighbours."""
    place = np.searchsorted(edges, times, "right") - 1
    inside = (place >= 0) & (place < len(edges) - 1)
    counts = np.bincount(place[inside], minlength=len(edges) - 1)
    seen, at = counts > 0, np.arange(len(edges) - 1)
    columns = []
    for column in values.T:
        sums = np.bincount(place[inside], column[inside], minlength=len(edges) - 1)
        columns.append(np.interp(at, at[seen], sums[seen] / counts[seen]))
    return np.stack(columns, 1).astype(np.float32)


def read_csv(name: str, person: str, text: str) -> Recording:
    """A file of the user's: a header, a row for each frame, a column for each sensor and, or not, one named label.

    Raises:
        UserError: it is none, or holds what is no number.
    """
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    if len(rows) < 2:
        raise UserError(f"{name} has no rows: a recording is a header and a row of numbers for each frame")
    heads = [head.strip() for head in rows[0]]
    keep = [i for i, head in enumerate(heads) if head != "label"]
    try:
        values = np.array([[row[i] for i in keep] for row in rows[1:]], np.float32)
        labels = tuple(row[heads.index("label")].strip() for row in rows[1:]) if "label" in heads else ()
    except (ValueError, IndexError) as error:
        raise UserError(f"{name}: {error}; every row has a number for each sensor of the header") from error
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds what is no finite number; leave out the frames or fill them")
    return Recording(name, person, values, labels, tuple(heads[i] for i in keep))
