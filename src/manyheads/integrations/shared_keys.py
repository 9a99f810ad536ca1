# SPDX-License-Identifier: Apache-2.0
"""Layers that reuse the keys and values of an earlier layer (Gemma 3n and 4): they attend to the slots of its store.

The model hands the tensor of keys on from layer to layer; what stands for them in this forward travels with it.
"""

from torch import Tensor

from ..call import AttentionCall

__all__ = ["borrow", "lend"]


def lend(k: Tensor, call: AttentionCall) -> None:
    """Leave with the keys ``k``, that later layers reuse, what stands for them in this forward's ``call``."""
    vars(k)["slots"] = (None if call.k is k else call.k, call.v, call.mask, call.is_causal, call.step)


def borrow(k: Tensor, call: AttentionCall) -> AttentionCall:
    """The call of a layer that reuses the keys ``k`` of an earlier one, over the slots of that one's store."""
    if (slots := vars(k).get("slots")) is None:
        return call
    keys, values, mask, is_causal, step = slots
    length = call.q.shape[2]  # the last queries, where the model wants no more
    mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, -length:]
    return call.replace(
        k=k if keys is None else keys, v=values, mask=mask, is_causal=is_causal and length > 1, step=step
    )
