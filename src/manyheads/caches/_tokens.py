# SPDX-License-Identifier: Apache-2.0
"""The tokens of one cache layer: slots while many come at a time, flat storage while one comes after the other."""

from torch import Tensor

from ..attention.codec import Codec
from ..attention.flat import Flat, freeze
from ..attention.slots import Slots, nbytes
from ..call import AttentionCall
from ..errors import UserError

__all__ = ["Tokens"]

_ROOM = 16  # tokens that flat storage has room for before it grows


class Tokens:
    """Slots or flat storage, whichever holds the tokens now.

    Attributes:
        slots, flat: one of them is None, or both before the first token.
        codec, window: how flat storage keeps tokens, and how many of the last it leaves as they are.
        key_scale: factors ``[B, Hs, d]`` on the keys before they are encoded.
        room: tokens that can be decoded without the host, 0 for storage that grows by itself.
    """

    def __init__(self, codec: Codec | None, window: int, room: int) -> None:
        self.codec, self.window, self.room = codec, window, room
        self.slots: Slots | None = None
        self.flat: Flat | None = None
        self.key_scale: Tensor | None = None
        self._incoming: tuple[Tensor, Tensor] | None = None  # for flat storage, until the mask is known

    @property
    def live(self) -> Slots:
        """The slots of a layer that is being read."""
        if self.slots is None:
            raise RuntimeError("attention ran before its cache was written")
        return self.slots

    @property
    def seen(self) -> int | Tensor:
        """Columns so far; a tensor of no dimension where only the device counts."""
        if self.flat is None:
            return 0 if self.slots is None else self.slots.seen
        return self.flat.clock if self.flat.fixed else self.flat.seen + self.flat.made + (self._incoming is not None)

    @property
    def held(self) -> list[Tensor | None]:
        """Every tensor kept."""
        store = self.slots if self.flat is None else self.flat
        return [self.key_scale] if store is None else [*store.tensors, self.key_scale]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``k, v [B, Hs, T, d]``; return all slots, the new ones last, or a single new token alone."""
        if self.flat is not None:
            if k.shape[2] == 1 and not k.requires_grad:
                self._incoming = (k, v)
                return k, v
            self.thaw()
        if self.slots is None:
            self.slots = Slots.empty(k, v)
        self.slots.append(k, v)
        return self.slots.keys, self.slots.values

    def takes(self, call: AttentionCall) -> bool:
        """Whether the token that came can be decoded over flat storage."""
        plain = call.bias is None and call.sinks is None and call.softcap is None and not call.dropout
        return self._incoming is not None and plain and (call.mask is None or call.mask.shape[-1] == 1)

    def decode(self, call: AttentionCall) -> Tensor:
        """Store the token that came and attend to everything: ``[B, 1, H, d]``."""
        assert self.flat is not None and self._incoming is not None
        if not self.flat.fixed and self.flat.room == 0:
            more = max(_ROOM, self.flat.made, self.flat.capacity // 8)
            self.flat = freeze(
                self.flat.thaw(), codec=self.codec, window=self.window, key_scale=self.key_scale, room=more
            )
        (k, v), self._incoming = self._incoming, None
        real = None if call.mask is None else call.mask[:, :, 0, 0].any(1).expand(k.shape[0])
        return self.flat.decode(call.q, k, v, call.scale, real)

    def thaw(self) -> None:
        """Bring the tokens back into slots, with the one that came last."""
        if self.flat is not None:
            self.slots, self.flat = self.flat.thaw(), None
        if self._incoming is not None:
            self.live.append(*self._incoming)
            self._incoming = None

    def freeze(self) -> None:
        """Move the tokens into flat storage."""
        self.flat = freeze(
            self.live, codec=self.codec, window=self.window, key_scale=self.key_scale, room=self.room or _ROOM
        )
        self.slots = None
        if self.room:
            self.flat.fix()

    def select(self, rows: Tensor) -> None:
        """Take batch rows ``[B']``."""
        self.thaw()
        if self.slots is not None:
            self.slots.select(rows)
        if self.key_scale is not None:
            self.key_scale = self.key_scale[rows.to(self.key_scale.device)]

    def crop(self, count: int) -> None:
        """Forget the last ``count`` columns; refused where that cannot restore what was."""
        if self.flat is not None and self.codec is not None:
            raise UserError(
                "a packed cache cannot be cropped, the tokens before its window are encoded: generate without an "
                "assistant or prompt lookup"
            )
        self.thaw()
        self.live.crop(count)

    def nbytes(self, *others: Tensor | None) -> int:
        """Bytes of all storages held, those of ``others`` too."""
        return nbytes(*self.held, *others)
