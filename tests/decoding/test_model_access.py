# SPDX-License-Identifier: Apache-2.0
"""Loops of decoding write with nothing but a ``ModelAccess``: here that of a rule, with no model behind it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from manyheads import catalog, parse
from manyheads.attention.shared_block import Block
from manyheads.decoding._images import ImageDecoding
from manyheads.writing import DecodingLoop, Request, Written

V, MASK, LAST, MOST = 12, 11, 10, 7  # what counts on after LAST is 0
PROMPT = torch.tensor([[6, 7, 8]])
CHAIN = [9, 10, 0, 1, 2, 3, 4]
SPECS = (
    "block_diffusion:block=3", "conscious_gaze:gate=always", "dpad:block=3,window=2", "hogwild:workers=1",
    "lnd:particles=3", "lnd.rejection:batch=2", "pai", "vcd",
)  # fmt: skip


def logits(tokens):
    """That each token is followed by the next number, nearly for certain."""
    return 100.0 * torch.nn.functional.one_hot((tokens + 1) % (LAST + 1), V).float()


class Rule:
    """A cache, readings, blocks and a denoiser at once: all know the last token that was read."""

    mask, forwards = MASK, 0

    def __init__(self, rows=1):
        self.last, self.seen = PROMPT[:, -1].expand(rows), torch.ones(rows, 3, dtype=torch.bool)

    def batch_select_indices(self, rows):
        self.last = self.last[rows]

    def next(self):
        return logits(self.last)

    again = next

    def append(self, token, seen):
        self.last = torch.full_like(self.last, token)

    def check(self, ids):
        assert ids == PROMPT[0].tolist()

    def of(self, cache, count):
        return Block()

    def read(self, rows, *, same_step=True):
        return logits(torch.tensor([tokens[-1] for _, tokens in rows]))

    def read_long(self, view, tokens):
        return self.read([(view, tokens)])[0]

    def nbytes(self, *blocks):
        return 0

    def __call__(self, ids, places, first, last, past=None):
        return logits(ids[:, :1] + places[first:last] - 1)


class Access:
    max_positions = None

    def use(self, *strategies):
        return nullcontext()

    def reader(self, cache):
        return lambda fed: logits(fed[:, -1])

    def image_columns(self, ids, by):
        return torch.tensor([False, True, False])

    def readings(self, ids, seen, given):
        return Rule(len(seen))

    def blocks(self):
        return nullcontext(Rule())

    def masked_lm(self):
        return Rule()


def request(images):
    pixels = {"pixel_values": torch.zeros(1, 3, 2, 2)}
    return Request(None, None, PROMPT, MOST, cache=Rule(), given=pixels if images else {})


@pytest.mark.parametrize("spec", SPECS)
def test_a_loop_needs_only_the_access(spec):
    strategy = parse(spec)
    asked = request(images=isinstance(strategy, ImageDecoding))
    assert strategy.write(asked, Access()).tokens == CHAIN
    assert strategy.write(replace(asked, ends=frozenset({1})), Access()).tokens == CHAIN[:3]


def test_these_are_all_loops_there_are():
    rows = [row for row in [*catalog.papers(), *catalog.baselines()] if row.category == "decoding"]
    kinds = {type(parse(spec)) for spec in SPECS}
    there = {kind for row in rows for kind in catalog.strategies(row.slug).values()}
    assert kinds == {kind for kind in there if issubclass(kind, DecodingLoop)}


def test_a_loop_that_asks_the_model_itself_is_caught():
    class Reaching(DecodingLoop):
        def write(self, request, access):
            return Written(request.model(input_ids=request.ids).logits[0, -1:].argmax(-1).tolist(), 1)

    with pytest.raises(TypeError):
        Reaching().write(request(images=False), Access())
