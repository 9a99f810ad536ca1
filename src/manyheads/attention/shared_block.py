# SPDX-License-Identifier: Apache-2.0
"""Keys and values of tokens that follow each other, as what several rows of a batch read, each in an order of its own.

Keys are turned to positions that count from the block's own first token, so that it may stand anywhere.
"""

from torch import Tensor

__all__ = ["Block"]

_ROOM = 16  # a block grows to twice its tokens, in whole pieces of so many


class Block:
    """Keys and values of tokens that follow each other, in every layer.

    Attributes:
        length: tokens, those that the forward at hand writes included.
        first: by layer, the place of the first key that is held; 0 where none was dropped.
    """

    def __init__(self) -> None:
        self.length = 0
        self.first: dict[int, int] = {}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def held(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values ``[1, Hkv, n, d]`` up to ``length``, and the place of the first."""
        first = self.first.get(layer, 0)
        keys, values = (x[:, :, : self.length - first] for x in self._held[layer])
        return keys, values, first

    def write(self, layer: int, k: Tensor, v: Tensor, place: int) -> None:
        """Put ``k, v [1, Hkv, n, d]`` at ``place`` and what follows; the storage doubles when it is full."""
        at = place - self.first.get(layer, 0)
        stop = at + k.shape[2]
        held = self._held.get(layer)
        if held is None or held[0].shape[2] < stop:
            room = -(-max(stop, 2 * at) // _ROOM) * _ROOM
            new = tuple(x.new_empty(1, x.shape[1], room, x.shape[3]) for x in (k, v))
            if held is not None:
                for x, old in zip(new, held, strict=True):
                    x[:, :, :at] = old[:, :, :at]
            held = self._held[layer] = (new[0], new[1])
        for x, given in zip(held, (k, v), strict=True):
            x[:, :, at:stop] = given

    def hold(self, layer: int, k: Tensor, v: Tensor, first: int) -> None:
        """Hold tensors of another cache as they are, without a copy."""
        self._held[layer], self.first[layer] = (k, v), first

    def clear(self) -> None:
        """Forget the tokens and keep the room."""
        self.length = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [x for pair in self._held.values() for x in pair]
