# SPDX-License-Identifier: Apache-2.0
"""AdamW and Muon (arXiv 2502.16982); Muon takes the matrices of a shape together, also those held as one stack."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["Muon", "OptimizerName", "optimizers_of", "orthogonalise"]

OptimizerName = Literal["adamw", "muon"]


def optimizers_of(
    model: nn.Module, lr: float, optimizer: OptimizerName = "adamw", *, weight_decay: float = 0.1
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """Optimisers of a transformer: AdamW, or Muon for the matrices of its blocks and AdamW for all else.

    Args:
        model: its blocks are the elements of its lists of modules.
        lr: highest learning rate, of either optimiser.
        optimizer: ``adamw`` or ``muon``.
        weight_decay: on matrices and embeddings only.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and re.search(r"\.\d+\.", name)]
    taken = {id(p) for p in matrices}
    tables = [p for _, p in named if p.ndim == 2 and id(p) not in taken]  # embeddings, and an output layer of its own
    rest = [p for _, p in named if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": tables, "weight_decay": weight_decay}, {"params": rest}]
    given: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if optimizer == "muon":
        return [Muon(matrices, lr, weight_decay), torch.optim.AdamW(groups, **given)]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, *groups], **given)]


class Muon(torch.optim.Optimizer):
    """The update of torch.optim.Muon, all matrices of a shape in one batched product: ``[rows, columns]`` or stacks.

    Momentum 0.95 with Nesterov, five quintic Newton-Schulz steps in bfloat16, decoupled weight decay, and the learning
    rate scaled by 0.2 sqrt(max(rows, columns)) so that an update has the size of AdamW's (arXiv 2502.16982).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, held in shapes.items():
                for p in held:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momentum, grads = (
                    [self.state[p]["momentum"] for p in held],
                    [p.grad for p in held if p.grad is not None],
                )
                torch._foreach_lerp_(momentum, grads, 0.05)
                stack = torch.stack(torch._foreach_lerp(grads, momentum, 0.95)).view(-1, *shape[-2:])
                update = orthogonalise(stack).to(held[0].dtype).view(len(held), *shape)
                rate = group["lr"]  # a number, or a tensor where steps are replayed
                torch._foreach_mul_(held, 1 - rate * group["weight_decay"])
                torch._foreach_add_(held, (update * (-rate * 0.2 * max(shape[-2:]) ** 0.5)).unbind())


def orthogonalise(g: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T in g [L, rows, columns]: singular values end near 1, in bfloat16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
