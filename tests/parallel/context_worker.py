# SPDX-License-Identifier: Apache-2.0
"""Runs attention that processes share, on 2, 4 and 8 of them, and leaves errors and bytes as JSON for the test."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from manyheads.parallel import LAYOUTS, PATTERNS, ContextParallel, Layout, World, _exchanges, pattern
from manyheads.parallel import _context as shared
from parallel.forked import start

SIZES = (2, 4, 8)
SIZE, BATCH, HEADS, KV_HEADS, WIDTH, VALUES = 45, 2, 8, 2, 6, 4


def reference(q, k, v, seen, scale=None):
    """Attention by the formula: output and log-sum-exp, 0 and -inf where a row sees nothing."""
    groups = q.shape[1] // k.shape[1]
    x = q @ k.repeat_interleave(groups, 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    x = x.masked_fill(~seen, -torch.inf)
    return x.softmax(-1).nan_to_num() @ v.repeat_interleave(groups, 1), x.logsumexp(-1)


def drawn(mask, dtype=torch.float64):
    """Inputs, what is sent back, and what attention over all tokens makes of both."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads, width):
        return torch.randn(BATCH, heads, mask.size, width, dtype=torch.float64, generator=generator)

    inputs = [draw(HEADS, WIDTH), draw(KV_HEADS, WIDTH), draw(KV_HEADS, VALUES)]
    inputs = [x.to(dtype).double().requires_grad_() for x in inputs]
    every = torch.arange(mask.size)
    out, lse = reference(*inputs, mask.dense(every, every))
    douts = draw(HEADS, VALUES).to(dtype).double(), draw(HEADS, 1)[..., 0] * lse.isfinite()
    return [x.detach() for x in inputs], douts, (out.detach(), lse.detach(), *gradients(out, lse, douts, inputs))


def gradients(out, lse, douts, inputs):
    told = (out * douts[0].to(out.dtype)).sum() + (lse.masked_fill(lse.isinf(), 0) * douts[1].to(lse.dtype)).sum()
    return torch.autograd.grad(told, inputs)


def errors(context, mask, dtype=torch.float64):
    """The largest difference from the reference of output, log-sum-exp and gradients, over all processes."""
    inputs, douts, want = drawn(mask, dtype)
    mine = [context.shard(x, 2).to(dtype).requires_grad_() for x in inputs]
    out, lse = context.attend(*mine)
    got = (out, lse, *gradients(out, lse, [context.shard(x, 2) for x in douts], mine))
    found = []
    for x, y in zip(got, want, strict=True):
        y = context.shard(y, 2)
        known = y.isfinite()
        assert torch.equal(x.isfinite(), known)
        found.append((x.detach().double() - y)[known].abs().max() if known.any() else torch.zeros(()))
    every = torch.stack([x.double() for x in found])
    dist.all_reduce(every, dist.ReduceOp.MAX)
    whole = context.unshard(out, 2)
    assert (whole.double() - want[0]).abs().max() <= every[0] + 1e-30  # each row in its place
    return every.tolist()


def ways(ranks):
    """Exchanges and grids that so many processes can form."""
    yield from (("ring", {}), ("all_gather", {}), ("group_cast", {}))
    if ranks > 2:
        yield from (("ring", {"window": 2}), ("ring", {"heads": 2}), ("group_cast", {"heads": 2, "place": "context"}))
        yield "all_gather", {"heads": ranks // 2}
    if ranks == 8:
        yield "ring", {"heads": 2, "window": 2, "place": "context"}
    yield "ring", {"heads": ranks}


class Mislabelled(_exchanges.Ring):
    """Takes each block for the one before it in the ring."""

    def _source(self, outer, inner):
        return super()._source(outer, inner + (len(self.peers) > 1 and inner > 0))


def run(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    world, layouts, found = World(node=2), list(LAYOUTS), {"errors": {}, "bytes": {}}
    for number, name in enumerate(PATTERNS):
        mask = pattern(name, SIZE, seed=1)
        for turn, (exchange, more) in enumerate(ways(ranks)):
            how = layouts[(number + turn) % len(layouts)]
            context = ContextParallel(world, mask, how, exchange, **more)
            found["errors"][f"{name}, {how}, {exchange}, {more}"] = errors(context, mask)
    even = pattern("causal", 16 * ranks)
    for exchange, more in ways(ranks):
        world.ledger.clear()
        context = ContextParallel(world, even, "zigzag", exchange, **more)
        inputs = [context.shard(x, 2).requires_grad_() for x in drawn(even)[0]]
        out, _ = context.attend(*inputs)
        forward = {kind: [world.ledger.bytes(kind), world.ledger.bytes(kind, between=True)] for kind in names(world)}
        torch.autograd.grad(out.sum(), inputs)
        both = {kind: [world.ledger.bytes(kind), world.ledger.bytes(kind, between=True)] for kind in names(world)}
        found["bytes"][f"{exchange}, {more}"] = {"forward": forward, "both": both}
    uneven = pattern("document_causal", SIZE, seed=1)
    cast = ContextParallel(world, uneven, "contiguous", "group_cast")
    found["asked"] = sum(map(len, cast.exchange.asked))
    context = ContextParallel(world, uneven, "zigzag", "ring")
    found["bf16"] = errors(context, uneven, torch.bfloat16)
    lengths = [len(rows) for rows in context.layout.rows]
    if len(set(lengths)) == 1 or ranks == 2:
        shared.EXCHANGES["mislabelled"] = Mislabelled
        equal = pattern("causal", 16 * ranks)
        found["control"] = errors(ContextParallel(world, equal, "contiguous", "mislabelled"), equal)
    another = Layout(tuple(rows.flip(0) for rows in context.layout.rows))
    found["own layout"] = errors(ContextParallel(world, uneven, another, "group_cast"), uneven)
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def names(world):
    return {kind for kind, _ in world.ledger.sent}


if __name__ == "__main__":
    start(run, SIZES)
