# SPDX-License-Identifier: Apache-2.0
"""A dense float64 cache in loops over single numbers: what a policy keeps, and what attention over it gives."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.attention import reference
from manyheads.caches._strategy import EvictionStrategy
from manyheads.call import AttentionCall, Site
from tolerance import FORMULA, assert_close

DIM = 6
Score = Callable[[list[int], Tensor, Tensor, int], list[float]]  # held, keys [S, d], queries [G, S, d], seen -> scores


def site(window: int | None = None, layer: int = 0) -> Site:
    return Site(name="here", index=0, layer=layer, kind="self", causal=True, num_heads=4, num_kv_heads=2, window=window)


def sequences(
    batch: int, heads: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q ``[B, H, T, d]``, k and v ``[B, 2, T, d]``."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, n, length, DIM, generator=generator).to(dtype) for n in (heads, 2, 2))


def drive(
    policy: EvictionStrategy, q: Tensor, k: Tensor, v: Tensor, sizes: list[int], padding: list[int] | None = None
) -> tuple[Tensor, list[Tensor], object]:
    """Run a store as a model would: outputs ``[B, T, H, d]``, positions held after each forward, and the store."""
    store, outputs, kept, start = policy.store(site()), [], [], 0
    for n in sizes:
        cut = slice(start, start + n)
        keys, values = store.update(k[:, :, cut], v[:, :, cut])
        start += n
        mask = None
        if padding is not None:
            real = torch.arange(start)[None] >= torch.tensor(padding)[:, None]
            mask = (reference.causal_mask(n, start)[None] & real[:, None])[:, None]
        call = AttentionCall(site(), q[:, :, cut], keys, values, DIM**-0.5, mask=mask, is_causal=mask is None)
        call = store.mask(call)
        if call.mask is not None:
            call = call.replace(
                mask=reference.repeat_kv(call.mask, q.shape[1]) if call.mask.shape[1] > 1 else call.mask
            )
        outputs.append(call.attend())
        store.evict(call)
        kept.append(store.padded.positions().clone())
    return torch.cat(outputs, 1), kept, store


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: list[int],
    score: Score,
    budget: int | float,
    *,
    due: Callable[[int, int, int], bool],
    sinks: int = 0,
    recent: int = 0,
) -> tuple[Tensor, list[list[list[int]]]]:
    """One row without padding, ``q [H, T, d]``, ``k, v [Hkv, T, d]``, in float64: outputs and held positions."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[0] // k.shape[0]
    outputs, held, history, start, since = [], [[] for _ in k], [], 0, 0
    for forward, n in enumerate(sizes):
        out = torch.zeros(n, q.shape[0], v.shape[-1], dtype=torch.float64)
        for h, mine in enumerate(held):
            mine += range(start, start + n)
            for t in range(n):
                sees = [s for s in mine if s <= start + t]
                for g in range(h * groups, (h + 1) * groups):
                    weights = torch.tensor(
                        [float(q[g, start + t] @ k[h, s]) / math.sqrt(DIM) for s in sees], dtype=torch.float64
                    )
                    out[t, g] = weights.softmax(0) @ v[h, sees]
        start, since = start + n, since + n
        outputs.append(out)
        if due(forward, n, since):
            since = 0
            room = min(budget, start) if isinstance(budget, int) else math.ceil(round(budget * start, 9))
            for h, mine in enumerate(held):
                scores = score(mine, k[h], q[h * groups : (h + 1) * groups], start)
                fixed = [s < sinks or s >= start - recent for s in mine]
                ranked = sorted(range(len(mine)), key=lambda i: (fixed[i], scores[i], mine[i]), reverse=True)
                held[h] = sorted(mine[i] for i in ranked[:room])
        history.append([list(mine) for mine in held])
    return torch.cat(outputs), history


DUE = {
    "prefill": lambda forward, n, since: forward == 0,
    "chunk": lambda forward, n, since: forward == 0 or n > 1,
    "step": lambda forward, n, since: True,
    3: lambda forward, n, since: forward == 0 or since >= 3,
}
SIZES = [11, 1, 1, 4, 1, 1, 1]


def agrees(
    policy: EvictionStrategy,
    score: Score,
    heads: int = 4,
    padding: tuple[int, ...] = (0, 0),
    protects: tuple[int, int] | None = None,
) -> None:
    """The store and the loops hold the same tokens after every forward, and their outputs are the same numbers.

    Rows with left padding are compared with the loops over what is not padding.
    """
    total = sum(SIZES)
    q, k, v = (x.double() for x in sequences(len(padding), heads, total, seed=3))  # no score ties by rounding
    sinks, recent = (policy.sinks, policy.recent) if protects is None else protects
    outputs, kept, _ = drive(policy, q, k, v, SIZES, list(padding) if any(padding) else None)
    for b, skip in enumerate(padding):
        own = [SIZES[0] - skip, *SIZES[1:]]
        want, history = by_hand(q[b, :, skip:], k[b, :, skip:], v[b, :, skip:], own, score, policy.budget,
                                due=DUE[policy.schedule], sinks=sinks, recent=recent)  # fmt: skip
        for got, held in zip(kept, history, strict=True):
            assert [sorted(p for p in head if p >= 0) for head in got[b].tolist()] == held
        assert_close(outputs[b, skip:].double(), want, FORMULA)
