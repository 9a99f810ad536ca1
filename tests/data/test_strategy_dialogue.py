# SPDX-License-Identifier: Apache-2.0
"""Strategy dialogues: the reply is that of the instruction, wherever the layout puts it."""

import pytest
import torch

from manyheads.data.strategy_dialogue import STYLES, VOCAB, strategy_dialogues


@pytest.mark.parametrize("form", ["standard", "c1_hf", "c1_hl"])
@pytest.mark.parametrize("turns", [1, 3])
def test_the_instruction_tells_the_reply(form, turns):
    made = strategy_dialogues(40, turns, form, torch.Generator().manual_seed(0), words=4)
    ids, (start, stop) = made.ids, made.system
    assert ids.max() < VOCAB and (ids[:, 0] == 0).all()
    assert (ids[:, start] == 1).all() and stop == start + 2
    style = ids[:, start + 1] - 5
    assert style.min() >= 0 and style.max() < STYLES
    assert torch.equal(ids[:, -2] - 5 - STYLES, style // 4) and torch.equal(ids[:, -1] - 9 - STYLES, style % 4)
    last = ids.shape[1] - 2 - 6  # USER, four words, ASSISTANT
    assert (ids[:, last] == 2).all() and (ids[:, -3] == 3).all()
    assert (stop == last) if form == "c1_hf" else (start == 1)
    assert ((ids == 2).sum(1) == (1 if form == "c1_hl" else turns)).all()
    replies = (ids[:, :-2] >= 5 + STYLES) & (ids[:, :-2] < 9 + STYLES)
    assert (replies.sum(1) == turns - 1).all()  # earlier replies, with styles of their own
    if turns > 1:
        earlier = ids[:, :-2][replies].view(40, -1)
        assert (earlier != ids[:, -2:-1]).any()
    beside = ids[:, made.beside[0] : made.beside[1]]
    assert beside.shape == (40, 2) and not torch.equal(beside, ids[:, start:stop])


def test_layouts_hold_the_same_tokens():
    a, b = (strategy_dialogues(3, 4, f, torch.Generator().manual_seed(0)).ids for f in ("standard", "c1_hf"))
    assert torch.equal(a.sort(1).values, b.sort(1).values) and not torch.equal(a, b)
