# SPDX-License-Identifier: Apache-2.0
"""Encoders of pages trained on forms, what they cost, and a published encoder that reads forms under a mask."""

import pytest
import torch
from torch import nn

from manyheads.data.forms import LABELS, ORDERS, stacked
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.mixers.skim_attention import SkimmingMask
from manyheads.models.page import PageConfig, PageEncoder
from manyheads.tasks.training._decoders import check_rows
from manyheads.tasks.training.classifier_cost import kept_bytes, products
from manyheads.tasks.training.form_labels import VALUE, FormLabels, judged_forms
from manyheads.tasks.training.form_reader import FormReader, _probe
from manyheads.tasks.training.page_cost import PageCost
from tolerance import SAME, assert_close, is_far

from .conftest import SOFTMAX, context, values

SMALL = {"dim": 32, "layers": 2, "heads": 2, "length": 40, "batch": 2, "steps": 3, "samples": 8, "rates": (3e-3,)}
SKIM = Arm("skim", "skim_attention:resolution=20")


def test_training_draws_new_forms_and_judging_its_own():
    task, run = FormLabels(**SMALL), context([])
    get_batch = task.batches(run, 0)
    ids, labels = get_batch(3)
    assert ids.shape == (2, 40, 5) and labels.shape == (2, 40)
    assert torch.equal(get_batch(3)[0], ids) and not torch.equal(get_batch(4)[0], ids)
    assert not torch.equal(task.batches(run, 1)(3)[0], ids)
    parts = {part: judged_forms(run, part, 8, 40) for part in ("validation", "test")}
    assert [form.order for form in parts["test"]] == 2 * list(ORDERS)
    read = {form.words for part in parts.values() for form in part}
    assert len(read) == 16
    for step in range(40):
        assert not read & {tuple(row) for row in get_batch(step)[0][..., 0].tolist()}


class Knows(nn.Module):
    """Stands for a model: right about the words of judged forms, but for the values where it is told so."""

    def __init__(self, run, values):
        super().__init__()
        forms = judged_forms(run, "test", 8, 40)
        self.pages, self.labels, self.values = stacked(forms), torch.stack([f.labels for f in forms]), values

    def forward(self, ids):
        labels = torch.stack([self.labels[(self.pages == page).flatten(1).all(1)][0] for page in ids])
        said = labels if self.values else torch.where(labels >= VALUE, VALUE + (labels - VALUE + 1) % 4, labels)
        return 30.0 * nn.functional.one_hot(said, len(LABELS)), None


def test_what_is_judged():
    task, run = FormLabels(**SMALL), context([])
    right, wrong = (list(task.rows(run, SOFTMAX, 0, Knows(run, values))) for values in (True, False))
    assert {row.value for row in right} == {1.0} and len(right) == 16
    forms = judged_forms(run, "test", 8, 40)
    for row in wrong:
        form = forms[int(row.sample)]
        assert row.at["order"] == form.order
        share = float((form.labels < VALUE).float().mean()) if row.metric == "accuracy" else 0.0
        assert row.value == pytest.approx(share)
    assert task.metric("value_accuracy").floor == 0.25 and 0.5 < task.metric("accuracy").floor < 0.6
    assert task.validation(run, PageEncoder("softmax", task.config)) == pytest.approx(1.95, abs=0.2)  # ln 7


def test_arms_are_trained_alike(measured):
    arms = (SOFTMAX, SKIM, Arm("sum", "skim_attention.embeddings:resolution=20"))
    results = measured(FormLabels(**SMALL), arms=arms, seeds=2)
    found = values(results, "value_accuracy")
    assert len(found) == 3 * 2 * 8
    trained = [row for row in results.rows if row.metric == "training_nll"]
    assert len({(row.seed, row.about["order"]) for row in trained}) == 2
    sizes = [row.about["parameters"] for row in trained]
    assert max(sizes) <= 1.02 * min(sizes)


class Leaks(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, ids):
        y, _ = self.inner(ids)
        return y + 1e-3 * y.mean(0, keepdim=True), None


def test_who_sees_other_pages_is_refused():
    task = FormLabels(**SMALL)
    model, rows = PageEncoder("skim_attention", task.config), task.batches(context([]), 0)(0)[0]
    check_rows(model, rows, "skim")
    with pytest.raises(UserError, match="see each other"):
        check_rows(Leaks(model), rows, "leaks")


