# SPDX-License-Identifier: Apache-2.0
"""Tokens of a strategy's own among those that a decoder reads: the caller sees none of them, and nothing is left."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads import UserError
from manyheads.call import Piece
from manyheads.strategy import AttentionWatch, Interleaved
from oracles import models
from oracles.fingerprint import assert_same, of_model
from tolerance import assert_close, is_far


@dataclass(frozen=True, kw_only=True)
class Pieces(Interleaved, AttentionWatch):
    """Reads a text in pieces of ``size`` tokens, each with ``more`` tokens of zeros behind it."""

    size: int = 5
    more: int = 0

    def watch(self, call: object, out: Tensor) -> None:
        pass

    def pieces(self, embeds: Tensor, seen: int, cached: bool) -> Iterator[Piece] | None:
        if not self.size:
            return None
        assert cached or self.size >= embeds.shape[1]
        return self._pieces(embeds, seen)

    def _pieces(self, embeds: Tensor, seen: int) -> Iterator[Piece]:
        for part in embeds.split(self.size, 1):
            given = part.shape[1]
            places = seen + torch.arange(given + self.more)
            yield Piece(torch.cat([part, part.new_zeros(part.shape[0], self.more, part.shape[2])], 1), places, given)
            seen += given + self.more


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_pieces_are_the_text(name):
    """In any pieces: the logits, the loss and the cache that the model gives, by ids and by embeddings."""
    model, ids = models.build(name), models.tokens(2, 12)
    before = of_model(model)
    with torch.no_grad():
        want = model(ids, labels=ids)
        for strategy in (Pieces(), Pieces(size=1), Pieces(size=0)):
            with manyheads.use(model, strategy):
                got = model(ids, labels=ids)
                again = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
            assert_close(got.logits, want.logits)
            assert_close(again, want.logits)
            assert_close(got.loss, want.loss)
            assert got.past_key_values.get_seq_length() == 12
        with manyheads.use(model, Pieces(more=2)):
            changed = model(ids).logits
    assert changed.shape == want.logits.shape and is_far(changed[:, 5:], want.logits[:, 5:])
    assert_close(changed[:, :5], want.logits[:, :5])
    assert_same(of_model(model), before)


def test_what_is_refused():
    model, ids = models.tiny("llama"), models.tokens(2, 6)
    with pytest.raises(UserError, match="both put tokens"), manyheads.use(model, Pieces(), Pieces(size=3)):
        pass
    with manyheads.use(model, Pieces()):
        with pytest.raises(UserError, match="both put tokens"), manyheads.use(model, Pieces(size=3)):
            pass
        with pytest.raises(UserError, match="rows of one length"):
            model(ids, attention_mask=torch.tensor([[0] + [1] * 5, [1] * 6]))
        with pytest.raises(UserError, match="no hidden states"):
            model(ids, output_hidden_states=True)
        with pytest.raises(UserError, match="leave position_ids away"):
            model(ids, position_ids=torch.arange(6)[None] + 3)
        with pytest.raises(UserError, match="masks of its own"):
            model(ids, attention_mask=torch.zeros(2, 1, 6, 6))
        model(ids, position_ids=torch.arange(6)[None], attention_mask=torch.ones_like(ids))
