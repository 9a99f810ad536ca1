# SPDX-License-Identifier: Apache-2.0
"""Modelled times of methods on masks, for more processes and tokens than there are here; nothing is started."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...parallel import PATTERNS, Layout, layout, pattern
from ...parallel._cost import ASSUMED, BACKWARD, CLUSTERS, Efficiency, predict
from ...parallel._counts import Counts, Shape, count
from ...parallel._methods import METHODS, method
from .context_attention import ITEM

__all__ = ["Setting", "modelled", "read_efficiency"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is modelled.

    Attributes:
        ranks, tokens: processes, and tokens of all of them.
        heads, kv_heads, width, dtype: of one row; the benchmark's own by default.
        node: processes of a machine; the cluster's where None.
        cluster: one of :data:`manyheads.parallel._cost.CLUSTERS`.
        seed: of what masks draw.
        backward: the gradients too.
        efficiency: of attention by the length of a piece.
    """

    ranks: int = 64
    tokens: int = 1 << 19
    heads: int = 64
    kv_heads: int = 8
    width: int = 128
    dtype: str = "bfloat16"
    node: int | None = None
    cluster: str = "h100"
    seed: int = 0
    backward: bool = False
    efficiency: Efficiency = ASSUMED

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        for what, name, known in (("cluster", self.cluster, CLUSTERS), ("dtype", self.dtype, ITEM)):
            if name not in known:
                raise UserError(f"there is no {what} {name!r}; there are {', '.join(known)}")

    @property
    def of_machine(self) -> int:
        """Processes of a machine."""
        return self.node or CLUSTERS[self.cluster].node


def modelled(setting: Setting, masks: Iterable[str] = (), methods: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """A row for each mask and method: counted work and bytes, and modelled milliseconds; or why there is none."""
    import dataclasses

    place = dataclasses.replace(CLUSTERS[setting.cluster], node=setting.of_machine)
    shape = Shape(setting.heads, setting.kv_heads, setting.width, itemsize=ITEM[setting.dtype])
    for name in masks or PATTERNS:
        mask = pattern(name, setting.tokens, setting.seed)
        layouts: dict[str, Layout] = {}
        for way in methods or METHODS:
            given = method(way).given(setting.ranks, setting.of_machine, setting.kv_heads)
            row: dict[str, Any] = {"mask": name, "method": way, **given}
            how = given.pop("layout")
            try:
                if how not in layouts:
                    layouts[how] = layout(how, mask, setting.ranks)
                counts = count(mask, setting.ranks, layouts[how], shape, **given)
            except UserError as error:
                yield row | {"why": f"not supported: {error}"}
                continue
            yield row | _said(counts, setting) | _seconds(counts, setting, place)


def _said(counts: Counts, setting: Setting) -> dict[str, Any]:
    back = setting.backward
    return {
        "imbalance": counts.imbalance, "sent": counts.total(back) / counts.ranks,
        "least": counts.least(back) / counts.ranks,
        "between": counts.total(back, setting.of_machine) / counts.ranks, "moved": counts.moved,
    }  # fmt: skip


def _seconds(counts: Counts, setting: Setting, place: Any) -> dict[str, Any]:
    found = predict(counts, place, setting.efficiency)
    slowest = found.slowest(setting.backward)
    mean = float((found.forward + found.backward * setting.backward).mean())
    flops = counts.flops * (1 + BACKWARD * setting.backward) / counts.ranks
    both = counts.flops * (1 + BACKWARD) / counts.ranks / found.slowest()
    return {
        "modelled": 1e3 * slowest, "modelled_mean": 1e3 * mean, "rate": flops / slowest / 1e12,
        "rate_back": both / 1e12,
    }  # fmt: skip


def read_efficiency(path: Path) -> Efficiency:
    """The curve that ``benchmarks/parallel_efficiency.py`` has written.

    Raises:
        UserError: the file holds none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        curve = data["curve"]
        return Efficiency(
            tuple(map(int, curve["lengths"])), tuple(map(float, curve["shares"])), f"measured, {path.name}",
            float(curve.get("back", 1.0)),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no curve of efficiency ({error}): run benchmarks/parallel_efficiency.py"
        ) from error
