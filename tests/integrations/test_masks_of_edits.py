# SPDX-License-Identifier: Apache-2.0
"""An edit that adds a mask to a causal call leaves it causal, whatever attention function the model has."""

from dataclasses import dataclass

import pytest
import torch

import manyheads
from manyheads.strategy import AttentionEdit, AttentionWatch
from oracles import models
from tolerance import SAME, is_close, is_far


@dataclass(frozen=True, kw_only=True)
class Hide(AttentionEdit):
    """Hides one key from the queries behind it, and says nothing of causality."""

    key: int = 2

    def edit(self, call):
        size, length = call.k.shape[2], call.q.shape[2]
        row = torch.arange(size - length, size)[:, None]
        mask = (torch.arange(size)[None] != self.key) | (row <= self.key)
        return call.replace(mask=mask[None, None] if call.mask is None else call.mask & mask)


class Keep(AttentionWatch):
    """Keeps every call and its output."""

    def watch(self, call, out):
        call.state.setdefault("calls", []).append((call, out))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal_stays_causal(name, attention):
    """Against softmax over the allowed pairs in float64; the control lets every query see all but the hidden key."""
    model = models.build(name)
    model.set_attn_implementation(attention)
    keep = Keep()
    with manyheads.use(model, Hide(), keep) as port, torch.no_grad():
        model(models.tokens(1, 9), use_cache=False)
    found = 0
    for _, state in port.kept(keep):
        for call, out in state["calls"]:
            groups = call.q.shape[1] // call.k.shape[1]
            x = call.q.double() @ call.k.double().repeat_interleave(groups, 1).mT * call.scale
            rows, keys = torch.arange(9)[:, None], torch.arange(9)[None]
            allowed = (keys <= rows) & ((keys != 2) | (rows <= 2))
            if call.site.window is not None:
                allowed &= keys > rows - call.site.window
            values = call.v.double().repeat_interleave(groups, 1)
            want, control = ((x.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2)
                             for seen in (allowed, (keys != 2).expand(9, 9)))  # fmt: skip
            assert is_close(out, want, SAME) and is_far(out, control)
            found += 1
    assert found
