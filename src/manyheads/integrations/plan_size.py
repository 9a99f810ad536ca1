# SPDX-License-Identifier: Apache-2.0
"""What a plan of surgery keeps of each axis, and how many parameters a model has after it; nothing is made."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..conversion import Drop, Factorise, HeadDim, Prune, Replace, Share, SurgeryPlan
from ..errors import UserError

if TYPE_CHECKING:
    from .anatomy import ModelAnatomy

__all__ = ["count", "kept_rows", "module_of", "turned"]


def kept_rows(anatomy: ModelAnatomy, steps: Sequence[Prune], layer: int) -> dict[str, Tensor]:
    """Entries that are kept of the axes of a layer's parameters, for those axes that are pruned.

    Raises:
        UserError: they are not there, pruned twice, or leave groups of heads unequal.
    """
    shape = anatomy.layers[layer]
    rows: dict[str, Tensor] = {}
    for step in steps:
        if step.layer not in (None, layer):
            continue
        keep = torch.tensor(step.keep)
        size = {"width": anatomy.width, "neurons": shape.neurons, "heads": shape.heads}[step.axis]
        if step.keep[-1] >= size:
            raise UserError(f"layer {layer} has {size} {step.axis}, so number {step.keep[-1]} cannot be kept")
        if ("q" if step.axis == "heads" else step.axis) in rows:
            raise UserError(f"the plan prunes the {step.axis} of layer {layer} twice")
        if step.axis != "heads":
            rows[step.axis] = keep
            continue
        groups = keep // (shape.heads // shape.kv_heads)
        kv, counts = groups.unique(return_counts=True)
        if len(set(counts.tolist())) > 1:
            raise UserError(
                f"layer {layer} would keep {counts.tolist()} query heads of its key/value heads {kv.tolist()}: keep as "
                "many of each"
            )
        rows["q"], rows["kv"] = _channels(keep, shape.head_dim), _channels(kv, shape.head_dim)
        whole = shape.heads * shape.head_dim
        rows["qkv"] = torch.cat([rows["q"] + i * whole for i in range(3)])
    return rows


def _channels(heads: Tensor, dim: int) -> Tensor:
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def module_of(step: Replace) -> nn.Module:
    """The module that a step puts into a model.

    Raises:
        UserError: it is none of this package.
    """
    home, _, name = step.module.partition(":")
    if not home.startswith(f"{__package__.partition('.')[0]}."):
        raise UserError(f"{step.module} is no module of this package; nothing else is put into a model")
    made: nn.Module = getattr(import_module(home), name)(**step.config)
    return made


def turned(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as ``[in, out]``, as GPT-2's does."""
    return type(module).__name__ == "Conv1D"


def count(anatomy: ModelAnatomy, plan: SurgeryPlan) -> int:
    """Parameters after a plan, exactly."""
    prunes = [step for step in plan.steps if isinstance(step, Prune)]
    kept = [
        {axis: len(rows) for axis, rows in kept_rows(anatomy, prunes, layer).items()}
        for layer in range(len(anatomy.layers))
    ]
    shared = {axis: size for axis, size in kept[0].items() if axis == "width"}
    for step in plan.steps:
        if isinstance(step, HeadDim):
            before = anatomy.layers[step.layer]
            heads = kept[step.layer].get("q", before.heads * before.head_dim) // before.head_dim
            kept[step.layer] |= {"q": heads * step.dim, "kv": heads * step.dim}
    home = anatomy.prefix + anatomy.map.layers
    gone: set[str] = set()
    for step in plan.steps:
        if isinstance(step, Drop):
            paths = [""] if step.part == "block" else [f"{path}." for path in anatomy.map.off[step.part]]
            gone.update(f"{home}.{layer}.{path}" for layer in step.layers for path in paths)
    low: dict[str, Factorise] = {}
    coefficients: dict[str, Share] = {}
    total = 0
    for step in plan.steps:
        if isinstance(step, Factorise):
            low[f"{home}.{step.layer}.{anatomy.part(step.part)}.weight"] = step
        elif isinstance(step, Share):
            coefficients |= {f"{home}.{layer}.{anatomy.part(step.part)}.weight": step for layer in step.layers}
        elif isinstance(step, Replace):
            path = f"{home}.{step.layer}.{anatomy.part(step.part)}."
            if not path.startswith(tuple(gone)):
                with torch.device("meta"):
                    total += sum(p.numel() for p in module_of(step).parameters())
            gone.add(path)
    atoms: dict[int, int] = {}
    for name, axes, layer, shape in anatomy.sizes:
        if name.startswith(tuple(gone)):
            continue
        sizes = shared if layer is None else kept[layer]
        after = [sizes.get(axis, size) for axis, size in zip(axes, shape, strict=True)]
        if name in low:
            thin = low[name]
            out = after[1 if turned(anatomy.linear(thin.part, thin.layer)) else 0]
            total += thin.rank * (sum(after) if thin.reads is None else out)
        elif name in coefficients:
            sums = coefficients[name]
            total += sums.atoms + sums.rank * sum(after)
            atoms[id(sums)] = sums.atoms * prod(after)
        else:
            total += prod(after)
    return total + sum(atoms.values())
