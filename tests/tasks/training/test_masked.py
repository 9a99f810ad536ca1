# SPDX-License-Identifier: Apache-2.0
"""Encoders trained on hidden bytes: what is hidden, what is judged, records that are looked up, and who sees whom."""

import math

import pytest
import torch

from manyheads.call import MixerConfig
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.mixers.softmax import Softmax
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.models.encoder import Encoder
from manyheads.tasks.training._decoders import check_rows
from manyheads.tasks.training.encoder_speed import EncoderSpeed
from manyheads.tasks.training.masked_bytes import MASK, NOT_ASKED, MaskedBytes
from manyheads.tasks.training.masked_recall import MaskedRecall
from manyheads.training import masked_nll, masked_token_loss, train_lm
from tolerance import assert_close

from .conftest import MODEL, SOFTMAX, TEXT, context, values

LONGT5 = Arm("tglobal", "longt5_tglobal:radius=3,block=4")
RECORDS = {**TEXT, "length": 64}


def test_so_many_spans_are_hidden_and_nothing_else_is_asked(texts):
    task, run = MaskedBytes(**TEXT, share=0.25), context(texts)
    ids, labels = task.batches(run, 0)(3)
    plain, _ = super(MaskedBytes, task).batches(run, 0)(3)
    hidden = ids == MASK
    assert ids.shape == labels.shape == (task.batch, task.length)
    assert (hidden.sum(1) == task.length // 4).all()
    assert torch.equal(hidden, labels != NOT_ASKED) and torch.equal(labels[hidden], plain[:, :-1][hidden])
    assert torch.equal(ids[~hidden], plain[:, :-1][~hidden])
    spans = hidden.view(task.batch, -1, task.span)
    assert torch.equal(spans.any(2), spans.all(2))
    assert torch.equal(task.batches(run, 0)(3)[0], ids) and not torch.equal(task.batches(run, 1)(3)[0], ids)
    assert not torch.equal(hidden[0], hidden[1])


def test_the_loss_is_of_what_is_asked_for_alone():
    logits = torch.randn(2, 5, 9, requires_grad=True)
    labels = torch.tensor([[NOT_ASKED, 3, NOT_ASKED, 1, 0], [NOT_ASKED] * 4 + [8]])
    each = -logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    want = each[labels >= 0].mean()

    class Says(torch.nn.Module):
        def forward(self, ids):
            return logits[: len(ids)], [None]

    loss = masked_token_loss(Says(), (torch.zeros(2, 5, dtype=torch.long), labels))
    assert_close(loss, want)
    loss.backward()
    assert not logits.grad[labels < 0].any() and logits.grad[labels >= 0].ne(0).all()
    found = masked_nll(Says(), torch.zeros(2, 5, dtype=torch.long), labels)
    assert_close(found, each.detach().masked_fill(labels < 0, 0.0))


class Reads:
    """Stands for a model: it says a byte everywhere, and remembers what it was asked."""

    def __init__(self, vocab):
        self.vocab, self.seen = vocab, []

    def __call__(self, ids):
        self.seen.append(ids)
        return torch.zeros(*ids.shape, self.vocab), None


def test_the_same_bytes_are_judged_however_much_is_read(texts):
    task, run = MaskedBytes(**TEXT, times=(1, 2, 4)), context(texts)
    model = Reads(task.vocab)
    rows = list(task.rows(run, SOFTMAX, 0, model))
    assert {row.at["times"] for row in rows} == {1, 2, 4} and len(rows) == 3 * task.samples
    assert all(row.value == pytest.approx(math.log(task.vocab)) for row in rows)
    short, middle, long = model.seen
    assert [x.shape[1] for x in model.seen] == [32, 64, 128]
    assert torch.equal(long[:, 48:80], short) and torch.equal(long[:, 32:96], middle)
    hidden = round(task.share * (task.length // task.span)) * task.span
    assert ((short == MASK).sum(1) == hidden).all()
    assert (long[:, :48] == MASK).any() and (long[:, 80:] == MASK).any()  # as in training


@pytest.mark.parametrize("where", ["near", "far"])
def test_records_and_questions(where):
    task = MaskedRecall(**RECORDS)
    text = torch.randint(256, (50, 64), generator=torch.Generator().manual_seed(0))
    far = torch.full((50, task.records), where == "far")
    ids, labels = task.recorded(text, torch.full_like(text, NOT_ASKED), torch.Generator().manual_seed(1), far)
    first, place = MASK + 1, 64 // 4 // task.records
    for row, asked, plain in zip(ids, labels, text, strict=True):
        records = (row >= first + task.keys).nonzero()[:, 0]
        questions = ((row >= first) & (row < first + task.keys)).nonzero()[:, 0]
        assert len(records) == len(questions) == task.records and records.max() < 16
        assert torch.equal(asked.ge(0).nonzero()[:, 0], questions)
        key_of = {(int(row[i]) - first - task.keys) // task.values: i for i in records.tolist()}
        assert len(key_of) == task.records
        for at in questions.tolist():
            record = key_of[int(row[at]) - first]
            assert int(asked[at]) == int(row[record])
            if where == "far":
                assert at >= 48 and at - record > 32
            else:
                assert at // place == record // place
        rest = row < first
        assert torch.equal(row[rest], plain[rest])


class LooksUp(Reads):
    """Says for a question the record of its key that stands in reach, or one of another key; else byte 0."""

    def __init__(self, task, reach, right=True):
        super().__init__(task.vocab)
        self.task, self.reach, self.right = task, reach, right

    def __call__(self, ids):
        said, first = torch.zeros(*ids.shape, self.vocab), MASK + 1
        for row, out in zip(ids, said, strict=True):
            records = (row >= first + self.task.keys).nonzero()[:, 0].tolist()
            for at in ((row >= first) & (row < first + self.task.keys)).nonzero()[:, 0].tolist():
                for i in records:
                    same = (int(row[i]) - first - self.task.keys) // self.task.values == int(row[at]) - first
                    if same == self.right and abs(at - i) < self.reach:
                        out[at, int(row[i])] = 30.0
        return said, None


def test_who_sees_far_recalls_far(texts):
    task, run = MaskedRecall(**RECORDS, times=(1, 2)), context(texts)

    def share(model):
        rows = [row for row in task.rows(run, SOFTMAX, 0, model) if row.metric == "recalled"]
        assert len(rows) == 4 * task.samples
        found = {}
        for row in rows:
            found.setdefault((row.at["times"], row.at["where"]), []).append(row.value)
        return {at: sum(x) / len(x) for at, x in found.items()}

    assert set(share(LooksUp(task, 999)).values()) == {1.0}
    assert share(LooksUp(task, 30)) == {(1, "near"): 1.0, (2, "near"): 1.0, (1, "far"): 0.0, (2, "far"): 0.0}
    assert max(share(LooksUp(task, 999, right=False)).values()) == 0.0


def test_encoders_are_trained_kept_and_timed(measured, tmp_path):
    tasks = (MaskedRecall(**RECORDS, times=(1, 2)), EncoderSpeed(**MODEL, length=16, times=(1, 2), tokens=64, rounds=1))
    results = measured(*tasks, arms=(SOFTMAX, LONGT5), seeds=2)
    losses = values(results, "masked_nll")
    assert len(losses) == 2 * 2 * 2 * TEXT["samples"] and all(math.isfinite(row[-1]) for row in losses)
    assert {(row.arm, row.at["times"]) for row in results.rows if row.metric == "token_time"} == {
        (arm, times) for arm in ("softmax", "tglobal") for times in (1, 2)
    }
    held = [row.about["parameters"] for row in results.rows if row.metric == "training_nll"]
    assert max(held) <= 1.04 * min(held)
    orders = {(row.seed, row.about["order"]) for row in results.rows if row.metric == "training_nll"}
    assert len(orders) == 2  # arms read the same
    model = Encoder.load(tmp_path / "run" / "models" / "tglobal" / "records-seed-0")
    assert model.strategy.spec == LONGT5.spec


def test_an_encoder_learns_what_only_the_other_side_tells():
    """What is hidden stands again behind it, which a decoder does not see."""
    generator = torch.Generator().manual_seed(0)

    def batch(step):
        ids = torch.randint(4, (32, 8), generator=generator)
        ids[:, 1] = ids[:, 2]
        labels = torch.full_like(ids, NOT_ASKED)
        labels[:, 1] = ids[:, 1]
        return ids.index_fill(1, torch.tensor([1]), 4), labels

    def trained(kind):
        torch.manual_seed(0)
        model = kind("softmax:position=t5", DecoderConfig(5, 32, 1, 2, length=8))
        return train_lm(model, batch, 250, lr=1e-2, loss=masked_token_loss).losses[-1]

    assert trained(Encoder) < math.log(4) / 4
    assert trained(Decoder) > 0.9 * math.log(4)  # control


def test_rows_that_see_each_other_are_found():
    model = Encoder("softmax", DecoderConfig(257, **MODEL, length=16))
    ids = torch.randint(256, (2, 16))
    check_rows(model, ids, "softmax")

    class Mixed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, **given):
            y, state = self.inner(x, **given)
            return y + y.mean(0, keepdim=True), state

    model.blocks[0].mixer = Mixed(Softmax().build(MixerConfig(16, 2, 2, 8, 0, 1, 16, False)))
    with pytest.raises(UserError, match="see each other"):
        check_rows(model, ids, "mixed")

    class Tips(Mixed):
        """What rounding may do to the rows beside: gone in float64."""

        def forward(self, x, **given):
            y, state = self.inner(x, **given)
            return (y + 1e-2 * y.mean(0, keepdim=True) if y.dtype == torch.float32 else y), state

    model.blocks[0].mixer = Tips(model.blocks[0].mixer.inner)
    check_rows(model, ids, "tips")


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (MaskedBytes, {"share": 0.0}, "share"), (MaskedBytes, {"span": 40}, "spans"),
        (MaskedBytes, {"batch": 1}, "batch"),
        (MaskedBytes, {"reach": 2}, "reach"), (MaskedRecall, {"records": 3}, "four"),
        (MaskedRecall, {"records": 8, "length": 60}, "64 bytes"),
    ],
)  # fmt: skip
def test_errors(kind, wrong, says):
    with pytest.raises(UserError, match=says):
        kind(**{**RECORDS, **wrong})