def test_one_map_costs_fewer_products_and_is_kept_once():
    """A map is T x T products of queries and keys for every head, and stays for the backward."""
    n, d, task = 64, 32, PageCost(dim=32, layers=4, heads=2, length=64)
    config = PageConfig(256, d, 4, 2, hidden=24, length=n, labels=2)
    ids = task.read(torch.randint(256, (1, n)))
    assert (
        ids.shape == (1, n, 5) and ids[..., 1:].max() <= 1000 and len({tuple(b) for b in ids[0, :, 1:].tolist()}) == n
    )
    shared, each, text = (
        PageEncoder(spec, config) for spec in ("skim_attention", "skim_attention:shared=false", "softmax:position=none")
    )
    a_map, more = 2 * n * n * d + 4 * n * d * d, (products(m, ids) for m in (shared, each, text))
    one, four, of_text = more
    assert four - one == 3 * a_map and of_text == four
    kept = [kept_bytes(model, ids) for model in (shared, each)]
    assert kept[1] - kept[0] > 3 * 4 * 2 * n * n  # three maps of two heads in float32


class Tokens:
    """A tokenizer of pieces: every word is its number, long ones are two."""

    def __call__(self, rows, **_):
        cut = [[(5 + len(w) + k, i) for i, w in enumerate(row) for k in range(1 + (len(w) > 5))] for row in rows]
        pieces = [[(1, None), *row, (2, None)] for row in cut]
        longest = max(map(len, pieces))
        read = [row + [(0, None)] * (longest - len(row)) for row in pieces]
        made = Read(input_ids=torch.tensor([[piece for piece, _ in row] for row in read]))
        made["attention_mask"] = (made["input_ids"] > 0).long()
        made.words = [[word for _, word in row] for row in read]
        return made


class Read(dict):
    def word_ids(self, i):
        return self.words[i]


@pytest.fixture
def reading():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16,
        max_position_embeddings=90, initializer_range=0.3,
    )  # fmt: skip
    arms = (SOFTMAX, SKIM, *(Arm(f"bert, {by}", "softmax", options={"mask": by, "map_of": "skim"})
                             for by in ("full", "skim", "nearest")))  # fmt: skip
    run = RunContext(Trainable(), arms)
    run.kept(("reader", "tiny"), lambda: (BertModel(config).eval(), Tokens()))
    return FormReader(**SMALL, model="tiny", top_k=4, fitted=8), run


def test_an_encoder_reads_under_the_mask_of_its_arm(reading, monkeypatch):
    task, run = reading
    bound, inner = [], SkimmingMask.on_pages
    monkeypatch.setattr(SkimmingMask, "on_pages", lambda s, b, m=None: bound.append((s.by, b, m)) or inner(s, b, m))
    assert [unit.name for unit in task.units(run)] == ["bert, full/0", "bert, skim/0", "bert, nearest/0"]
    assert [arm.name for arm in task.trained_arms(run)] == ["skim"]
    rows = {unit.name: list(task.measure(run, unit)) for unit in task.units(run)}
    assert all(
        len(found) == 16 and {row.metric for row in found} == {"probed", "value_probed"} for found in rows.values()
    )
    assert {by for by, _, _ in bound} == {"skim", "nearest"} and all(
        (m is None) == (by != "skim") for by, _, m in bound
    )
    form, boxes = judged_forms(run, "probe 0", 8, 40)[0], bound[0][1][0]
    pieces = [i for i, word in enumerate(form.words) for _ in range(1 + (len(word) > 5))]
    assert torch.equal(boxes[1 : 1 + len(pieces)], form.boxes[pieces]) and not boxes[0].any()
    plain = RunContext(Trainable(), (SOFTMAX, SKIM))  # arms of a comparison: the encoder as it is, and under the map
    assert [unit.params["arm"] for unit in task.units(plain)] == ["softmax", "skim"]
    assert [task._by(arm) for arm in plain.arms] == ["full", "skim"]


def test_the_state_of_a_word_is_the_mean_of_its_pieces(reading):
    task, run = reading
    forms = judged_forms(run, "test", 8, 40)[:1]
    model, tokenizer = run.kept(("reader", "tiny"), None)
    read = tokenizer([list(forms[0].words)])
    with torch.no_grad():
        states = model(**read).last_hidden_state[0]
    got = task._states(run, run.arms[2], forms, None, 0)[0]
    for i in range(40):
        of = [j for j, word in enumerate(read.words[0]) if word == i]
        assert_close(got[i], states[of].mean(0), SAME)
    assert is_far(got[0], states[0], SAME)  # control: a special token's


def test_a_probe_finds_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = {
        part: torch.randint(len(LABELS), (12, 40), generator=generator) for part in ("probe", "validation", "test")
    }
    told = {part: nn.functional.one_hot(x, 10).float() + 0.1 * torch.randn(12, 40, 10, generator=generator)
            for part, x in labels.items()}  # fmt: skip
    assert (_probe(told, labels) == labels["test"]).float().mean() > 0.99
    noise = {part: torch.randn(12, 40, 10, generator=generator) for part in labels}
    assert (_probe(noise, labels) == labels["test"]).float().mean() < 0.25


def test_what_is_refused():
    for wrong, says in (({"batch": 1}, "batch of 2"), ({"samples": 6}, "as many forms")):
        with pytest.raises(UserError, match=says):
            FormLabels(**{**SMALL, **wrong})
