# SPDX-License-Identifier: Apache-2.0
"""What each process runs where experts are shared, and counts or times of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...parallel import CompressedReduceScatter, MoeBlock, MoeConfig, World
from ...parallel._compressed import Format
from ...parallel._experts import Dispatch, ExpertParallel, Sorted
from ...parallel._moe_block import Held
from ...parallel._remat import saved_bytes
from ...parallel._travel import gather, reduce_scatter

__all__ = ["attention_sent", "block_held", "block_times", "dispatch_sent", "dispatch_times", "sum_sent", "sum_times"]


def _weighted(rows: Sorted) -> Tensor:
    """In the place of experts: nothing but what travels."""
    return rows.x * rows.weight[:, None]


def _sent(world: World, act: Callable[[], Any]) -> dict[tuple[str, int], int]:
    world.ledger.clear()
    act()
    return dict(world.ledger.sent)


def dispatch_sent(
    world: World, dispatch: Dispatch, experts: int, draws: Tensor, dim: int
) -> list[dict[tuple[str, int], int]]:
    """Bytes by name and receiver, both ways of a layer, of each draw; ``draws [N, n, T, k]``: experts of all tokens."""
    shared = ExpertParallel(world, experts, draws.shape[3], dispatch)
    x, weight = torch.ones(draws.shape[2], dim), torch.ones(draws.shape[2:])
    return [_sent(world, partial(shared, x, chosen[world.rank], weight, _weighted)) for chosen in draws]


def attention_sent(world: World, way: str, config: MoeConfig, tokens: int) -> int:
    """Bytes that attention sends forward, by ``heads`` or with ``split`` weights."""
    block, lengths = MoeBlock(config, world, "all_to_all", "all"), [tokens] * world.size
    x = torch.zeros(1, tokens, config.dim)
    if way == "heads":
        sent = _sent(world, lambda: block(x, lengths))
        return sum(size for (name, _), size in sent.items() if name == "heads")
    act = lambda: reduce_scatter(gather(x[0], block.peers, lengths, "in"), block.peers, lengths, "out")  # noqa: E731
    return sum(_sent(world, act).values())


def block_held(world: World, held: Held, config: MoeConfig, tokens: int, seed: int) -> int:
    """Bytes of numbers that autograd holds of a block after its forward, without its output."""
    torch.manual_seed(seed)
    block, lengths = MoeBlock(config, world, "all_to_all", held), [tokens] * world.size
    x = torch.randn(1, tokens, config.dim, requires_grad=True)
    size, _ = saved_bytes(lambda: block(x, lengths), tuple(block.parameters()))
    return size - (0 if held == "all" else x.nbytes)


def sum_sent(world: World, kind: Format, numbers: int) -> int:
    """Bytes that a process sends where each gets its part of a sum."""
    reduce = CompressedReduceScatter(world, kind)
    return sum(_sent(world, lambda: reduce(torch.ones(numbers * world.size))).values())


def _clocked(act: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of ``rounds`` on the GPU of this process, after two that do not count."""
    found = []
    for turn in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        act()
        torch.cuda.synchronize()
        if turn > 1:
            found.append(time.perf_counter() - start)
    return found


def dispatch_times(world: World, dispatch: Dispatch, experts: int, top_k: int, given: Mapping[str, int]) -> list[float]:
    """Seconds of both ways of a layer, forward and back, in bfloat16."""
    draws = torch.Generator("cuda").manual_seed(world.rank)
    index = torch.rand(given["tokens"], experts, device="cuda", generator=draws).topk(top_k).indices
    shared = ExpertParallel(world, experts, top_k, dispatch)
    x = torch.randn(given["tokens"], given["dim"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.rand(index.shape, device="cuda", dtype=torch.bfloat16)
    return _clocked(lambda: shared(x, index, weight, _weighted).backward(x.detach()), given["rounds"])


def block_times(
    world: World, held: Held, config: MoeConfig, given: Mapping[str, int]
) -> tuple[int, int, list[float]]:  # fmt: skip
    """Of a block in bfloat16: bytes held after its forward, the most until its gradients are there, and seconds."""
    torch.manual_seed(0)
    block = MoeBlock(config, world, "all_to_all", held).to("cuda", torch.bfloat16)
    x = torch.randn(1, given["tokens"], config.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lengths = [given["tokens"]] * world.size

    def act() -> None:
        block(x, lengths).backward(x.detach())

    act()  # gradients are there from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = block(x, lengths)
    held_now = torch.cuda.memory_allocated() - before - out.nbytes
    out.backward(x.detach())
    del out
    return held_now, torch.cuda.max_memory_allocated() - before, _clocked(act, given["rounds"])


def sum_times(world: World, kind: Format, plain: bool, given: Mapping[str, int]) -> list[float]:
    """Seconds in which each process gets its part of a sum; ``plain`` is the backend's own reduce-scatter."""
    x = torch.randn(given["numbers"] * world.size, device="cuda")
    reduce = CompressedReduceScatter(world, kind)
    lengths = [given["numbers"]] * world.size
    if plain:
        return _clocked(lambda: reduce.peers.reduce_scatter(x, lengths, "plain"), given["rounds"])
    return _clocked(lambda: reduce(x), given["rounds"])
