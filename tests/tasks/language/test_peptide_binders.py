# SPDX-License-Identifier: Apache-2.0
"""Peptide binders: proteins alike, files of one's own, batches, what models may see, perplexities, new peptides."""

import math

import pytest
import torch

from manyheads.data import files
from manyheads.data.proteins import (
    ALPHABET,
    BEGIN,
    END,
    FIRST,
    MASK,
    VOCABULARY,
    likeness,
    read_pairs,
    read_protein,
)  # fmt: skip
from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks._blocks import Transformer
from manyheads.tasks.language._binding_task import Binders, residue_log_probs
from manyheads.tasks.language._residues import Continued, Masked, MaskedResidues, drawn
from manyheads.tasks.language.peptide_binders import PeptideBinders
from tolerance import SAME, error, is_close, is_far

PAIRS = """receptor,peptide,cluster
ACDEFGHIKL,WYV,a
ACDEFGHIKM,WYW,a
MNPQRSTVWY,AC,b
MMNNPPQQRR,ACU,c
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "pairs.csv").write_text(PAIRS)
    return PeptideBinders(folder=str(tmp_path), dim=16, layers=1, heads=2, batch=2)


def test_likeness_is_shared_words_over_all():
    (found,) = likeness(["ACDEFG"], ["ACDEFW", "DEFGHI", "WWWWWW"])  # words ACDE CDEF DEFG
    assert found == {0: pytest.approx(2 / 4), 1: pytest.approx(1 / 5)}
    assert likeness(["ACD"], ["ACDEFG"]) == [{}]


def test_files_of_ones_own(own, tmp_path):
    parts = {part: [s.group for s in own.samples(part)] for part in ("train", "validation", "test")}
    assert parts == {"train": ["a", "a"], "validation": ["b"], "test": ["test c"]}
    (tested,) = own.samples("test")
    assert tested.inputs == ("MMNNPPQQRR",) and tested.target == "ACX" and tested.about["near"] == 0.0
    fasta = tmp_path / "one.fasta"
    fasta.write_text(">sp|first\nacde\nFGB*\n>second\nWWWW\n")
    assert own.open(fasta).inputs == ("ACDEFGX",)
    fasta.write_text("ACDE FG\nHI")
    assert read_protein(fasta) == "ACDEFGHI"


@pytest.mark.parametrize(
    ("text", "says"), [("", "no protein"), (">only a head\n", "no protein"), ("ACD1", "no protein"), (None, "read")]
)
def test_a_file_that_is_no_protein(tmp_path, text, says):
    path = tmp_path / "x"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_protein(path)


@pytest.mark.parametrize(
    ("text", "says"), [("a,b\n1,2\n", "no columns"), ("receptor,peptide\n", "no rows"),
                       ("receptor,peptide\nAC,D\n,D\n", "line 3"), (None, "cannot be read")]
)  # fmt: skip
def test_a_table_that_will_not_do(tmp_path, text, says):
    path = tmp_path / "pairs.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_pairs(path)


def test_public_pairs_leave_out_proteins_that_are_judged():
    if any(files.local(name) is None for name in ("pepnn-train", "pepmlm-test")):
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    task = PeptideBinders()
    sizes = {part: len(task.samples(part)) for part in ("train", "validation", "test")}
    assert sizes["test"] == 203 and sizes["train"] > 2000 and sizes["validation"] > 200
    proteins = {part: {s.inputs[0] for s in task.samples(part)} for part in sizes}
    assert not proteins["train"] & proteins["test"] and not proteins["validation"] & proteins["test"]
    near = [sample.about["near"] for sample in task.samples("test")]
    assert 80 < sum(x < 0.3 for x in near) < 110 and max(near) < 1  # most of the authors' proteins are not new


def test_a_batch_is_protein_peptide_end(own):
    codes = {letter: FIRST + i for i, letter in enumerate(ALPHABET)}
    samples = [Sample("1", "", "test", ("ACD",), "WY"), Sample("2", "", "test", ("A",), "X")]
    batch = own.collate(samples)
    assert batch["tokens"].tolist() == [
        [BEGIN, *(codes[a] for a in "ACDWY"), END], [BEGIN, codes["A"], codes["X"], END, 0, 0, 0],
    ]  # fmt: skip
    assert batch["mask"].sum(1).tolist() == [7, 4] and batch["binder"].nonzero().tolist() == [[0, 4], [0, 5], [1, 2]]
    long = PeptideBinders(room=4, length=2).collate([Sample("1", "", "test", ("ACDEFGHI",))])
    assert long["tokens"].tolist() == [[BEGIN, *(codes[a] for a in "ACDE"), MASK, MASK, END]]  # the peptide is whole
    assert "targets" not in long and long["binder"].nonzero()[:, 1].tolist() == [5, 6]


def models():
    torch.manual_seed(0)
    masked = Masked(MaskedResidues([Transformer(16, 2, 32, 0.0)], 16))
    return {"masked": masked.double().eval(), "continued": Continued(16, 2, 2, 32, 0.0).double().eval()}


def some(protein="ACDEFGHI", peptide="WYVKL"):
    return PeptideBinders().collate([Sample("1", "", "test", (protein,), peptide)])


@torch.no_grad()
def test_what_is_asked_for_is_not_seen():
    made = models()
    right, other, protein = some(), some(peptide="WYAKL"), some(protein="ACDEFGHY")
    for name, model in made.items():
        before, after, far = (model.logits(batch)[0, 9:14] for batch in (right, other, protein))
        first = 5 if name == "masked" else 3  # from left to right, the places up to the one that differs
        assert is_close(before[:first], after[:first], SAME)
        assert name == "masked" or is_far(before[first:], after[first:], SAME)
        assert all(is_far(a, b, SAME) for a, b in zip(before, far, strict=True))  # control: the protein is seen
    inner = made["continued"].logits(right)[0, 1:9], made["continued"].logits(other)[0, 1:9]
    assert is_close(*inner, SAME)  # a protein does not see its peptide


@torch.no_grad()
def test_the_loss_is_the_formula():
    task = PeptideBinders()
    samples = [Sample("1", "", "test", ("ACDEFG",), "WY"), Sample("2", "", "test", ("MNP",), "KLAV")]
    batch = task.collate(samples)
    for model in models().values():
        logits = model.logits(batch)
        found = [
            math.log(float(logits[i, at].exp()[token] / logits[i, at].exp().sum()))
            for i, at in batch["binder"].nonzero().tolist()
            for token in [int(batch["tokens"][i, at])]
        ]
        assert is_close(task.loss(model, batch), torch.tensor(-sum(found) / 6), 1e-6)
        said = task.predict(model, batch)
        assert [len(one.log_probs) for one in said] == [2, 4]
        assert error(torch.tensor([x for one in said for x in one.log_probs]), torch.tensor(found)) <= 1e-6
        assert is_far(task.loss(model, {**batch, "binder": batch["mask"]}), torch.tensor(-sum(found) / 6), 1e-3)


class Counted(torch.nn.Module):
    """Says the same of every token, or what is right."""

    def __init__(self, right=None):
        super().__init__()
        self.right, self.seen = right, []

    def forward(self, tokens, mask):
        self.seen.append(tokens.clone())
        logits = torch.zeros(*tokens.shape, VOCABULARY, dtype=torch.float64)
        if self.right is not None:
            logits.scatter_(-1, self.right.expand_as(tokens)[..., None], 100.0)
        return logits


@torch.no_grad()
def test_perplexity_masks_one_residue_at_a_time():
    batch = some()
    even, sure = Counted(), Counted(batch["tokens"])
    assert Masked(even).perplexity(batch) == pytest.approx(VOCABULARY)
    assert Masked(sure).perplexity(batch) == pytest.approx(1.0)
    (seen,) = even.seen
    assert [(row == MASK).nonzero()[:, 0].tolist() for row in seen] == [[9], [10], [11], [12], [13]]
    model = models()["masked"]
    logs = []
    for place in batch["binder"][0].nonzero()[:, 0].tolist():
        tokens = batch["tokens"].clone()
        tokens[0, place] = MASK
        logs.append(float(model.read(tokens, batch["mask"])[0, place].log_softmax(-1)[batch["tokens"][0, place]]))
    assert model.perplexity(batch) == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-6)
    whole = residue_log_probs(model, batch)[batch["binder"]].mean()
    assert abs(math.exp(-float(whole)) - model.perplexity(batch)) > 1e-3  # all masked at once is another number


@torch.no_grad()
def test_new_peptides(own):
    for name, model in models().items():
        batch = own.collate([Sample("1", "", "test", ("ACDEFGHI",))])
        said = own.predict(model, batch)[0]
        assert 1 < len(said.peptides) <= own.tried and {len(one) for one in said.peptides} == {own.length}
        assert list(said.perplexities) == sorted(said.perplexities) and not set("".join(said.peptides)) & {"X"}
        assert str(own.predict(model, batch)[0]) == str(said)  # the same again
        model.top = 1
        (only,) = own.predict(model, batch)[0].peptides
        if name == "masked":
            best = model.logits(batch)[batch["binder"]][:, FIRST : VOCABULARY - 1].argmax(-1)
            assert only == "".join(ALPHABET[i] for i in best.tolist())


def test_scores_and_new_proteins(own):
    near, far = (Sample("1", "", "test", ("A",), "WY", {"near": x}) for x in (0.3, 0.29))
    said = Binders(peptide="WY", log_probs=(-1.0, -2.0))
    assert own.scores([near, far], [said, said]) == [{"nll": 1.5}, {"nll": 1.5, "far_nll": 1.5}]
    assert own.score(far, Binders(peptide="AA", log_probs=(0.0, 0.0)))["nll"] == pytest.approx(math.log(20))
    assert str(said) == f"WY, perplexity {math.exp(1.5):.2f}"
    (picture,) = own.pictures([near, far, near], [said, said, own.truth(near)])
    assert picture.values[0][1:3] == [1.5, 0.75] and math.isnan(picture.values[0][0])


@pytest.mark.parametrize("field", ["room", "length", "tried"])
def test_sizes_count(field):
    with pytest.raises(UserError, match="1 or more"):
        PeptideBinders(**{field: 0})


def test_residues_are_drawn_among_the_likeliest_by_their_probability():
    logits = torch.zeros(VOCABULARY, dtype=torch.float64)
    logits[FIRST + 2], logits[FIRST + 5], logits[FIRST + 7] = 3.0, 3.0 - math.log(3), 1.0
    logits[MASK], logits[-1] = 9.0, 9.0  # neither a mask nor X is a residue
    found = drawn(logits.expand(4000, -1), 2, torch.Generator().manual_seed(0)) - FIRST
    assert set(found.tolist()) == {2, 5} and abs((found == 2).double().mean() - 0.75) < 0.03
    assert 7 in drawn(logits.expand(4000, -1), 3, torch.Generator().manual_seed(0)) - FIRST


@torch.no_grad()
def test_perplexity_from_left_to_right_is_that_of_the_loss():
    model, batch, task = models()["continued"], some(), PeptideBinders()
    assert model.perplexity(batch) == pytest.approx(math.exp(float(task.loss(model, batch))), rel=1e-5)
    assert model.perplexity(some(peptide="WYAKL")) != pytest.approx(model.perplexity(batch), rel=1e-4)
