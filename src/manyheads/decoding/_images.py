# SPDX-License-Identifier: Apache-2.0
"""What strategies share that write about images: choosing a token, and edits of attention to the columns of images."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..attention import reference
from ..call import AttentionCall, Site
from ..calls.edits import add_bias
from ..errors import UserError
from ..strategy import AttentionEdit, Layers
from ..writing import DecodingLoop, Readings, Request, Written

__all__ = ["ColumnEdit", "ImageDecoding", "Switch", "Switched", "plausible"]


@dataclass(frozen=True, kw_only=True)
class ImageDecoding(DecodingLoop):
    """Writes about the image in a prompt, from logits that it works out for every token and a cache of its own."""

    reads_cache: ClassVar[bool] = False

    temperature: float = field(default=0.0, metadata={"help": "of draws; 0 takes the likeliest token"})

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: it is 0 or more")

    def picked(self, logits: Tensor, generator: Generator) -> int:
        """A token by ``logits [V]``."""
        if self.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial((logits / self.temperature).softmax(0), 1, generator=generator))

    def follow(
        self, request: Request, streams: Readings, generator: Generator, combine: Callable[[Tensor], Tensor]
    ) -> Written:
        """Write by the logits ``[V]`` that ``combine`` makes of those of readings that see all that follows."""
        tokens: list[int] = []
        everyone = torch.ones_like(streams.seen[:, 0])
        for _ in range(request.most):
            token = self.picked(combine(streams.next()), generator)
            if token in request.ends:
                return Written(tokens, len(tokens) + 1)
            tokens.append(token)
            streams.append(token, everyone)
        return Written(tokens, len(tokens))


def plausible(logits: Tensor, by: Tensor, share: float) -> Tensor:
    """``logits [V]`` of tokens that are at least ``share`` times as likely as the likeliest, by logits ``by [V]``."""
    if share == 0:
        return logits
    return logits.masked_fill(by < by.max() + torch.tensor(share).log(), -torch.inf)


@dataclass(frozen=True, kw_only=True)
class ColumnEdit(AttentionEdit):
    """Shifts what the newest token attends to, over columns of images: base of what differs by how much."""

    columns: Layers = field(default=None, metadata={"help": "of the image among the prompt's tokens from 0, as 5-580"})

    @abstractmethod
    def shift(self, scores: Tensor, image: Tensor, sinks: Tensor | None) -> Tensor:
        """What is added to logits ``[B, H, S]`` (minus infinity where hidden), given the columns ``image [S]``."""

    def selects(self, site: Site) -> bool:
        return site.causal and super().selects(site)

    def bias(self, call: AttentionCall) -> Tensor:
        """Of a call, ``[B, H, T, S]``, in float32 or wider: nothing but in the last row."""
        call.require_softmax()
        if not self.columns:
            raise UserError(f"{self.slug}: say which columns the image has, as {self.slug}:columns=5-580")
        if call.site.window is not None:
            raise UserError(f"{self.spec}: a sliding window counts columns from its own begin; use another model")
        size, wide = call.k.shape[2], reference.widened
        place = torch.tensor(self.columns, dtype=torch.long, device=call.q.device)
        image = torch.zeros(size, dtype=torch.bool, device=call.q.device)
        image[place[place < size]] = True
        own = call.bias if call.bias is None or call.bias.shape[-2] == 1 else call.bias[..., -1:, :]
        scores = reference.logits(
            wide(call.q[:, :, -1:]), wide(call.k), scale=call.scale, bias=own, softcap=call.softcap
        )  # fmt: skip
        allowed = call.mask  # the causal mask hides nothing from the last row
        if allowed is not None:
            scores = scores.masked_fill(~allowed[..., -1:, :], -torch.inf)
        made = self.shift(scores[:, :, 0], image, call.sinks)
        before = made.new_zeros(*made.shape[:2], call.q.shape[2] - 1, size)
        return torch.cat([before, made[:, :, None]], 2)

    def edit(self, call: AttentionCall) -> AttentionCall:
        return add_bias(call, self.bias(call))


@dataclass(slots=True)
class Switch:
    """Whether an edit acts."""

    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Switched(AttentionEdit):
    """An edit of the first row of a batch alone, while a switch is on."""

    inner: ColumnEdit
    switch: Switch

    @property
    def spec(self) -> str:
        return self.inner.slug

    def selects(self, site: Site) -> bool:
        return self.inner.selects(site)

    def edit(self, call: AttentionCall) -> AttentionCall:
        if not self.switch.on:
            return call
        first = call.replace(
            q=call.q[:1], k=call.k[:1], v=call.v[:1], mask=_first(call.mask), bias=_first(call.bias)
        )  # fmt: skip
        made = self.inner.bias(first)
        return add_bias(call, torch.cat([made, made.new_zeros(len(call.q) - 1, *made.shape[1:])]))


def _first(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:1]
