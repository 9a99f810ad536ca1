# SPDX-License-Identifier: Apache-2.0
"""Decode with a sensor of interaction between image and text, and look again where it rises.

A step is one forward of four readings as a batch over one cache; a step that the gate opens is read a second time, its
first reading with attention raised to the image, and the cache keeps that. Without the interaction gate there is one
reading, and ``always`` and ``random`` know before a step. See :mod:`manyheads.decoding.conscious_gaze`.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import UserError
from ...writing import Decoding, ModelAccess, Request, Written
from .._images import ImageDecoding, Switch, Switched
from .interaction import sensed
from .steering import Place, Steering

__all__ = ["ConsciousGaze", "calibrated"]

Gate = Literal["interaction", "entropy", "always", "never", "random"]


@dataclass(frozen=True, kw_only=True)
class ConsciousGaze(ImageDecoding):
    """Write about an image, with attention raised to it where image and text interact in the choice of a token."""

    gate: Gate = field(
        default="interaction", metadata={"help": "what opens it: interaction, entropy, always, never or random"}
    )
    candidates: int = field(default=20, metadata={"help": "likeliest tokens over which interaction varies"})
    threshold: float | None = field(
        default=None, metadata={"help": "of interaction or entropy; a running quantile of this text when not given"}
    )
    quantile: float = field(default=0.8, metadata={"help": "of what was sensed before, above which the gate opens"})
    warmup: int = field(default=5, metadata={"help": "tokens before a running quantile opens it"})
    rate: float = field(default=0.2, metadata={"help": "share of tokens at which a random gate opens"})
    target: float = field(default=0.2, metadata={"help": "least share of attention for the image, in every head"})
    shape: float = field(default=0.0, metadata={"help": "weight of where heads agree to look; 0 for none"})
    place: Place = field(default="middle", metadata={"help": "layers where none are named: middle or last"})
    head: int = field(default=1, metadata={"help": "tokens the prompt begins with that no reading hides"})
    tail: int = field(default=0, metadata={"help": "tokens the prompt ends with that no reading hides"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steering(())
        if self.candidates < 2 or self.warmup < 1 or self.head < 1 or self.tail < 0:
            raise UserError(
                f"candidates={self.candidates}, warmup={self.warmup}, head={self.head}, tail={self.tail}: candidates "
                "are 2 or more, warmup and head 1 or more, tail not negative"
            )
        if not 0 <= self.quantile <= 1 or not 0 <= self.rate <= 1:
            raise UserError(f"quantile={self.quantile}, rate={self.rate}: both are in [0, 1]")

    def write(self, request: Request, access: ModelAccess) -> Written:
        image = access.image_columns(request.ids, self.spec)
        seen = self.players(image) if self.gate == "interaction" else torch.ones_like(image)[None]
        if not bool(seen[:, 0].all()):
            raise UserError(f"{self.spec} hides images, and the prompt begins with one: begin it with a start of text")
        switch = Switch()
        edit = Switched(inner=self._steering(tuple(image.nonzero()[:, 0].tolist())), switch=switch)
        with access.use(edit) if self.gate != "never" else nullcontext(), torch.inference_mode():
            return self._write(request, access, seen, switch)

    def players(self, image: Tensor) -> Tensor:
        """What each reading sees of a prompt whose image columns are ``image [T]``: bool ``[4, T]``."""
        text = ~image
        text[: self.head] = False
        text[len(text) - self.tail :] = False
        return torch.stack([torch.ones_like(image), ~text, ~image, ~(image | text)])

    def _steering(self, columns: tuple[int, ...]) -> Steering:
        return Steering(
            columns=columns, layers=self.layers, target=self.target, shape=self.shape, place=self.place
        )  # fmt: skip

    def _write(self, request: Request, access: ModelAccess, seen: Tensor, switch: Switch) -> Written:
        streams = access.readings(request.ids, seen, [request.given] * len(seen))
        generator, later = request.generator(), seen.new_tensor([True, False, True, False])[: len(seen)]
        tokens: list[int] = []
        past: list[float] = []
        opened: list[bool] = []
        forwards = 0
        for _ in range(request.most):
            drawn = self.gate == "random" and float(torch.rand((), generator=generator, device=seen.device)) < self.rate
            switch.on = self.gate == "always" or drawn
            logits = streams.next()
            forwards += 1
            if self.gate in ("interaction", "entropy"):
                value = self.sense(logits)
                switch.on = self._opens(value, past)
                past.append(value)
                if switch.on:
                    logits = streams.again()
                    forwards += 1
            opened.append(switch.on)
            token = self.picked(logits[0], generator)
            if token in request.ends:
                break
            tokens.append(token)
            streams.append(token, later)
        notes: dict[str, Any] = {"intervened": sum(opened) / len(opened), "steps": len(opened), "opened": opened}
        if past:
            notes["sensed"] = past
        return Written(tokens, forwards, notes)

    def sense(self, logits: Tensor) -> float:
        """What the gate goes by: interaction of ``logits [4, V]``, or entropy of the first, nats."""
        if self.gate == "interaction":
            return sensed(logits, self.candidates).variance
        log_p = logits[0].log_softmax(-1)
        return -float((log_p.exp() * log_p).sum())

    def _opens(self, value: float, past: list[float]) -> bool:
        if self.threshold is not None:
            return value > self.threshold
        return len(past) >= self.warmup and value > float(torch.tensor(past).quantile(self.quantile))


def calibrated(
    strategy: ConsciousGaze, requests: Iterable[Request], write: Callable[[Decoding, Request], Written]
) -> ConsciousGaze:
    """``strategy`` with the threshold above which its gate opens at a share ``1 - quantile`` of tokens.

    Args:
        strategy: whose gate is interaction or entropy.
        requests: texts that are written on without looking again; a hundred do.
        write: :func:`manyheads.integrations.decoding.write`.

    Raises:
        UserError: the gate goes by nothing, or nothing was written.
    """
    if strategy.gate not in ("interaction", "entropy"):
        raise UserError(f"{strategy.spec}: a gate that goes by {strategy.gate} has no threshold")
    watching = replace(strategy, threshold=math.inf)
    values = [value for request in requests for value in write(watching, request).notes["sensed"]]
    if not values:
        raise UserError(f"{strategy.spec}: nothing was written, so that there is no quantile")
    return replace(strategy, threshold=float(torch.tensor(values, dtype=torch.float64).quantile(strategy.quantile)))
