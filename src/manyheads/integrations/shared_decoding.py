# SPDX-License-Identifier: Apache-2.0
"""Decoding from a cache whose prompt several processes share: each has keys of its own tokens of the prompt.

All processes decode the same tokens, and each keeps their keys. Attention of a new token is, in each, attention to the
keys of its part of the prompt; outputs and log-sum-exps of all processes are gathered and put together, and with them
attention to the tokens decoded so far. That is exact, moves ``H (dv + 1)`` numbers a token, layer and process, and
gives every process the same bits, so that all choose the same token; who samples seeds all processes alike.
"""

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..call import AttentionCall
from ..errors import UserError
from ..parallel._context import World
from ..parallel._partial import Seen, attend, merge

__all__ = ["Decoded", "SharedCache"]


class SharedCache(Cache):
    """What the class of a cache becomes when it has read a part of a prompt: it counts tokens of all processes."""

    rows: Tensor  # of the prompt, of this process
    prompt: int  # tokens of it in all

    @staticmethod
    def of(cache: Cache, rows: Tensor, prompt: int) -> None:
        """Make ``cache``, which has read ``rows`` of a prompt of so many tokens, one that knows it."""
        made, kind = cast("Any", cache), cast("Any", type(cache))
        made.__class__ = _shared(kind)
        made.rows, made.prompt = rows, prompt


@functools.cache
def _shared(kind: Any) -> type[Cache]:
    def get_seq_length(self: Any, layer_idx: int = 0) -> int:
        mine = int(kind.get_seq_length(self, layer_idx))
        return mine + self.prompt - len(self.rows) if mine else 0

    def crop(self: Any, *_: Any) -> None:
        raise UserError("a cache whose prompt processes share forgets nothing: decode without an assistant")

    return type(kind.__name__, (kind, SharedCache), {"get_seq_length": get_seq_length, "crop": crop})


@dataclass(eq=False)
class Decoded:
    """One forward of tokens that follow a shared prompt, the same in every process.

    Attributes:
        world: the processes.
        cache: that has read before.
        new: tokens of this forward.
        told: which tokens so far are real, ``[B, S]``; None for all.
    """

    world: World
    cache: SharedCache
    new: int
    told: Tensor | None

    def __post_init__(self) -> None:
        self.total = int(self.cache.get_seq_length()) + self.new
        if self.told is not None and bool(self.told.bool().all()):
            self.told = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, T, dv]`` and log-sum-exp ``[B, H, T]``."""
        rows = self.cache.rows
        every = torch.cat([rows, torch.arange(self.cache.prompt, self.total)])
        tokens = every[len(every) - call.k.shape[2] :].to(
            call.q.device
        )  # layers with a window have let go of the first
        read = int((tokens < self.cache.prompt).sum())
        parts = [
            self._part(call, tokens[at], at) for at in (slice(read), slice(read, None))
        ]  # fmt: skip
        (out, lse), decoded = parts
        both = torch.cat([out, lse[..., None]], -1)
        peers = self.world.peers()
        for other in peers.all_gather(both, [len(both)] * len(peers), "decoding").split(len(both)):
            part = other[..., :-1], other[..., -1]
            decoded = merge(decoded, part)
        return decoded[0].to(call.q.dtype), decoded[1]

    def _part(self, call: AttentionCall, tokens: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """Attention to the cached keys ``at``, which are those of ``tokens``."""
        queries = torch.arange(self.total - self.new, self.total, device=tokens.device)[:, None]
        seen = tokens <= queries
        if call.site.window is not None:
            seen = seen & (tokens > queries - call.site.window)
        k, v = call.k[:, :, at], call.v[:, :, at]
        if self.told is None:
            return attend(call.q, k, v, _rows(seen), call.scale)
        real = self.told.bool()[:, tokens]
        found = [
            attend(call.q[i : i + 1], k[i : i + 1], v[i : i + 1], _rows(seen & row), call.scale)
            for i, row in enumerate(real)
        ]
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(lses)


def _rows(seen: Tensor) -> Seen:
    return lambda rows: seen[rows]
