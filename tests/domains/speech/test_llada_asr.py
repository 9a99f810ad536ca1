# SPDX-License-Identifier: Apache-2.0
"""Whisper-LLaDA: windows of the Q-Former, the loss of hidden words, decoding by loops, what deliberation keeps."""

import math

import pytest
import torch

from manyheads.domains.speech.llada_asr import LLaDAASR, WindowQFormer, denoised, hidden_loss
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.speech.digit_transcripts import DigitTranscripts
from tolerance import DEEP, FORMULA, PROJECTED, is_close, is_far

B, R, ENDS = 5, 6, 10


class Table(torch.nn.Module):
    """A model whose opinion of each place depends on the words that stand, and is written out by a table."""

    room, ends, order, size = R, ENDS, "any", 7

    def __init__(self, quiet=3.0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.own = torch.randn(R, ENDS + 1, generator=g, dtype=torch.float64)
        self.own[:, ENDS] -= quiet  # ends are rare
        self.of_others = 0.7 * torch.randn(R, ENDS + 2, R, ENDS + 1, generator=g, dtype=torch.float64)
        self.of_sound = torch.randn(3, R, ENDS + 1, generator=g, dtype=torch.float64)
        self.calls = 0

    def forward(self, heard, words):
        self.calls += 1
        found = self.own + torch.einsum("bc,crv->brv", heard, self.of_sound)
        for place in range(R):
            found = found + self.of_others[place, words[:, place]]
        return found

    @staticmethod
    def texts(words):
        return [tuple(row) for row in words.tolist()]


def by_loops(model, heard, words, open_, steps, block):
    """Decoding of one row, as the paper says it: a list of words and a set of open places."""
    words = [ENDS + 1 if o else w for w, o in zip(words, open_, strict=True)]
    left, size = {i for i, o in enumerate(open_) if o}, block or R
    for first in range(0, R, size):
        mine = sorted(i for i in left if first <= i < first + size)
        turns = min(steps or R, len(mine))
        for turn in range(turns):
            count = math.ceil(len(mine) / (turns - turn))
            chances = model(heard[None], torch.tensor([words]))[0].softmax(-1)
            surest = sorted(mine, key=lambda i: (-float(chances[i].max()), i))[:count]
            for i in surest:
                words[i] = int(chances[i].argmax())
            mine = [i for i in mine if i not in surest]
        left -= set(range(first, first + size))
        if ENDS in words[: first + size]:
            end = words.index(ENDS)
            for i in [i for i in range(R) if i > end and open_[i]]:
                words[i] = ENDS
            break
    return words


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 3, generator=g, dtype=torch.float64), torch.randint(0, 10, (B, R), generator=g)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("block", [0, 2, 4])
@pytest.mark.parametrize("quiet", [3.0, -1.0])
def test_decoding_is_that_by_loops(case, steps, block, quiet):
    heard, words = case
    model = Table(quiet)
    everything = torch.ones(B, R, dtype=torch.bool)
    got = denoised(model, heard, words, everything, steps, block, ENDS)
    assert got.tolist() == [by_loops(model, heard[b], words[b].tolist(), [True] * R, steps, block) for b in range(B)]
    assert (got <= ENDS).all()


def test_schedules_write_different_words(case):
    """Control of the above: words hang on the order in which they are filled, and on what is heard."""
    heard, words = case
    everything, schedules = torch.ones(B, R, dtype=torch.bool), [(0, 0), (1, 0), (2, 0), (0, 2), (1, 2)]
    found = [denoised(Table(), heard, words, everything, *schedule, ENDS).tolist() for schedule in schedules]
    assert len({str(one) for one in found}) == len(schedules)
    assert denoised(Table(), heard.flip(0), words, everything, 0, 0, ENDS).tolist() != found[0]


def test_what_is_not_open_never_changes_and_one_block_is_none(case):
    heard, words = case
    model, open_ = Table(), torch.tensor([[True, False, True, False, False, True]] * B)
    got = denoised(model, heard, words, open_, 0, 0, ENDS)
    assert torch.equal(got[~open_], words[~open_]) and not torch.equal(got[open_], words[open_])
    assert torch.equal(denoised(model, heard, words, open_, 0, R, ENDS), got)
    assert torch.equal(denoised(model, heard, words, torch.zeros_like(open_), 0, 0, ENDS), words)
    single = [denoised(model, heard[b : b + 1], words[b : b + 1], open_[b : b + 1], 0, 0, ENDS) for b in range(B)]
    assert torch.equal(torch.cat(single), got)


