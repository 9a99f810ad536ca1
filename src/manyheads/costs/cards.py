# SPDX-License-Identifier: Apache-2.0
"""Hardware: cards by name, from their data sheets, and this machine, measured.

FLOP/s and bandwidth are those of :data:`manyheads.attention.mla.PLATFORMS`; memory, and the link to the host, are from
the same sheets (PCIe 5 or 4 of 16 lanes, one way).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from ..attention.mla import PLATFORMS, Platform, platform_of
from ..errors import UserError

__all__ = ["Card", "calibrate", "card", "cards"]

_MEMORY = {
    "H200": (141e9, 64e9), "H100 PCIe": (80e9, 64e9), "H100": (80e9, 64e9), "A100 40GB": (40e9, 32e9),
    "A100": (80e9, 32e9), "L40S": (48e9, 32e9), "L4": (24e9, 32e9), "A10": (24e9, 32e9), "RTX 4090": (24e9, 32e9),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Card:
    """A machine that attention runs on.

    Attributes:
        name: of it.
        platform: its speed, for numbers of two bytes, or of four on a CPU.
        memory: bytes.
        measured: whether the speed was measured rather than read off a data sheet.
    """

    name: str
    platform: Platform
    memory: float
    measured: bool = False

    @property
    def fused(self) -> bool:
        """Whether attention runs in kernels that keep logits on the chip."""
        return self.platform.fused_heads


def cards() -> list[str]:
    """Names that :func:`card` knows, ``this`` beside them."""
    return list(PLATFORMS)


def card(name: str, itemsize: int = 2) -> Card:
    """The card called ``name``, upper and lower case and spaces alike; ``this`` is measured here.

    Raises:
        UserError: it is not known.
    """
    if _plain(name) == "this":
        return calibrate()
    known = {_plain(one): one for one in PLATFORMS}
    among = [one for plain, one in known.items() if _plain(name) and _plain(name) in plain]  # 4090: RTX 4090
    if _plain(name) not in known and len(among) != 1:
        raise UserError(f"no card {name!r} is known: give {', '.join(PLATFORMS)}, or this to measure your own")
    found = known.get(_plain(name), among[0])
    memory, link = _MEMORY.get(found, (_host_memory(), inf))
    return Card(found, replace(platform_of(found, itemsize), link=link), memory)


@lru_cache(maxsize=2)
def calibrate(device: str | None = None) -> Card:
    """This machine: product rate, bandwidth of copies by size, and a launch, measured once, in a few seconds.

    Args:
        device: ``cuda`` or ``cpu``; a GPU if there is one when None.
    """
    import torch

    from .clock import Clock

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock = Clock(place)
    found = replace(clock.calibrate(), rates=clock.rates())
    if place.type == "cpu":
        return Card("this CPU", found, _host_memory(), True)
    here = torch.cuda.get_device_properties(place)
    return Card(here.name, replace(found, link=_link(place)), float(here.total_memory), True)


def _link(device: object) -> float:
    """Bytes/s of a copy from page-locked memory of the host."""
    import torch

    from .clock import Clock

    source = torch.empty(1 << 27, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)  # type: ignore[arg-type]
    return source.nbytes / Clock(target.device).best(lambda: target.copy_(source, non_blocking=True), 5)


def _plain(name: str) -> str:
    return "".join(name.lower().split()).replace("-", "").replace("_", "")


def _host_memory() -> float:
    """Bytes of this machine's memory."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # no such call on Windows
        return inf
