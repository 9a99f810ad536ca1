# SPDX-License-Identifier: Apache-2.0
"""Gradients of processes that share the tokens of one loss: each has those through its own tokens, to be added."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError
from ._context import World

__all__ = ["sum_gradients"]


def sum_gradients(model: nn.Module | Iterable[nn.Parameter], world: World | dist.ProcessGroup | None = None) -> None:
    """Add the gradients of all processes, in place; call it after backward and before clipping.

    A parameter that some processes have no gradient of (an expert that none of their tokens chose) counts as 0 there.
    Among groups of processes that read different batches, average afterwards, as DDP does.

    Args:
        model: whose parameters, or these themselves; not sharded by FSDP, which adds gradients itself.
        world: the processes that share tokens; None for all.

    Raises:
        UserError: parameters are sharded by FSDP.
    """
    from torch.distributed.tensor import DTensor

    group = world.group if isinstance(world, World) else world
    given = model.parameters() if isinstance(model, nn.Module) else model
    params = [p for p in given if p.requires_grad]
    if not params:
        return
    if any(isinstance(p, DTensor) for p in params):
        raise UserError("these parameters are sharded by FSDP, which adds gradients itself: leave sum_gradients away")
    there = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=params[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX, group=group)
    chosen = [p for p, some in zip(params, there.tolist(), strict=True) if some]
    for p in chosen:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for _, some in groupby(sorted(chosen, key=_kind), _kind):
        grads: list[Tensor] = [p.grad for p in some if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def _kind(p: nn.Parameter) -> tuple[str, str]:
    return str(p.dtype), str(p.device)
