# SPDX-License-Identifier: Apache-2.0
"""What flows from the tokens of a scene to the question in every layer, while none is dropped.

After forwards under it, ``port.kept(strategy)`` has for each layer, in ``state["flows"]``, one tensor ``[B, N]`` for
each prompt with images: what each of its N image tokens was given by the question's tokens (:func:`.received`).
:func:`.idle` says which part of them has next to nothing, :func:`.schedule_of` makes a schedule of them.
"""

from dataclasses import dataclass

from torch import Tensor

from ...call import AttentionCall
from ...reducing import PromptLayout, PromptReducer
from .contributions import received

__all__ = ["Flow"]


@dataclass(frozen=True, kw_only=True)
class Flow(PromptReducer):
    """Keeps what tokens of images are given."""

    def edit(self, call: AttentionCall) -> AttentionCall:
        layout: PromptLayout | None = call.state["prompt"]
        if layout is not None:
            flow = received(call, layout.asking)
            call.state.setdefault("flows", []).append(flow[layout.image].view(len(flow), -1))
        return call

    def reduce(self, x: Tensor, layout: PromptLayout) -> None:
        return None
