# SPDX-License-Identifier: Apache-2.0
"""What strategies on pairs of a source and its target share: which rows they are, and attention of some rows to others.

In every branch of a batch the first half of the rows are sources, the second their targets; where frames attend apart,
a picture's frames are rows that follow each other, and so they pair as well.
"""

import torch
from torch import Tensor

from ..call import AttentionCall, DiffusionStep
from ..errors import UserError

__all__ = ["check_pairs", "known_step", "of_rows", "pairs", "sdpa"]


def known_step(call: AttentionCall, slug: str) -> DiffusionStep:
    """The step of a call.

    Raises:
        UserError: it is not known.
    """
    step = call.diffusion
    if step is None or step.index is None:
        raise UserError(f"{slug} has to know the step: open the pipeline, not its denoiser")
    return step


def check_pairs(call: AttentionCall, step: DiffusionStep, slug: str) -> None:
    """Refuse rows whose branches are not known or do not pair."""
    if step.branches == ("unknown",):
        raise UserError(f"{slug}: the pipeline guides and does not say which rows are conditional")
    if call.q.shape[0] % (2 * len(step.branches)):
        raise UserError(
            f"{slug}: {call.q.shape[0]} rows in branches {'+'.join(step.branches)} are no pairs of source and "
            "target; give the pipeline the prompts of the sources, then those of their targets"
        )


def of_rows(x: Tensor | None, rows: Tensor) -> Tensor | None:
    """Rows of a mask or a bias, which may be one for all."""
    return x if x is None or x.shape[0] == 1 else x[rows]


def pairs(batch: int, branches: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the sources and of their targets, for each branch one half after the other."""
    rows = torch.arange(batch, device=device).reshape(branches, 2, -1)
    return rows[:, 0].flatten(), rows[:, 1].flatten()


def sdpa(call: AttentionCall, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the call's queries over other keys and values, ``[B, T, H, dv]``."""
    mask = call.mask
    if call.bias is not None:
        floor = torch.finfo(call.q.dtype).min
        mask = call.bias if mask is None else torch.where(mask, call.bias, floor)
    out = torch.nn.functional.scaled_dot_product_attention(
        call.q, k, v, mask, scale=call.scale, enable_gqa=call.q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
