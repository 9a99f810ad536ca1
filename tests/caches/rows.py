# SPDX-License-Identifier: Apache-2.0
"""One row of a cache in float64 and loops, for scores that need more than `formula` gives and heads of unequal size."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from caches.formula import DIM, DUE, SIZES, sequences, site
from manyheads.attention import reference
from manyheads.caches._strategy import EvictionStrategy
from manyheads.call import AttentionCall, Site
from tolerance import FORMULA, assert_close


@dataclass
class Row:
    """A row when tokens are dropped: q ``[H, T, d]``, k and v ``[Hkv, T, d]``, all tokens ever seen.

    Beside them what each key/value head holds, and the attention that each position received there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: int = 0
    held: list[list[int]] = field(default_factory=list)
    mass: list[dict[int, float]] = field(default_factory=list)

    @property
    def groups(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    def weights(self, head: int, t: int, sees: list[int]) -> Tensor:
        """Attention of query ``t`` of query head ``head`` over positions ``sees``."""
        k = self.k[head // self.groups, sees]
        return torch.tensor([float(self.q[head, t] @ x) / math.sqrt(DIM) for x in k], dtype=torch.float64).softmax(0)


Score = Callable[[Row, int], list[float]]  # of the tokens that a key/value head holds
Rooms = Callable[[Row, list[list[float]], int], list[int]]  # scores by head, the equal budget -> budgets by head
Fixed = Callable[[int, int, int], bool]  # position, tokens seen, the equal budget


def by_hand(
    policy: EvictionStrategy,
    row: Row,
    sizes: list[int],
    score: Score,
    rooms: Rooms | None = None,
    fixed: Fixed | None = None,
) -> tuple[Tensor, list[list[list[int]]]]:
    """Outputs ``[T, H, d]`` and the positions held after each forward, by head."""
    outputs, history, since = [], [], 0
    row.held, row.mass = [[] for _ in row.k], [{} for _ in row.k]
    spared = fixed or (lambda s, seen, room: s < policy.sinks or s >= seen - policy.recent)
    for forward, n in enumerate(sizes):
        out = torch.zeros(n, row.q.shape[0], row.v.shape[-1], dtype=torch.float64)
        for head in range(row.q.shape[0]):
            h = head // row.groups
            if head % row.groups == 0:
                row.held[h] += range(row.seen, row.seen + n)
            for t in range(n):
                sees = [s for s in row.held[h] if s <= row.seen + t]
                weights = row.weights(head, row.seen + t, sees)
                out[t, head] = weights @ row.v[h, sees]
                for s, w in zip(sees, weights.tolist(), strict=True):
                    row.mass[h][s] = row.mass[h].get(s, 0.0) + w
        row.seen, since = row.seen + n, since + n
        outputs.append(out)
        if DUE[policy.schedule](forward, n, since):
            since = 0
            slots = isinstance(policy.budget, int)
            room = min(policy.budget, row.seen) if slots else math.ceil(round(policy.budget * row.seen, 9))
            if room < row.seen:
                scores = [score(row, h) for h in range(len(row.held))]
                shares = [room] * len(row.held) if rooms is None else rooms(row, scores, room)
                for h, mine in enumerate(row.held):
                    keys = [(spared(s, row.seen, room), x, s) for s, x in zip(mine, scores[h], strict=True)]
                    row.held[h] = sorted(s for _, _, s in sorted(keys, reverse=True)[: shares[h]])
        history.append([list(mine) for mine in row.held])
    return torch.cat(outputs), history


def drive(
    policy: EvictionStrategy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: list[int],
    padding: list[int] | None = None,
    at: Site | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], object]:
    """Run a store as the port does: outputs ``[B, T, H, d]``, positions held after each forward, and the store."""
    at = at or site()
    store, outputs, kept, start = policy.store(at), [], [], 0
    for n in sizes:
        cut = slice(start, start + n)
        packed = store.tokens.ragged is not None
        keys, values = store.update(k[:, :, cut], v[:, :, cut])
        start += n
        mask = None
        if padding is not None:
            real = torch.arange(start)[None] >= torch.tensor(padding)[:, None]
            mask = (reference.causal_mask(n, start)[None] & real[:, None])[:, None]
            mask = mask[..., -n:] if packed else mask
        turned = rotary and (rotary[0][:, cut], rotary[1][:, cut])
        call = AttentionCall(
            at, q[:, :, cut], keys, values, DIM**-0.5, mask=mask, is_causal=mask is None and n > 1, rotary=turned
        )
        out = store.attend(call)
        if out is None:
            call = store.mask(call)
            if call.mask is not None and call.mask.shape[1] > 1:
                call = call.replace(mask=reference.repeat_kv(call.mask, q.shape[1]))
            out = call.attend()
            store.evict(call)
        outputs.append(out)
        kept.append(copy.deepcopy(store).live.positions())
    return torch.cat(outputs, 1), kept, store


def agrees(
    policy: EvictionStrategy,
    score: Score,
    heads: int = 4,
    padding: tuple[int, ...] = (0, 0),
    *,
    rooms: Rooms | None = None,
    fixed: Fixed | None = None,
    at: Site | None = None,
    sizes: list[int] = SIZES,
    turned: Callable[[Tensor, tuple[int, ...]], tuple[Tensor, tuple[Tensor, Tensor]]] | None = None,
) -> None:
    """The store and the loops hold the same tokens after every forward, and their outputs are the same numbers.

    Rows with left padding are compared with the loops over what is not padding. ``turned`` gives queries rotary
    positions, and the cosines and sines that the model would pass on.
    """
    q, k, v = (x.double() for x in sequences(len(padding), heads, sum(sizes), seed=3))  # no score ties by rounding
    rotary = None
    if turned is not None:
        q, rotary = turned(q, padding)
    outputs, kept, _ = drive(policy, q, k, v, sizes, list(padding) if any(padding) else None, at, rotary)
    for b, skip in enumerate(padding):
        row = Row(q[b, :, skip:].double(), k[b, :, skip:].double(), v[b, :, skip:].double())
        want, history = by_hand(policy, row, [sizes[0] - skip, *sizes[1:]], score, rooms, fixed)
        for got, held in zip(kept, history, strict=True):
            assert [sorted(p for p in head if p >= 0) for head in got[b].tolist()] == held
        assert_close(outputs[b, skip:].double(), want, FORMULA)
