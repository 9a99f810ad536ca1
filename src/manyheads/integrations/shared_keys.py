# SPDX-License-Identifier: Apache-2.0
"""Layers that reuse the keys and values of an earlier layer (Gemma 3n and 4): they attend to the slots of its store.

The model hands the tensor of keys on from layer to layer; what stands for them in this forward travels with it.
"""

from torch import Tensor
from transformers.cache_utils import Cache

from ..call import AttentionCall, Site
from ..errors import UserError
from .cache import StoreLayer

__all__ = ["borrow", "lend", "lends"]


def lend(k: Tensor, call: AttentionCall) -> None:
    """Leave with the keys ``k``, that later layers reuse, what stands for them in this forward's ``call``."""
    vars(k)["slots"] = (None if call.k is k else call.k, call.v, call.mask, call.is_causal, call.step)


def lends(cache: Cache, site: Site) -> bool:
    """Whether a store of ours keeps the keys that ``site`` reuses."""
    layers = [layer for layer in cache.layers if isinstance(layer, StoreLayer) and layer.site.kv_sharing == "store"]
    return any((layer.site.window is None) == (site.window is None) for layer in layers)


def borrow(k: Tensor, call: AttentionCall, lent: bool) -> AttentionCall:
    """The call of a layer that reuses the keys ``k`` of an earlier one, over the slots of that one's store.

    Raises UserError where a store keeps them (``lent``) and the tensor is another than that layer had.
    """
    if (slots := vars(k).get("slots")) is None:
        if lent:
            raise UserError(
                f"{call.site.name} reuses keys of a layer on another device, and what the cache strategy says of them "
                "got lost on the way: put the layers on one device"
            )
        return call
    keys, values, mask, is_causal, step = slots
    length = call.q.shape[2]  # the last queries, where the model wants no more
    mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, -length:]
    return call.replace(
        k=k if keys is None else keys, v=values, mask=mask, is_causal=is_causal and length > 1, step=step
    )