def test_steps_are_counted(case):
    heard, words = case
    everything = torch.ones(B, R, dtype=torch.bool)
    for steps, calls in ((0, 6), (1, 1), (2, 2), (9, 6)):
        model = Table()
        got = denoised(model, heard, words, everything, steps, 0, ENDS)
        assert model.calls == calls
        if steps == 1:
            likeliest = model(heard, torch.full_like(words, ENDS + 1)).argmax(-1)
            ends = (likeliest == ENDS).cumsum(1) > 0
            assert torch.equal(got, likeliest.masked_fill(ends, ENDS))


def test_decoding_stops_at_an_end_and_leaves_what_is_not_open(case):
    heard, words = case
    early, everything = Table(), torch.ones(B, R, dtype=torch.bool)
    early.own[1, ENDS] += 1e3
    got = denoised(early, heard, words, everything, 0, 2, ENDS)
    assert early.calls == 2 and (got[:, 1:] == ENDS).all() and (got[:, 0] != ENDS).all()
    open_ = torch.tensor([[True, True, True, False, False, True]] * B)
    got = denoised(early, heard, words, open_, 0, 0, ENDS)
    assert (got[:, [1, 2, 5]] == ENDS).all() and torch.equal(got[~open_], words[~open_])


def test_a_row_is_hidden_by_a_share_of_its_own_and_what_is_not_heard_changes_nothing():
    class Kept(torch.nn.Module):
        ends = ENDS

        def forward(self, heard, words):
            self.heard, self.words = heard, words
            return torch.zeros(*words.shape, ENDS + 1)

    torch.manual_seed(0)
    model, targets = Kept(), torch.randint(0, 10, (2000, R))
    batch = {"inputs": torch.randn(2000, 3), "targets": targets}
    LLaDAASR().loss(None, model, batch)
    hidden = model.words == ENDS + 1
    assert torch.equal(model.words[~hidden], targets[~hidden]) and torch.equal(model.heard, batch["inputs"])
    counts = hidden.sum(1).bincount(minlength=R + 1) / 2000
    assert (counts - 1 / (R + 1)).abs().max() < 0.03  # of t ~ U(0, 1) any number of words is as likely
    one = (torch.rand(2000, R) < 0.5).sum(1).bincount(minlength=R + 1) / 2000  # control: of one share
    assert (one - 1 / (R + 1)).abs().max() > 0.1
    LLaDAASR(hear=False).loss(None, model, batch)
    assert model.heard.abs().max() == 0


def test_the_loss_is_of_hidden_words_alone():
    logits = torch.randn(B, R, 11, dtype=torch.float64, requires_grad=True)
    targets, hidden = torch.randint(0, 11, (B, R)), torch.rand(B, R) < 0.5
    loss = hidden_loss(logits, targets, hidden)
    loss.backward()
    each = [-float(logits[b, i].detach().softmax(-1)[targets[b, i]].log()) for b, i in hidden.nonzero().tolist()]
    assert float(loss.detach()) == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert logits.grad[~hidden].abs().max() == 0 < logits.grad[hidden].abs().min()
    assert hidden_loss(logits, targets, torch.zeros_like(hidden)) == 0


def run(recipe, model, heard, words):
    return torch.tensor(recipe.predict(None, model, {"inputs": heard, "hypotheses": lambda: words}))


def test_deliberation_hides_what_it_says(case):
    heard, words = case
    model = Table()
    for mode in ("random", "confidence"):
        assert torch.equal(run(LLaDAASR(deliberate=mode, ratio=0.0), model, heard, words), words)
        whole = run(LLaDAASR(), model, heard, words)
        assert torch.equal(run(LLaDAASR(deliberate=mode, ratio=1.0), model, heard, words), whole)
        chosen = LLaDAASR(deliberate=mode).chosen(model, heard, words)
        assert chosen.sum(1).tolist() == [2] * B  # 0.3 of 6
        changed = run(LLaDAASR(deliberate=mode), model, heard, words)
        assert torch.equal(changed[~chosen], words[~chosen])
    least = [
        sorted(range(R), key=lambda i: float(model(heard[b : b + 1], words[b : b + 1])[0].softmax(-1)[i, words[b, i]]))
        for b in range(B)
    ]
    chosen = LLaDAASR(deliberate="confidence").chosen(model, heard, words)
    assert [sorted(row.nonzero()[:, 0].tolist()) for row in chosen] == [sorted(row[:2]) for row in least]
    draws = LLaDAASR(deliberate="random").chosen(model, heard, words)
    assert not torch.equal(draws, chosen) and len({tuple(row.tolist()) for row in draws}) > 1
    assert torch.equal(LLaDAASR(deliberate="random").chosen(model, heard[2:3], words[2:3]), draws[2:3])


