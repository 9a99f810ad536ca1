# SPDX-License-Identifier: Apache-2.0
"""Caches beside which hcattention is measured, of synthetic keys and values, and what measures its logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from manyheads.attention.reference import repeat_kv
from manyheads.call import AttentionCall, Site, Store
from manyheads.strategy import AttentionWatch, Cache

__all__ = ["Offload", "Peer", "Spread", "attend"]

Answer = Callable[[int, AttentionCall], Tensor]


@dataclass
class Held(Store):
    """Synthetic keys and values of a context; ``answer`` attends over them and the new token."""

    answer: Answer
    tokens: int
    site: Any
    layer: int

    def __post_init__(self) -> None:
        super().__init__(self.site)
        self.rows_held = 1

    computes = True
    seen = property(lambda self: self.tokens)  # type: ignore[assignment]
    rows = property(lambda self: 1)  # type: ignore[assignment]
    keys = values = property(lambda self: None)  # type: ignore[assignment]
    held = property(lambda self: [])  # type: ignore[assignment]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens += k.shape[2]
        return k, v

    def attend(self, call: AttentionCall) -> Tensor:
        return self.answer(self.layer, call)[:, None]

    def mask(self, call: AttentionCall) -> AttentionCall:
        return call

    def _nothing(self, *_: Any) -> Any:
        """Nothing is dropped, saved or rearranged here."""

    evict = reorder = crop = reset = state_dict = load_state_dict = _nothing


@dataclass(frozen=True, kw_only=True)
class Peer(Cache):
    """A cache whose layers answer as they are told to."""

    answer: Answer = field(compare=False)
    context: int = field(compare=False)

    def store(self, site: Site) -> Store:
        return Held(self.answer, self.context - 1, site, site.layer or 0)


def attend(call: AttentionCall, k: Tensor, v: Tensor) -> Tensor:
    """``[1, H, d]`` of one query over ``[1, Hkv, S, d]``, of which the last is the new token: our kernel on a GPU."""
    k[:, :, -1], v[:, :, -1] = call.k[:, :, -1], call.v[:, :, -1]
    q, (_, heads, size, dim) = call.q[:, :, 0], k.shape
    if not q.is_cuda:
        return scaled_dot_product_attention(call.q, k, v, scale=call.scale, enable_gqa=True)[:, :, 0]
    from manyheads.kernels.decode import decode_attention

    offsets = torch.arange(heads, device=q.device)[None] * size
    lengths = torch.full((1, heads), size, dtype=torch.int32, device=q.device)
    return decode_attention(
        q, k.view(-1, dim), v.view(-1, dim), offsets, lengths, scale=call.scale, capacity=size
    )[0]  # fmt: skip


class Offload:
    """Keys and values on the host; two buffers on the device, one of which is filled while the other is used."""

    def __init__(self, pool: Tensor, layers: int, shape: tuple[int, ...], device: torch.device) -> None:
        """``pool``: numbers in the host's memory; ``shape [2, 1, Hkv, S, d]`` of a layer."""
        size = math.prod(shape)
        starts = range(0, len(pool) - size + 1, size)
        self.host = [pool[at : at + size].view(shape) for at in starts][:layers]
        if not self.host:
            raise RuntimeError(f"no layer of {size} numbers fits in {len(pool)} of the host's memory")
        self.layers, self.cuda, self.copied = layers, device.type == "cuda", -1
        self.buffers = [torch.empty(shape, dtype=pool.dtype, device=device) for _ in range(2)]
        if self.cuda:
            self.stream = torch.cuda.Stream()
            self.ready, self.free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def copy(self, turn: int) -> None:
        """Begin to bring a layer, once its buffer is free."""
        source, target = self.host[turn % self.layers % len(self.host)], self.buffers[turn % 2]
        if self.cuda:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.free[turn % 2])
                target.copy_(source, non_blocking=True)
                self.ready[turn % 2].record()
        else:
            target.copy_(source)
        self.copied = turn

    def answer(self, layer: int, call: AttentionCall) -> Tensor:
        """Attention of a layer, while the next one is brought."""
        turn = self.copied if self.copied >= 0 else 0
        if self.copied < 0:
            self.copy(0)
        if self.cuda:
            torch.cuda.current_stream().wait_event(self.ready[turn % 2])
        self.copy(turn + 1)
        out = attend(call, *self.buffers[turn % 2])
        if self.cuda:
            self.free[turn % 2].record()
        return out


class Spread(AttentionWatch):
    """Notes the standard deviation of a head's logits over keys, mean over heads and last queries, by layer."""

    found: ClassVar[dict[int, float]] = {}

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        q, k = call.q[:, :, -64:], repeat_kv(call.k[:, :, :-64], call.q.shape[1])
        x = (q.float() @ k.float().transpose(2, 3)) * call.scale
        self.found[call.site.layer or 0] = float(x.std(3).mean())
