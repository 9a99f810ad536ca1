# SPDX-License-Identifier: Apache-2.0
"""Where the attention goes in an image or a recording: by place, and by the token that receives it.

Shapes as in :mod:`manyheads.calls.statistics`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..call import Site
from ..calls.statistics import ColumnSum, Entropy, Pooled, Rows, Statistic
from ..errors import UserError
from ..formatting import number
from ..lens import AttentionView, LensResult, Memory
from .attention_breakdown import AttentionBreakdown
from .signals import Laid, Signal

__all__ = ["CLASS", "RECEIVED", "Kinds", "SignalBreakdown", "SignalResult"]

RECEIVED = "attention received, times a uniform share"
CLASS = "attention of the class token, times a uniform share"

_ITSELF, _AROUND, _ELSEWHERE = "itself", "the patches around it", "patches farther away"
_NEAR, _WIDE, _REST = "0.2 s around it", "1 s around it", "frames farther away"
_HEARD, _SILENCE = "the recording", "silence behind the recording"
_WORDS, _END = "the sentence", "its last token"
_NEXT_TO, _FAR = "the tokens beside it", "tokens farther away"
_HEADS = 16  # of the last layer whose class token is drawn
_TOP = 5  # tokens that are named


@dataclass
class Kinds(Rows):
    """Mass of each row by the kind of its columns, ``[B, H, T, C]``; kinds are disjoint and cover all.

    Attributes:
        kinds: ``[T or 1, S]``, 0 to ``count - 1``.
        count: C.
    """

    kinds: Tensor
    count: int

    def update(self, rows: Tensor, start: int, length: int) -> None:
        mine = self.kinds if len(self.kinds) == 1 else self.kinds[start : start + rows.shape[2]]
        self.put(torch.stack([rows.masked_fill(mine != c, 0).sum(-1) for c in range(self.count)], -1), start, length)


@dataclass
class SignalResult(LensResult):
    """As every result, and of cross-attention for each prompt its map, mean over layers and heads.

    Attributes:
        alignments: ``[T, cells]``, a cell being the frames of a column of ``maps``.
    """

    alignments: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SignalBreakdown(AttentionBreakdown):
    """Shares by place, what each token receives, entropy, pooled maps; of a decoder over its own tokens as of text."""

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        if view.call.site.causal:
            return super().statistics(view)
        names, kinds = _places(view)
        view.memory["names"] = names
        length = view.call.q.shape[2]
        weight = torch.full((1, length, 2), 1 / length, device=kinds.device)
        weight[:, :, 1] = torch.arange(length, device=kinds.device) == 0
        asked: dict[str, Statistic] = {"kinds": Kinds(kinds, len(names)), "entropy": Entropy()}
        return asked | {"received": ColumnSum(weight), "map": Pooled(self.size)}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        if view.call.site.causal:
            super().update(view, found)
            return
        memory, rows, size = view.memory, view.valid[:, None], view.call.k.shape[2]
        for i, name in enumerate(memory["names"]):
            view.add_mean(name, found["kinds"][..., i], rows)
        view.add_mean("entropy", found["entropy"] / np.log(max(2, size)), rows)
        self._add_map(memory, found["map"].sum(0).cpu(), len(found["map"]))
        memory.setdefault("received", []).append((found["received"][0] * size).cpu())  # [H, S, 2]
        memory.setdefault("alignments", []).append(found["map"][0].mean(0).cpu())
        memory.setdefault("signals", []).append(_signal(view))

    def named(self, sites: Sequence[tuple[Site, Memory]]) -> tuple[str, ...]:
        names: tuple[str, ...] = sites[0][1].get("names", self.parts)
        return names

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        made = SignalResult(**vars(super().compute(sites)))
        if "received" not in sites[0][1]:
            return made
        made.notes = []
        signals: list[Signal] = sites[0][1]["signals"]
        for name, rows in self._received(sites):
            made.series[name] = rows
        if sites[0][0].kind == "cross":
            every = zip(*(memory["alignments"] for _, memory in sites), strict=True)
            made.alignments = [torch.stack(maps).mean(0).numpy() for maps in every]
        top = []
        for n, row in enumerate(made.series[RECEIVED]):
            order = np.argsort(-row)[:_TOP]
            top += [{"prompt": n, "column": int(i), "times a uniform share": float(row[i])} for i in order]
            if n == 0:
                labels = signals[0].labels if signals[0].grid else signals[0].in_frames().labels
                said = "; ".join(f"{labels[i]} ({number(row[i])} times)" for i in order[:3])
                made.notes = [f"Most attention in {signals[0].name}, in times a uniform share, goes to: {said}."]
        made.records["tokens that receive most, mean over layers and heads"] = top
        return made

    @staticmethod
    def _received(sites: Sequence[tuple[Site, Memory]]) -> Iterator[tuple[str, list[Any]]]:
        """Series ``[S]`` by name: received by each token, and given by the class token."""
        count = len(sites[0][1]["received"])
        means = [[memory["received"][n].double().mean(0).numpy() for _, memory in sites] for n in range(count)]
        yield RECEIVED, [np.mean([x[:, 0] for x in rows], 0) for rows in means]
        if not (sites[0][1]["signals"][0].grid and sites[0][1]["signals"][0].prefix):
            return
        last, memory = sites[-1]
        layer = last.index if last.layer is None else last.layer
        yield f"{CLASS}, mean over layers and heads", [np.mean([x[:, 1] for x in rows], 0) for rows in means]
        yield f"{CLASS}, layer {layer}", [rows[-1][:, 1] for rows in means]
        for head in range(min(_HEADS, memory["received"][0].shape[0])):
            yield f"{CLASS}, head {layer}.{head}", [x[head, :, 1].double().numpy() for x in memory["received"]]


def _signal(view: AttentionView) -> Signal:
    assert isinstance(view.roles, Laid)
    return view.roles.signal


def _places(view: AttentionView) -> tuple[tuple[str, ...], Tensor]:
    """Names of the kinds of columns, and the kind of each column for each query ``[T or 1, S]``."""
    signal, size, device = _signal(view), view.call.k.shape[2], view.call.q.device
    expected = signal.frames or len(signal.ids)
    if size != expected or (signal.grid and view.call.q.shape[2] != size):
        raise UserError(
            f"{view.call.site.name} looks at {size} tokens, and {signal.name} has {expected}: a model that masks, "
            "merges or windows its patches has no map over the image; look at it with manyheads.watch"
        )
    if signal.grid is None:
        return _times(signal, view.cross, device)
    rows, columns = signal.grid
    places = torch.arange(rows * columns, device=device)
    apart = torch.maximum(
        (places[:, None] // columns - places // columns).abs(), (places[:, None] % columns - places % columns).abs()
    )
    before = signal.labels[: signal.prefix]
    plain = [name for name in before if not name.startswith("register")]
    last = signal.prefix + rows * columns  # behind the patches
    names = (
        *plain, *(["registers"] if len(plain) < len(before) else []), *(["detection tokens"] if last < size else []),
        _ITSELF, _AROUND, _ELSEWHERE,
    )  # fmt: skip
    first = len(names) - 3
    kinds = torch.full((size, size), first + 2, dtype=torch.uint8, device=device)  # what a class token sees of patches
    kinds[signal.prefix : last, signal.prefix : last] = first + apart.clamp(max=2).to(torch.uint8)
    for i in range(signal.prefix):
        kinds[:, i] = min(i, len(plain))
    kinds[:, last:] = first - 1
    kinds.fill_diagonal_(first)
    return names, kinds


def _times(signal: Signal, cross: bool, device: torch.device) -> tuple[tuple[str, ...], Tensor]:
    frame = torch.arange(signal.frames, device=device)
    if signal.pieces and cross:
        return (_WORDS, _END), (frame == signal.frames - 1)[None].to(torch.uint8)
    if signal.pieces:
        return (_ITSELF, _NEXT_TO, _FAR), (frame[:, None] - frame).abs().clamp(max=2).to(torch.uint8)
    silent = frame >= signal.heard
    if cross:
        return (_HEARD, _SILENCE), silent[None].to(torch.uint8)
    apart = (frame[:, None] - frame).abs() * signal.step
    kinds = torch.where(apart <= 0.2, 1, torch.where(apart <= 1, 2, 3)).to(torch.uint8)
    kinds[silent.expand_as(kinds)] = 4
    kinds.fill_diagonal_(0)
    return (_ITSELF, _NEAR, _WIDE, _REST, _SILENCE), kinds
