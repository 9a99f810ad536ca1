# SPDX-License-Identifier: Apache-2.0
"""What each process of the tests of experts runs; one start of a pool serves all of it."""

from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional as F

from manyheads.parallel import _compressed as compressed
from manyheads.parallel._context import ContextParallel
from manyheads.parallel._experts import DISPATCHES, ExpertParallel, feed_forward
from manyheads.parallel._masks import pattern
from manyheads.parallel._moe_block import MoeBlock, MoeConfig
from manyheads.parallel._remat import saved_bytes
from manyheads.parallel._travel import Trip, gather, reduce_scatter

EXPERTS, DIM, INNER, TOKENS = 8, 6, 5, 11  # TOKENS of the first process, one more of each that follows


def dense(x, index, weight, gate_up, down):
    """The mixture by its formula, an expert after the other on all tokens: weights behind the last matrix."""
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        gate, up = F.linear(x, gate_up[expert]).chunk(2, -1)
        share = (weight * (index == expert)).sum(1)
        out = out + share[:, None] * F.linear(F.silu(gate) * up, down[expert])
    return out


def drawn(ranks, top_k, experts=EXPERTS, choice="mixed", seed=0):
    """Tokens of all processes with their choices, weights of experts, and what is sent back; lengths of processes."""
    draws = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draws, dtype=torch.float64)
    lengths = [TOKENS + rank for rank in range(ranks)]
    total = sum(lengths)
    index = torch.rand(total, experts, generator=draws).topk(top_k).indices
    if choice == "all to one":
        index = torch.zeros(total, 1, dtype=torch.long)
    if choice == "none of the last":
        index = torch.rand(total, experts - experts // ranks, generator=draws).topk(top_k).indices
    weight = torch.rand(index.shape, generator=draws, dtype=torch.float64)
    given = [normal(total, DIM), weight, normal(experts, 2 * INNER, DIM), normal(experts, DIM, INNER)]
    return given, index, normal(total, DIM), lengths


def error(got, want):
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max()) / float(want.abs().max())


