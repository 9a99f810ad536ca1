# SPDX-License-Identifier: Apache-2.0
"""Which family at a length, on a card: predicted times, bytes and state of all of them, the fastest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log2
from typing import Any, Literal

from ..attention.mla import seconds
from ..errors import UserError
from .base import Layer, Stages, total
from .cards import Card
from .taxonomy import Entry, families

__all__ = ["WHATS", "Advice", "Setting", "crossover", "ranked"]

What = Literal["prefill", "decode", "train"]
WHATS: tuple[What, ...] = ("prefill", "decode", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is asked for.

    Attributes:
        layer: sizes of a layer, and the tokens of a row.
        card: to run on.
        what: a pass over a prompt, one more token, or a step of training.
        layers: of the model.
        parameters: of the model; 0 where only its attention counts.
        pretrained: whether only what a trained softmax model can have counts: nothing that needs training.
    """

    layer: Layer
    card: Card
    what: What = "prefill"
    layers: int = 32
    parameters: int = 0
    pretrained: bool = False

    @property
    def rest(self) -> float:
        """Seconds that the projections and channel mixers of the whole model take, 0 where they are not known."""
        layer, platform = self.layer, self.card.platform
        tokens = layer.batch * (1 if self.what == "decode" else layer.length)
        times = 3 if self.what == "train" else 1
        flops, moved = 2 * self.parameters * tokens, self.parameters * layer.itemsize
        return times * max(flops / platform.peak_flops, moved / platform.bandwidth)

    @property
    def weights(self) -> float:
        """Bytes of weights; in training with gradients and two moments of 4 bytes."""
        return self.parameters * (self.layer.itemsize + (self.layer.itemsize + 8 if self.what == "train" else 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What is predicted of a family, for all layers of the model.

    Attributes:
        entry: the family.
        seconds: of attention alone.
        whole: of the model, where it is known.
        flops, bytes: of attention.
        state: bytes that the rows remember.
        fits: whether weights and state fit the card.
    """

    entry: Entry
    seconds: float
    whole: float
    flops: float
    bytes: float
    state: int
    fits: bool

    def row(self) -> dict[str, Any]:
        """As ``--json`` has it."""
        one = self.entry
        return {
            "family": one.name, "title": one.title, "group": one.group, "seconds": self.seconds, "whole": self.whole,
            "flops": self.flops, "bytes": self.bytes, "state": self.state, "fits": self.fits,
            "exactness": one.exactness, "training": one.training, "spec": one.spec, "members": list(one.members),
            "cites": list(one.cites),
        }  # fmt: skip


def ranked(setting: Setting, among: Sequence[str] = ()) -> list[Advice]:
    """What is predicted of every family that serves: those that fit the card first, then by time, then by state.

    Args:
        setting: what is asked for.
        among: names of families, all when empty.

    Raises:
        UserError: none serves.
    """
    found = [_advice(one, setting) for one in families().values() if _serves(one, setting, among)]
    if not found:
        raise UserError("no family serves this setting; ask for others")
    return sorted(found, key=lambda one: (not one.fits, one.seconds, one.state))


def _serves(one: Entry, setting: Setting, among: Sequence[str]) -> bool:
    if among and one.name not in among:
        return False
    if setting.layer.causal and not one.decoder:
        return False
    if setting.pretrained and one.training == "required":
        return False
    return not (setting.what == "train" and one.category == "caches" and one.exactness != "learned")


def _advice(one: Entry, setting: Setting) -> Advice:
    stages = work(one, setting)
    spent = setting.layers * seconds(stages, setting.card.platform)
    flops, moved = total(stages)
    state = setting.layers * one.formula.state(setting.layer)
    held = setting.weights + (state if setting.what != "train" else 0)
    return Advice(
        entry=one, seconds=spent, whole=spent + setting.rest, flops=setting.layers * flops,
        bytes=setting.layers * moved, state=state, fits=held <= setting.card.memory,
    )  # fmt: skip


def work(one: Entry, setting: Setting) -> Stages:
    """The stages of a layer."""
    formula, layer, fused = one.formula, setting.layer, setting.card.fused
    if setting.what == "decode":
        return formula.step(layer, fused)
    forward = formula.forward(layer, fused)
    return (*forward, *formula.backward(layer, fused)) if setting.what == "train" else forward


def crossover(lengths: Sequence[int], first: Sequence[float], second: Sequence[float]) -> float:
    """The length from which on ``second`` takes less than ``first`` at all longer ones; 0 always, infinite never.

    Args:
        lengths: ascending.
        first, second: seconds at these; between two lengths both are taken for powers of it.
    """
    gap = [log2(a / b) for a, b in zip(first, second, strict=True)]
    if gap[-1] <= 0:
        return inf
    last = max((i for i, x in enumerate(gap) if x <= 0), default=-1)
    if last < 0:
        return 0.0
    share = -gap[last] / (gap[last + 1] - gap[last])
    return float(lengths[last] * (lengths[last + 1] / lengths[last]) ** share)
