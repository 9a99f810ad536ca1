# SPDX-License-Identifier: Apache-2.0
"""What the tests of FireQ look at: the keys that a policy is shown, and the codes that a store holds."""

import torch

import manyheads
from manyheads.caches._view import CacheView
from manyheads.strategy import AttentionWatch


class Look(AttentionWatch):
    """Keeps what a policy would see of the keys."""

    def watch(self, call, out):
        positions = torch.arange(call.k.shape[2]).expand(*call.k.shape[:2], -1)
        counts = torch.full((len(call.k),), call.k.shape[2])
        call.state["view"] = CacheView(
            call.k, call.v, positions, counts, None, call.scale, None, None, call.site, rotary=call.rotary
        )


def looked(model, ids):
    look = Look()
    with torch.no_grad(), manyheads.use(model, look) as port:
        model(ids, use_cache=False)
    return [memory["view"] for memory in port.state(look).values()]


def packed(store):
    """Codes of keys and values, and scales, of every encoded token by ``(row, head, column)``."""
    flat, found = store.tokens.ragged, {}
    for b in range(flat.offsets.shape[0]):
        for h in range(flat.offsets.shape[1]):
            start, length = int(flat.offsets[b, h]), int(flat.lengths[b, h])
            for at in range(start, start + length):
                codes = (x.clone().view(torch.uint8).tolist() for x in (flat.k[at], flat.v[at]))
                found[b, h, int(flat.index[at])] = (*codes, float(flat.k_scale[at]), float(flat.v_scale[at]))
    return found