def test_chunks_are_written_back_one_after_the_other(case):
    heard, words = case
    model = Table(quiet=50.0)
    got = run(LLaDAASR(deliberate="semi", chunks=3), model, heard, words)
    for b in range(B):
        row = words[b].tolist()
        for first in (0, 2, 4):
            row = by_loops(model, heard[b], row, [first <= i < first + 2 for i in range(R)], 0, 0)
        assert got[b].tolist() == row
    assert torch.equal(
        run(LLaDAASR(deliberate="semi", chunks=1), model, heard, words), run(LLaDAASR(), model, heard, words)
    )
    assert not torch.equal(got, run(LLaDAASR(), model, heard, words))
    assert torch.equal(
        got, run(LLaDAASR(deliberate="semi", chunks=3, block=1), model, heard, words)
    )  # pieces are blocks
    deaf = LLaDAASR(deliberate="semi", hear=False)
    assert torch.equal(run(deaf, model, heard, words), run(LLaDAASR(deliberate="semi"), model, 0 * heard, words))


def attention(layer, x, y, heads, absent=None):
    """Multi-head attention of one window, ``x [q, D]`` to ``y [k, D]``, head by head."""
    dim, d = x.shape[-1], x.shape[-1] // heads
    w, b = layer.in_proj_weight.split(dim), layer.in_proj_bias.split(dim)
    q, k, v, parts = x @ w[0].T + b[0], y @ w[1].T + b[1], y @ w[2].T + b[2], []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[:, part] @ k[:, part].T / math.sqrt(d)
        parts.append(scores[:, :absent].softmax(-1) @ v[:absent, part])
    return torch.cat(parts, -1) @ layer.out_proj.weight.T + layer.out_proj.bias


def test_the_q_former_is_its_formula_and_windows_are_apart():
    torch.manual_seed(0)
    q = WindowQFormer(7, 8, 2, 5, 3, 2, 0.0).double().eval()
    with torch.no_grad():
        for p in q.parameters():
            p.normal_(std=0.4)
    x = torch.randn(2, 12, 7, dtype=torch.float64)
    got = q(x)
    assert got.shape == (2, 3 * 3, 8)
    frames = q.project(q.norm(x))
    for b in range(2):
        for window in range(3):
            y = frames[b, 5 * window : 5 * window + 5]  # two frames in the last
            z = q.queries
            for layer in q.layers:
                z = z + attention(layer.self_attn, layer.norm1(z), layer.norm1(z), 2)
                z = z + attention(layer.multihead_attn, layer.norm2(z), y, 2)
                z = z + layer.linear2(torch.nn.functional.gelu(layer.linear1(layer.norm3(z))))
            assert is_close(got[b, 3 * window : 3 * window + 3], z, DEEP)
    far = x.clone()
    far[:, 5:10] += 1
    changed = (q(far) != got).any(-1)[0]
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    padded = torch.cat((x, torch.zeros(2, 3, 7, dtype=torch.float64)), 1)
    assert is_far(q(padded), got, PROJECTED)  # control: silence that is there is heard, what fills up is not
    assert is_close(q(x[:1]), got[:1], FORMULA * 8)


def test_there_are_places_for_all_that_was_heard():
    task = DigitTranscripts(dim=8, layers=1, heads=2)
    for fields in ({}, {"window": 40, "queries": 8}, {"window": 160, "queries": 40}):
        model = LLaDAASR(**fields).build(task, 8)
        assert model(torch.randn(1, 160, 384), torch.zeros(1, R, dtype=torch.long)).shape == (1, R, ENDS + 1)
    with pytest.raises(UserError, match="5 queries in windows of 17 frames are 50 embeddings"):
        LLaDAASR(queries=5).build(task, 8)


@pytest.mark.parametrize("spec", ["llada_asr:steps=-1", "llada_asr:ratio=2", "llada_asr:deliberate=all",
                                  "llada_asr:window=0"])  # fmt: skip
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="llada_asr"):
        parse(spec)
    assert parse("llada_asr:deliberate=semi").chunks == 4
