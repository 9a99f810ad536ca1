# SPDX-License-Identifier: Apache-2.0
"""States of softmax mixers: one may be continued twice, grows in place, and stays as it was."""

import torch

from manyheads.mixers._mixer import KVState, positions_of


def tokens(count, first=0):
    k = torch.randn(2, 3, count, 4)
    return k, k + 1, torch.arange(first, first + count).expand(2, -1)


def joined(state, piece):
    return state.join(*piece, state.seen + piece[0].shape[2], False)


def start(count=5):
    return KVState(*tokens(count), torch.full((2,), count))


def test_grows_in_place_and_copies_when_it_has_to():
    state = joined(start(), tokens(1, 5))
    buffer = state.k.untyped_storage().data_ptr()
    want = [state.k]
    for t in range(6, 40):
        piece = tokens(1, t)
        state = joined(state, piece)
        want.append(piece[0])
        assert state.k.untyped_storage().data_ptr() == buffer
    assert torch.equal(state.k, torch.cat(want, 2)) and torch.equal(state.positions[0], torch.arange(40))
    longer = joined(state, tokens(500, 40))
    assert longer.k.untyped_storage().data_ptr() != buffer and longer.k.shape[2] == 540


def test_a_state_can_be_continued_twice():
    base = joined(start(), tokens(1, 5))
    held = base.k.clone()
    one, other = tokens(2, 6), tokens(3, 6)
    first, second = joined(base, one), joined(base, other)
    assert torch.equal(first.k[:, :, 6:], one[0]) and torch.equal(second.k[:, :, 6:], other[0])
    assert torch.equal(base.k, held) and first.k.shape[2] == 8 and second.k.shape[2] == 9


def test_gradients_pass_through_a_state():
    k = torch.randn(1, 1, 3, 2, requires_grad=True)
    at = torch.arange(3)[None]
    state = KVState(k, k * 2, at, torch.tensor([3])).join(k, k, at + 3, torch.tensor([6]), False)
    (state.k.sum() + state.v.sum()).backward()
    assert torch.equal(k.grad, torch.full_like(k, 5.0))


def test_reorder_detach_last_and_bytes():
    state = joined(start(), tokens(1, 5))
    assert torch.equal(state.reorder(torch.tensor([1, 1])).k, state.k[[1, 1]])
    assert not state.detach().k.requires_grad and state.last(4).k.shape[2] == 4 and state.last(9) is state
    assert state.nbytes == 2 * 2 * 3 * 6 * 4 * 4 + 2 * 6 * 8 + 2 * 8


def test_positions():
    device = torch.device("cpu")
    mask = torch.tensor([[False, True, True], [True, True, False]])
    seen = torch.tensor([4, 0])
    assert positions_of(2, 3, device, mask, seen, None).tolist() == [[-1, 4, 5], [0, 1, -1]]
    assert positions_of(2, 3, device, None, seen, None).tolist() == [[4, 5, 6], [0, 1, 2]]
    assert positions_of(1, 5, device, None, None, torch.tensor([0, 2, 5])).tolist() == [[0, 1, 0, 1, 2]]
