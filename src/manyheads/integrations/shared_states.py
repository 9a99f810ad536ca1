# SPDX-License-Identifier: Apache-2.0
"""Layers of linear attention in a model whose tokens several processes share (:mod:`.shared_tokens`).

Padding is skipped. Texts in a row are one to these layers, as they are to the model's own. In decoding every process
has the state of the whole prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.recurrence import DecayState, decay_attention
from .shared_decoding import Decoded

if TYPE_CHECKING:
    from ..call import AttentionCall, Recurrence
    from ..parallelism import SharedStates
    from .shared_plan import Plan

__all__ = ["pass_on"]


def pass_on(call: AttentionCall, linear: Recurrence, plan: Plan | Decoded, states: SharedStates) -> Tensor:
    """Output ``[B, T, H, d]`` of this process; leaves in ``linear`` the state after its tokens, or after a prompt."""
    q, k, v, g = call.q, call.k, call.v, linear.decay
    if isinstance(plan, Decoded):
        state = None if linear.state is None else DecayState(linear.state)
        out, after = decay_attention(q, k, v, g, state=state)
    else:
        if (real := plan.real(q)) is not None:
            k, g = k * real[:, None, :, None], torch.where(real[:, None], g[:, None], 0.0)
        out, after = states.attend(q, k, v, g)
        after = states.last(after) if plan.kept else after
    linear.state = after.kv
    return out.transpose(1, 2)
