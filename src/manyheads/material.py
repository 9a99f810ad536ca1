# SPDX-License-Identifier: Apache-2.0
"""What a conversion reads: windows of a text, or images.

The last tenth is held out: losses are of it, and neither calibration nor recovery reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from .data.texts import Text

__all__ = ["Material", "Pictures"]

_HELD_OUT = 0.1


@dataclass(frozen=True)
class Material:
    """Token ids that a conversion reads.

    Attributes:
        train: ``[N]``, for calibration and recovery.
        held_out: windows ``[n, T + 1]`` that losses are measured on.
        length: T.
        first: what the tokenizer puts before a text (Gemma's ``<bos>``): every window begins with it, in the place of
            as many of its own tokens. Without, such a model is out of its depth: of text that it has no start of, the
            loss of Gemma 3 270M is two nats higher.
    """

    train: Tensor
    held_out: Tensor
    length: int
    first: tuple[int, ...] = ()

    @classmethod
    def of(cls, texts: Sequence[Text], tokenizer: Any, length: int = 512, windows: int = 16) -> Material:
        """Texts in their order, of which the last tenth of the tokens is held out.

        Raises:
            UserError: there is not enough text for a window of each.
        """
        from .recipes._adapters import encoded

        ids = encoded(texts, tokenizer)
        split = len(ids) - max(int(_HELD_OUT * len(ids)), length + 1)
        if split <= length:
            raise UserError(
                f"the text has {len(ids)} tokens, and windows of {length + 1} of it are calibrated on and held out: "
                "give more --text or a shorter --length"
            )
        rest = ids[split:]
        count = min(windows, len(rest) // (length + 1))
        starts = torch.linspace(0, len(rest) - length - 1, count).long()
        first = _first(tokenizer)
        return cls(ids[:split], _begun(rest[starts[:, None] + torch.arange(length + 1)], first), length, first)

    def batches(self, batch: int, seed: int, device: str | torch.device) -> Callable[[int], Tensor]:
        """Windows ``[batch, T + 1]`` by number, at random places of the training part."""
        from .recipes._adapters import id_batches

        get_batch = id_batches(self.train, self.length, batch, seed, device)
        return lambda number: _begun(get_batch(number), self.first)

    def calibration(self, sequences: int, batch: int, device: str | torch.device) -> list[Tensor]:
        """Windows ``[batch, T]`` from all over the training part, the same every time."""
        starts = torch.linspace(0, len(self.train) - self.length, sequences).long()
        rows = _begun(self.train[starts[:, None] + torch.arange(self.length)], self.first)
        return [part.to(device) for part in rows.split(batch)]


@dataclass(frozen=True)
class Pictures:
    """Images that a conversion of a vision transformer reads, as the model is given them.

    Attributes:
        train: ``[N, C, h, w]``, for calibration and recovery.
        held_out: ``[n, C, h, w]``, on which states are compared.
    """

    train: Tensor
    held_out: Tensor
    length: int = 0  # of no text

    @classmethod
    def of(cls, images: Sequence[Tensor], most: int = 16) -> Pictures:
        """Images ``[C, h, w]`` in their order, of which the last tenth is held out, ``most`` at most.

        Raises:
            UserError: there are not two, or they are of several sizes.
        """
        if len(images) < 2:
            raise UserError("images are calibrated on, and others held out: give --image twice at least")
        if len({x.shape for x in images}) > 1:
            raise UserError("images come out of the image processor in several sizes: give some of one size")
        split = len(images) - min(most, max(1, int(_HELD_OUT * len(images))))
        return cls(torch.stack(list(images[:split])), torch.stack(list(images[split:])))

    def batches(self, batch: int, seed: int, device: str | torch.device) -> Callable[[int], Tensor]:
        """Images ``[batch, C, h, w]`` by number, drawn at random from the training part."""

        def get_batch(number: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            return self.train[torch.randint(len(self.train), (batch,), generator=generator)].to(device)

        return get_batch

    def calibration(self, sequences: int, batch: int, device: str | torch.device) -> list[Tensor]:
        """Batches of images from all over the training part, ``sequences`` of them or all."""
        at = torch.linspace(0, len(self.train) - 1, min(sequences, len(self.train))).long()
        return [part.to(device) for part in self.train[at].split(batch)]


def _first(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that a tokenizer puts before whatever it is given."""
    alone = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    return tuple(whole[: next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)])


def _begun(rows: Tensor, first: tuple[int, ...]) -> Tensor:
    """Windows ``[n, T]`` that begin with ``first``."""
    rows[:, : len(first)] = torch.tensor(first, dtype=rows.dtype, device=rows.device)
    return rows
