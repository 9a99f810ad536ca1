# SPDX-License-Identifier: Apache-2.0
"""pepmlm: what is masked, what the model is given of a protein, learning proteins before; counts of amino acids."""

import math

import numpy as np
import pytest
import torch

from manyheads.data.proteins import ALPHABET, BEGIN, END, FIRST, MASK
from manyheads.domains.language.pepmlm import PepMLM, corrupted, exchanged
from manyheads.domains.language.peptide_counts import PeptideCounts
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.recipe import Sample
from manyheads.tasks._field_training import FieldTraining
from manyheads.tasks.language.peptide_binders import PeptideBinders
from tolerance import SAME, is_close, is_far

PAIRS = "receptor,peptide,cluster\nACDEFGHIKL,WWV,a\nMNPQRSTVWY,AC,b\nKLMNPPQQRR,WA,c\nACDEFGHIKM,VW,d\n"


@pytest.fixture
def task(tmp_path):
    (tmp_path / "pairs.csv").write_text(PAIRS)
    return PeptideBinders(folder=str(tmp_path), dim=16, layers=1, heads=2, batch=2, steps=2, rates=(1e-2,), dropout=0.0)


def batch_of(task, *pairs):
    return task.collate([Sample(str(i), "", "test", (a,), b) for i, (a, b) in enumerate(pairs)])


def built(task, **fields):
    torch.manual_seed(0)
    recipe = PepMLM(**fields)
    return recipe, recipe.build(task, 32).double().eval()


@torch.no_grad()
def test_the_whole_peptide_is_masked_and_nothing_else(task, monkeypatch):
    recipe, model = built(task)
    batch, seen = batch_of(task, ("ACDEF", "WYV"), ("MN", "KL")), []
    read = model.read.forward
    monkeypatch.setattr(model.read, "forward", lambda tokens, mask: seen.append(tokens) or read(tokens, mask))
    loss = recipe.loss(task, model, batch)
    (tokens,) = seen
    assert torch.equal(tokens == MASK, batch["binder"])
    assert torch.equal(tokens[~batch["binder"]], batch["tokens"][~batch["binder"]])
    logs = read(tokens, batch["mask"]).log_softmax(-1)
    own = [float(logs[i, j, batch["tokens"][i, j]]) for i, j in batch["binder"].nonzero().tolist()]
    assert is_close(loss, torch.tensor(-sum(own) / 5), 1e-6)
    assert is_far(recipe.loss(task, model, batch_of(task, ("ACDEF", "WYA"), ("MN", "KL"))), loss, 1e-6)


@torch.no_grad()
def test_what_is_given_of_a_protein(task):
    pairs = ("ACDEF", "WYV"), ("MN", "KL")
    batch, other = batch_of(task, *pairs), batch_of(task, ("GGGGG", "WYV"), ("HH", "KL"))
    for receptor in ("own", "none", "other"):
        recipe, model = built(task, receptor=receptor)
        one, two = ([said.log_probs for said in recipe.predict(task, model, x)] for x in (batch, other))
        same = all(is_close(torch.tensor(a), torch.tensor(b), SAME) for a, b in zip(one, two, strict=True))
        assert same == (receptor == "none")
        swapped = batch_of(task, ("MN", "WYV"), ("ACDEF", "KL"))
        theirs = built(task)[0].predict(task, model, swapped)
        if receptor == "other":
            assert all(
                is_close(torch.tensor(a), torch.tensor(b.log_probs), SAME) for a, b in zip(one, theirs, strict=True)
            )


def test_rows_without_a_protein_and_with_another(task):
    codes = {letter: FIRST + i for i, letter in enumerate(ALPHABET)}
    batch = batch_of(task, ("ACDEF", "WYV"), ("MN", "KL"))
    alone, changed = PepMLM(receptor="none")._given(batch), exchanged(batch)
    assert alone["tokens"].tolist() == [
        [BEGIN, *(codes[a] for a in "WYV"), END], [BEGIN, *(codes[a] for a in "KL"), END, 0],
    ]  # fmt: skip
    assert alone["binder"].sum(1).tolist() == [3, 2] and alone["mask"].sum(1).tolist() == [5, 4]
    assert changed["tokens"].tolist() == [
        [BEGIN, *(codes[a] for a in "MNWYV"), END, 0, 0], [BEGIN, *(codes[a] for a in "ACDEFKL"), END],
    ]  # fmt: skip
    assert changed["binder"].nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 6], [1, 7]]


