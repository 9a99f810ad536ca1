# SPDX-License-Identifier: Apache-2.0
"""The tokens of one cache layer: slots while many come at a time, ragged storage while one comes after the other."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..attention.codec import KVCodec
from ..attention.padded import PaddedCache
from ..attention.protect import Protected
from ..attention.ragged import RaggedCache, pack
from ..call import AttentionCall
from ..errors import UserError

__all__ = ["Tokens"]

_NOTHING = Protected()
_ROOM = 16  # tokens that ragged storage has room for before it grows


class Tokens:
    """Slots or ragged storage, whichever holds the tokens now.

    Attributes:
        slots, flat: one of them is None, or both before the first token.
        codec, window: how ragged storage keeps tokens, and how many of the last it leaves as they are.
        key_scale: factors ``[B, Hs, d]`` on the keys before they are encoded.
        room: tokens that can be decoded without the host, 0 for storage that grows by itself.
        protect: what may not be dropped.
    """

    def __init__(self, codec: KVCodec | None, window: int, room: int, protect: Protected = _NOTHING) -> None:
        self.codec, self.window, self.room, self.protect = codec, window, room, protect
        self._spans: Tensor | None = None
        protect.check()
        self.padded: PaddedCache | None = None
        self.ragged: RaggedCache | None = None
        self.key_scale: Tensor | None = None
        self._incoming: tuple[Tensor, Tensor] | None = None  # for ragged storage, until the mask is known

    @property
    def live(self) -> PaddedCache:
        """The slots of a layer that is being read."""
        if self.padded is None:
            raise RuntimeError("attention ran before its cache was written")
        return self.padded

    @property
    def seen(self) -> int | Tensor:
        """Columns so far; a tensor of no dimension where only the device counts."""
        if self.ragged is None:
            return 0 if self.padded is None else self.padded.seen
        if self.ragged.fixed:
            return self.ragged.clock
        return self.ragged.seen + self.ragged.made + (self._incoming is not None)

    @property
    def rows(self) -> int | None:
        """Batch rows, None before the first token."""
        if self.ragged is not None:
            return self.ragged.counts.shape[0]
        return None if self.padded is None else self.padded.keys.shape[0]

    @property
    def real(self) -> Tensor | None:
        """Columns that hold tokens ``[B, seen]``, None for all."""
        if self.ragged is not None:
            return self.ragged.real
        return None if self.padded is None else self.padded.valid

    @property
    def held(self) -> list[Tensor | None]:
        """Every tensor kept."""
        store = self.padded if self.ragged is None else self.ragged
        return [*([] if store is None else store.tensors), self.key_scale, self._spans]

    def spans(self, batch: int, device: torch.device) -> Tensor | None:
        """Starts and stops of what each of ``batch`` rows may not drop, ``[batch, n, 2]``; None for nothing."""
        if self._spans is None:
            self._spans = self.protect.tensor(batch, device)
        return self._spans

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``k, v [B, Hs, T, d]``; return all slots, the new ones last, or a single new token alone."""
        if self.ragged is not None:
            if k.shape[2] == 1 and not k.requires_grad:
                self._incoming = (k, v)
                return k, v
            self.unpack()
        if self.padded is None:
            self.padded = PaddedCache.empty(k, v)
        self.padded.update(k, v)
        return self.padded.keys, self.padded.values

    def takes(self, call: AttentionCall) -> bool:
        """Whether the token that came can be decoded over ragged storage."""
        plain = call.bias is None and call.sinks is None and call.softcap is None and not call.dropout
        return self._incoming is not None and plain and (call.mask is None or call.mask.shape[-1] == 1)

    def decode(self, call: AttentionCall) -> Tensor:
        """Store the token that came and attend to everything: ``[B, 1, H, d]``."""
        assert self.ragged is not None and self._incoming is not None
        if not self.ragged.fixed and self.ragged.room == 0:
            more = max(_ROOM, self.ragged.made, self.ragged.capacity // 8)
            self.ragged = pack(
                self.ragged.unpack(), codec=self.codec, window=self.window, key_scale=self.key_scale, room=more
            )
        (k, v), self._incoming = self._incoming, None
        real = None if call.mask is None else call.mask[:, :, 0, 0].any(1).expand(k.shape[0])
        return self.ragged.decode(call.q, k, v, call.scale, real)

    def unpack(self) -> None:
        """Bring the tokens back into slots, with the one that came last."""
        if self.ragged is not None:
            self.padded, self.ragged = self.ragged.unpack(), None
        if self._incoming is not None:
            self.live.update(*self._incoming)
            self._incoming = None

    def pack(self) -> None:
        """Move the tokens into ragged storage."""
        self.ragged = pack(
            self.live, codec=self.codec, window=self.window, key_scale=self.key_scale, room=self.room or _ROOM
        )
        self.padded = None
        if self.room:
            self.ragged.fix()

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows ``[B']``."""
        self.unpack()
        if self.padded is not None:
            self.padded.reorder(rows)
        if self.key_scale is not None:
            self.key_scale = self.key_scale[rows.to(self.key_scale.device)]
        if self._spans is not None:
            self._spans = self._spans[rows.to(self._spans.device)]

    def crop(self, count: int) -> None:
        """Forget the last ``count`` columns; refused where that cannot restore what was."""
        if self.ragged is not None and self.codec is not None:
            raise UserError(
                "a packed cache cannot be cropped, the tokens before its window are encoded: generate without an "
                "assistant or prompt lookup"
            )
        self.unpack()
        self.live.crop(count)

    def state_dict(self) -> dict[str, Any]:
        """All tokens, as tensors and plain values by name."""
        return {
            "padded": None if self.padded is None else _fields(self.padded, "_room"),
            "ragged": None if self.ragged is None else _fields(self.ragged, "codec", "kernel", "dtype", "key_scale"),
            "dtype": None if self.ragged is None else str(self.ragged.dtype).removeprefix("torch."),
            "key_scale": self.key_scale, "spans": self._spans,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold what :meth:`state_dict` gave."""
        padded, ragged = state["padded"], state["ragged"]
        self.padded = None if padded is None else PaddedCache(**padded)
        self.ragged, self.key_scale, self._spans = None, state["key_scale"], state["spans"]
        if ragged is not None:
            plane = ragged["k"] if ragged["ring_k"] is None else ragged["ring_k"]
            dtype = getattr(torch, state["dtype"])
            self.ragged = RaggedCache(
                **ragged, key_scale=self.key_scale, codec=self.codec, dtype=dtype, kernel=kernels.decode_takes(plane)
            )  # fmt: skip
            if self.ragged.fixed:
                self.ragged.fix()


def _fields(x: PaddedCache | RaggedCache, *left_out: str) -> dict[str, Any]:
    """What a storage holds, by name."""
    return {f.name: getattr(x, f.name) for f in fields(x) if f.name not in left_out}
