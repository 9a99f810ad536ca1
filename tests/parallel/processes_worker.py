# SPDX-License-Identifier: Apache-2.0
"""What processes run in the tests of them: answers, errors of both kinds, a hang, an end."""

import os
import time
from collections import Counter

import torch
import torch.distributed as dist

from manyheads.errors import UserError
from manyheads.parallel import ContextParallel, World, pattern
from manyheads.parallel._methods import METHODS


def answer(world, factor):
    total = torch.tensor([world.rank + 1.0])
    dist.all_reduce(total)
    return {"rank": world.rank, "size": world.size, "node": world.ledger.node, "sum": float(total), "given": factor}


def refuse(world):
    if world.rank == world.size - 1:
        raise UserError("give it something else")


def fail(world):
    if world.rank == world.size - 1:
        raise ZeroDivisionError("it is zero here")
    return world.rank


def hang(world):
    if world.rank == world.size - 1:
        time.sleep(600)


def die(world):
    if world.rank == world.size - 1:
        os._exit(3)


def pairs_asked_for(world, times):
    """Names of the groups that pairs of processes get, asked for by worlds that are made again and again."""
    pairs = [[first, first + 1] for first in range(0, world.size, 2)]
    return [World().peers(pairs).group.group_name for _ in range(times)]


def sent(world, cases, size, heads, kv_heads, width):
    """Bytes by exchange and receiver, forward and of both ways, of cases (mask, method, processes of a machine)."""
    found = []
    for mask_name, method, node in cases:
        mask = pattern(mask_name, size, 1)
        world.ledger.node = node
        world.ledger.clear()
        context = ContextParallel(world, mask, **METHODS[method].given(world.size, node, kv_heads))
        q, k, v = (torch.randn(2, h, len(context.rows), width, requires_grad=True) for h in (heads, kv_heads, kv_heads))
        out, _ = context.attend(q, k, v)
        forward = Counter(world.ledger.sent)
        torch.autograd.grad(out.sum(), (q, k, v))
        found.append((dict(forward), dict(world.ledger.sent), world.ledger.bytes(between=True)))
    return found
