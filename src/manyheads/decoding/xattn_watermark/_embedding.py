# SPDX-License-Identifier: Apache-2.0
"""What both forms of the watermark share: its fields, the message's keys and values, and reading it back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...call import Site
from ...errors import UserError
from ...writing import Reading, Watermark, binomial_tail
from .embedder import HOW, Embedder, Place
from .extractor import Extractor

__all__ = ["Embedding"]

_AT_ONCE = 64  # texts that are read in one batch


@dataclass(frozen=True, kw_only=True)
class Embedding(Watermark):
    """Base: adds what trained layers make of a message.

    Attributes:
        weights: folder of the layers and of the extractor, as the recipe wrote them.
        message: the bits.
        strength: factor on what is added; as trained at 1, nothing at 0.
        live: the layers themselves, from Python, as in training.
        reader: the extractor itself, likewise.
        rows: messages ``[B, b]`` of 0 and 1, one for each row of a batch, in the place of ``message``; from Python.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})
    place: ClassVar[Place]

    weights: str = field(default="", metadata={"help": f"folder of trained layers and extractor; {HOW} makes one"})
    message: str = field(default="", metadata={"help": "bits to hide, as 1011; as many as were trained"})
    strength: float = field(default=1.0, metadata={"help": "factor on what is added; 0 adds nothing"})
    live: Embedder | None = field(default=None, compare=False, metadata={"help": "layers, made from Python only"})
    reader: Extractor | None = field(default=None, compare=False, metadata={"help": "extractor, from Python only"})
    rows: Tensor | None = field(default=None, compare=False, metadata={"help": "messages of rows, from Python only"})

    def __post_init__(self) -> None:
        if not self.weights and self.live is None and self.reader is None:
            raise UserError(f"{self.slug} needs weights=FOLDER, trained on the model: {HOW}")
        if self.message:
            self.check_message()
        elif self.live is None and self.reader is None:
            raise UserError(f"{self.slug} needs a message to hide, as message=1011")
        if self.strength < 0:
            raise UserError(f"{self.slug}: strength={self.strength} is negative, which hides another message")

    @functools.cached_property
    def trained(self) -> Embedder:
        """The layers."""
        made = self.live if self.live is not None else Embedder.load(self.weights)
        if made.config["place"] != self.place:
            other = {"between": "xattn_watermark", "within": "xattn_watermark.substituted"}[made.config["place"]]
            raise UserError(f"{self.weights or 'live'} was trained as {other}: use that")
        if self.message:
            self.check_message(made.config["bits"])
        return made

    @functools.cached_property
    def extractor(self) -> Extractor:
        """What reads the message; the layers are not needed for it, nor the model."""
        return self.reader if self.reader is not None else Extractor.load(self.weights)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal and site.layer in self.trained.kv_heads

    def change(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor | None:
        """What is added ``[B, T, D]`` to the stream, in its dtype; None for nothing."""
        assert site.layer is not None
        trained = self.trained
        if trained.off or self.strength == 0:
            return None
        if hidden.shape[-1] != (dim := trained.config["dim"]):
            raise UserError(f"these layers are for a width of {dim}, and {site.name} has {hidden.shape[-1]}: {HOW}")
        layer = trained.used(site.layer, hidden)
        if layer.gate.requires_grad:
            k, v = layer.memory(trained.embedded(self._messages(), layer))
        else:
            if state.get("of") is not layer:
                state["of"], state["memory"] = layer, layer.memory(trained.embedded(self._messages(), layer))
            k, v = state["memory"]
        x = hidden.to(layer.gate.dtype)
        added: Tensor = self.strength * layer(x, k, v)
        return added.to(hidden.dtype)

    def _messages(self) -> Tensor:
        """Messages ``[B, b]``, or ``[1, b]`` for all rows."""
        if self.rows is not None:
            return self.rows
        if self.message:
            return torch.tensor([[float(bit) for bit in self.message]])
        if self.trained.messages is None:
            raise UserError(f"{self.slug} needs a message to hide, as message=1011")
        return self.trained.messages

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], messages: Sequence[str] | None = None) -> list[Reading]:
        extractor, found = self.extractor, list[Reading]()
        if messages is None:
            self.check_message(extractor.bits)
            messages = [self.message] * len(texts)
        for i in range(0, len(texts), _AT_ONCE):
            part = texts[i : i + _AT_ONCE]
            width = max(1, *map(len, part))
            ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in part])
            real = torch.arange(width) < torch.tensor([[len(text)] for text in part])
            device = extractor.queries.device
            logits = extractor(extractor.embedded(ids.to(device)), real.to(device)).float().cpu()
            for row, text, message in zip(logits.tolist(), part, messages[i : i + _AT_ONCE], strict=True):
                evidence = tuple(row) if len(text) else (0.0,) * len(row)
                matches = sum((x > 0) == (bit == "1") for x, bit in zip(evidence, message, strict=True))
                found.append(Reading(evidence, len(text), binomial_tail(matches, len(row)) if len(text) else 1.0))
        return found