def test_masks_anywhere_are_one_in_seven():
    torch.manual_seed(0)
    tokens = torch.full((100, 200), FIRST + 3)
    there = torch.arange(200) < 150
    given, asked = corrupted(tokens, there.expand_as(tokens))
    assert not asked[:, 150:].any() and abs(asked[:, :150].double().mean() - 0.15) < 0.01
    assert torch.equal(given[~asked], tokens[~asked])
    kinds = [(given[asked] == MASK), (given[asked] == FIRST + 3)]
    assert abs(kinds[0].double().mean() - 0.8) < 0.02 and abs(kinds[1].double().mean() - 0.105) < 0.02
    assert corrupted(tokens[:1, :2], there[None, :2])[1].any()  # one at least


def test_proteins_are_learned_before_and_peptides_are_not(task, tmp_path):
    def started(before, peptides="WWV"):
        (tmp_path / "pairs.csv").write_text(PAIRS.replace("WWV", peptides))
        folder = tmp_path / f"{peptides}"
        folder.mkdir(exist_ok=True)
        (folder / "pairs.csv").write_text(PAIRS.replace("WWV", peptides))
        own = PeptideBinders(folder=str(folder), dim=16, layers=1, heads=2, batch=2, steps=2, rates=(1e-2,))
        recipe, fits = PepMLM(before=before), []
        torch.manual_seed(0)
        model = recipe.build(own, 32)
        first = torch.cat([x.detach().flatten() for x in model.parameters()])

        def fit(module, batches, loss, steps):
            fits.append(steps)
            torch.manual_seed(1)
            loss(module, batches(np.random.default_rng(0))).backward()
            with torch.no_grad():
                for x in module.parameters():
                    x -= 0.1 * (x.grad if x.grad is not None else 0)

        recipe.start(own, model, fit)
        return fits, first, torch.cat([x.detach().flatten() for x in model.parameters()])

    fits, first, after = started(1.5)
    assert fits == [3] and not torch.equal(first, after)
    assert torch.equal(started(1.5, "AAA")[2], after)  # another peptide teaches nothing else
    fits, first, after = started(0.0)
    assert fits == [] and torch.equal(first, after)


def test_other_weights_are_judged_with_another_protein(task):
    arms = (Arm("PepMLM", "pepmlm"), Arm("other", "pepmlm:receptor=other", options={"weights_of": "PepMLM"}))
    run = RunContext(Trainable(), arms, device=torch.device("cpu"))
    rows = [row for unit in task.units(run) for row in task.measure(run, unit) if row.metric == "nll"]
    assert {row.arm for row in rows} == {"PepMLM", "other"}
    assert FieldTraining(task, run, arms[0]).model(0).recipe == arms[0].strategy


def test_counts_of_amino_acids(task):
    rows = list(PeptideCounts(of="all").run(task, np.random.default_rng(0)))
    trained, (tested,) = task.samples("train"), task.samples("test")
    letters = "".join(sample.target for sample in trained)

    def share(text, letter, more):
        return (text.count(letter) + more) / (len(text) + more * 21)

    want = -np.mean([math.log(share(letters, letter, 1)) for letter in tested.target])
    assert rows[0][:2] == ("nll", tested.name)
    assert rows[0][2] == pytest.approx(want)
    near = next(iter(PeptideCounts(of="near").run(task, np.random.default_rng(0))))[2]
    alike = "".join(sample.target for sample in trained if sample.inputs[0].startswith("ACDEFGHIK"))
    mixed = [0.6 * share(letters, letter, 1) + 0.4 * share(alike, letter, 0) for letter in tested.target]
    assert near == pytest.approx(-np.mean(np.log(mixed))) and near != pytest.approx(want)
    with pytest.raises(UserError, match="no peptides"):
        list(PeptideCounts().run(object.__new__(type("T", (), {"name": "x"})), np.random.default_rng(0)))