def alike(world, dispatch, top_k, experts=EXPERTS, choice="mixed", wrong=None):
    """Largest relative error of outputs and gradients against the formula over all tokens, over all processes."""
    (x, weight, gate_up, down), index, dout, lengths = drawn(world.size, top_k, experts, choice)
    every = [t.clone().requires_grad_() for t in (x, weight, gate_up, down)]
    want = dense(every[0], index, *every[1:])
    wanted = torch.autograd.grad(want, every, dout)
    shared = ExpertParallel(world, experts, index.shape[1], dispatch)
    start = sum(lengths[: world.rank])
    tokens = slice(start, start + lengths[world.rank])
    mine = [x[tokens], weight[tokens], gate_up[shared.mine], down[shared.mine]]
    mine = [t.clone().requires_grad_() for t in mine]
    compute = feed_forward(*mine[2:])
    if wrong == "unweighted":
        compute = lambda rows: feed_forward(*mine[2:])(rows._replace(weight=rows.weight * 0 + 1))  # noqa: E731
    if wrong == "shifted":  # each row by the expert after its own
        compute = lambda rows: feed_forward(*mine[2:])(rows._replace(counts=rows.counts[1:] + rows.counts[:1]))  # noqa: E731
    out = shared(mine[0], index[tokens], mine[1], compute)
    got = (out, *torch.autograd.grad(out, mine, dout[tokens]))
    parts = (want[tokens], wanted[0][tokens], wanted[1][tokens], wanted[2][shared.mine], wanted[3][shared.mine])
    found = torch.tensor([error(a, b) if b.abs().max() else float(a.abs().max()) for a, b in zip(got, parts, strict=True)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def counted(world, act):
    """Bytes that this process sent by name, in ``act()``."""
    world.ledger.clear()
    act()
    found = {}
    for (name, _), size in world.ledger.sent.items():
        found[name] = found.get(name, 0) + size
    return found


def dispatched(world, top_k, experts, tokens=512, seed=3):
    """Bytes by dispatch and name of float32 tokens, forward and back, and by what the choices say they have to be."""
    draws = torch.Generator().manual_seed(seed)
    index = torch.rand(world.size, tokens, experts, generator=draws).topk(top_k).indices
    owner = index * world.size // experts
    mine = owner[world.rank]
    away = int((mine != world.rank).sum())
    ranks = torch.zeros(tokens, world.size).scatter_(1, mine, 1.0)
    ranks[:, world.rank] = 0
    found = {"rows": {"all_to_all": away, "dedupe": int(ranks.sum()), "all_gather": tokens * (world.size - 1)}}
    came = {"all_to_all": int((owner == world.rank).sum()) - int((mine == world.rank).sum())}
    came["dedupe"] = int((owner == world.rank).any(2).sum()) - int((mine == world.rank).any(1).sum())
    found["back"] = {**came, "all_gather": tokens * (world.size - 1)}
    for dispatch in DISPATCHES:
        shared = ExpertParallel(world, experts, top_k, dispatch)
        x = torch.randn(tokens, DIM, requires_grad=True)
        weight = torch.rand(tokens, top_k)

        def act(shared=shared, x=x, weight=weight):
            out = shared(x, index[world.rank], weight, lambda rows: rows.x * rows.weight[:, None])
            out.sum().backward()

        found[dispatch] = counted(world, act)
    return found


def attention_bytes(world):
    """Numbers sent forward for attention with split weights, and by heads: ratio of the two."""
    batch, tokens, heads, kv_heads, width = 1, 8, 16, 8, 4
    x = torch.randn(tokens, batch * heads * width)
    peers = ExpertParallel(world, EXPERTS, 1, "all_gather").peers
    lengths = [tokens] * world.size

    def split():
        every = gather(x, peers, lengths, "in")
        reduce_scatter(every, peers, lengths, "out")

    block = block_of(world, "all", heads=heads, kv_heads=kv_heads, dim=heads * width)
    shared = counted(world, lambda: block(x.view(batch, tokens, -1), lengths))
    return {"split": counted(world, split), "heads": shared["heads"]}


def block_of(world, held, dispatch="all_to_all", dim=32, heads=8, kv_heads=8, top_k=2, inner=24):
    torch.manual_seed(7)
    return MoeBlock(MoeConfig(dim, heads, kv_heads, EXPERTS, top_k, inner), world, dispatch, held)


def blocks(world, dispatch, dtype=torch.float32):
    """By what is held: gradients of two blocks, and bytes that one holds."""
    lengths = [12 + rank for rank in range(world.size)]
    found = {}
    for held in ("all", "products", "values"):
        one, two = block_of(world, held, dispatch).to(dtype), block_of(world, held, dispatch).to(dtype)
        torch.manual_seed(world.rank)
        hidden = torch.randn(2, lengths[world.rank], 32, dtype=dtype, requires_grad=True)
        out = two(one(hidden, lengths), lengths)
        (out * torch.arange(32)).sum().backward()
        gradients = [hidden.grad, *(p.grad for p in one.parameters()), *(p.grad for p in two.parameters())]
        held_bytes = saved_bytes(lambda one=one, x=hidden: one(x, lengths), tuple(one.parameters()))
        rows = torch.tensor(0)
        found[held] = {"out": out.detach(), "gradients": gradients, "bytes": held_bytes}
    return found


def rows_of(world, dispatch):
    """Rows that this process's experts are given in the block of :func:`blocks`."""
    lengths = [12 + rank for rank in range(world.size)]
    block = block_of(world, "all", dispatch)
    torch.manual_seed(world.rank)
    hidden = torch.randn(2, lengths[world.rank], 32)
    seen = []
    send = block.shared.send

    def watched(*given):
        route = send(*given)

        def arrive():
            rows = route.arrive()
            seen.append(len(rows.x))
            return rows

        return route._replace(arrive=arrive)

    block.shared.send = watched
    block(hidden, lengths)
    return seen[0]
