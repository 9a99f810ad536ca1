# SPDX-License-Identifier: Apache-2.0
"""Resisting strategies: the public dialogues and one's own, folds, scores by scikit-learn, baselines, the outcome."""

import dataclasses
from statistics import mean

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from manyheads.data import files, persuasion
from manyheads.data.persuasion import NONE, Dialogue, Turn, negotiations, persuasions, read_dialogue
from manyheads.domains.language.turn_classes import TurnClasses
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.tasks._folds import PARTS
from manyheads.tasks.language import _turns, persuasion_outcome, resisting_strategies
from manyheads.tasks.language.persuasion_outcome import PersuasionOutcome
from manyheads.tasks.language.resisting_strategies import ResistingStrategies
from oracles import tasks
from tiny.labelled_dialogues import dialogues, rows, write
from tolerance import SAME, is_close, is_far

__all__ = ["dialogues"]


def needs(name):
    if files.local(name) is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")


def counts(found):
    labels = [turn.label for one in found for turn in one.turns]
    return len(found), len(labels), {label: labels.count(label) for label in set(labels)}


def test_dialogues_of_persuasion():
    needs("resper-persuasion")
    found = persuasions()
    dialogues, turns, labels = counts(found)
    assert (dialogues, turns, labels[NONE], labels["hesitance"], labels[""]) == (288, 10392, 3499, 35, 5754)
    assert len(labels) == 11 and all((turn.label != "") == turn.own for one in found for turn in one.turns)
    needs("resper-donations")
    assert sum(persuasion.donated()[one.name] for one in found) == 144


def test_copies_of_negotiations_are_left_out(monkeypatch):
    needs("resper-negotiation")
    dialogues, turns, labels = counts(negotiations())
    assert (dialogues, turns, labels["hesitance"], labels["self-pity"], len(labels)) == (719, 8592, 1200, 239, 8)
    text = files.text("resper-negotiation")
    monkeypatch.setattr(files, "text", lambda name: text.replace("Dupe", "dupe"))
    assert counts(negotiations())[:2] == (729, 9236)  # control: with them


def test_who_says_the_commonest_label_of_all(dialogues):
    """Three quarters of the persuadee's turns are no strategy: an accuracy of 0.75 is nothing."""
    needs("resper-persuasion")
    task, told, true = ResistingStrategies(words="learned"), [], []
    for fold in range(10):
        part = dataclasses.replace(task, fold=fold)
        samples = part.judged("test")
        said = TurnClasses(by="prior").said(part, samples)
        found = part.scores(samples, said)
        true += [label for s in samples for label in s.target if label]
        told += [part.classes[k] for s in said for k, own in zip(s.labels, s.own, strict=True) if own]
        assert set(told) == {NONE} and mean(one["f1_self_pity"] for one in found) == pytest.approx(0)
    assert accuracy_score(true, told) == pytest.approx(0.754, abs=5e-4)
    assert f1_score(true, told, average="macro") == pytest.approx(0.086, abs=5e-4)


def test_folds_share_no_dialogue(dialogues):
    tested = []
    for fold in range(10):
        task = dataclasses.replace(dialogues, fold=fold)
        held = {part: {sample.group for sample in task.samples(part)} for part in PARTS}
        assert sum(map(len, held.values())) == 12 == len(set.union(*held.values()))
        assert {s.part for part in PARTS for s in task.samples(part)} == set(PARTS)
        tested += sorted(held["test"])
        following = dataclasses.replace(dialogues, fold=fold + 1).samples("test")
        assert held["validation"] == {sample.group for sample in following} and not held["test"] & held["validation"]
    assert sorted(tested) == sorted(f"d{n}" for n in range(12))


def test_scores_are_those_of_scikit_learn(dialogues):
    samples, rng = dialogues.samples("train"), np.random.default_rng(0)
    said = [
        dataclasses.replace(dialogues.truth(s), log_probs=torch.from_numpy(rng.normal(size=(len(s.inputs), 3))))
        for s in samples
    ]
    found = dialogues.scores(samples, said)
    pairs = [
        (label, dialogues.classes[told])
        for s, one in zip(samples, said, strict=True) for label, told in zip(s.target, one.labels, strict=True) if label
    ]  # fmt: skip
    true, told = zip(*pairs, strict=True)

    def of_all(name):
        return mean(one[name] for one in found)

    f1 = f1_score(true, told, average=None, labels=dialogues.classes)
    assert is_close(of_all("macro_f1"), f1.mean(), SAME) and is_close(
        of_all("accuracy"), accuracy_score(true, told), SAME
    )
    each = [of_all(f"f1_{name.replace('-', '_')}") for name in dialogues.classes]
    assert is_close(each, f1, SAME)
    alone = mean(dialogues.score(s, one)["macro_f1"] for s, one in zip(samples, said, strict=True))
    assert is_far(alone, f1.mean(), SAME)  # a mean of dialogues' own figures is another
    # What a dialogue adds: without it the figure moves by its part, to first order.
    values, n = np.array([one["accuracy"] for one in found]), len(found)
    turns = np.array([sum(map(bool, s.target)) for s in samples])
    names = [[dialogues.classes[k] for k in one.labels] for one in said]
    right = np.array([sum(map(str.__eq__, s.target, one)) for s, one in zip(samples, names, strict=True)])
    share = right.sum() / turns.sum()
    assert is_close(values - share, (right - share * turns) * n / turns.sum(), SAME)
    names = [metric.name for metric in dialogues.stated]
    assert names[2:-2] == ["f1_hesitance", "f1_not_a_strategy", "f1_organization_inquiry"]
    assert set(found[0]) == set(names[:-2])
    confusion, scores = dialogues.pictures(samples, said)
    assert is_close([row[2] for row in scores.values], f1, SAME)
    assert all(abs(sum(row) - 1) < 1e-9 for row in confusion.values)


def test_a_batch_has_labels_of_own_turns_alone(dialogues):
    samples = dialogues.samples("train")[:3]
    batch = dialogues.collate(samples)
    assert batch["mask"].sum(1).tolist() == [len(s.inputs) for s in samples]
    for row, own, sample in zip(batch["targets"], batch["own"], samples, strict=True):
        want = [dialogues.classes.index(label) if label else -1 for label in sample.target]
        assert row[: len(want)].tolist() == want and set(row[len(want) :].tolist()) <= {-1}
        assert own[: len(want)].tolist() == [label >= 0 for label in want]
    known = _turns.vocabulary(tuple(dialogues.samples("train")))
    assert 0 not in known.values() and known["children"] == batch["words"][batch["words"] == known["children"]][0]
    ids = _turns.word_ids(known, "Children! of nowhere", 2)
    assert ids.tolist() == [known["children"], 0] and _turns.word_ids(known, "", 2).tolist() == [0]


def test_words_of_a_published_encoder(dialogues, monkeypatch):
    """States are made turn by turn, whatever stands beside them; those of learned words need no encoder."""

    def reader(name):
        def tokenizer(texts, max_length, **more):
            lengths = torch.tensor([min(len(text.split()), max_length) for text in texts])
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()

            class Given(dict):
                def to(self, device):
                    return self

            codes = torch.tensor([[len(text)] for text in texts]).expand(-1, mask.shape[1])
            return Given(attention_mask=mask, input_ids=codes)

        class Model:
            device = "cpu"
            config = type("C", (), {"hidden_size": 4})

            def __call__(self, input_ids, attention_mask):
                states = input_ids[..., None] + torch.arange(4.0)
                return type("O", (), {"last_hidden_state": states * attention_mask[..., None]})

        return Model(), tokenizer

    monkeypatch.setattr(_turns, "_reader", reader)
    _turns.word_states.cache_clear()
    texts = ("one", "two more words", "a b c d e f g", *["x y"] * 12)
    found = _turns.word_states("made", texts, 5)
    assert [len(one) for one in found] == [1, 3, 5, *[2] * 12]
    assert all(
        torch.equal(one[0].float(), len(text) + torch.arange(4.0)) for one, text in zip(found, texts, strict=True)
    )
    task = dataclasses.replace(dialogues, words="made")
    model, batch = task.reference(4), task.collate(task.samples("train")[:2])
    assert batch["words"].shape[-1] == 4 and batch["words"].dtype == torch.float16
    assert model(batch).shape == (*batch["mask"].shape, 3)
    rows = task.meanings(task.samples("train")[:2])
    assert rows.shape == (int(batch["own"].sum()), 4)
    sample = task.samples("train")[0]
    first = next(text for text, own in zip(sample.inputs, sample.about["own"], strict=True) if own)
    assert torch.equal(rows[0], len(first) + torch.arange(4.0))
    _turns.word_states.cache_clear()


@pytest.mark.parametrize("by", ["words", "prior"])
def test_labels_without_a_network(dialogues, by):
    rows = list(TurnClasses(by=by).run(dialogues, np.random.default_rng(0)))
    names = {sample.name for sample in dialogues.judged("test")}
    assert {row[1] for row in rows} == names and {row[0] for row in rows} >= {"macro_f1", "accuracy"}
    accuracy = mean(value for metric, _, value in rows if metric == "accuracy")
    assert (accuracy == pytest.approx(1)) if by == "words" else accuracy < 0.9  # each label has words of its own


def test_a_flat_model_reads_a_turn_alone(dialogues):
    for kind in ResistingStrategies.references:
        torch.manual_seed(0)
        model = dialogues.reference(8, kind).eval()
        batch = dialogues.collate(dialogues.samples("train")[:2])
        found = model(batch)
        own = batch["own"]
        assert found[~own].abs().max() == 0 < found[own].abs().min()
        words = batch["words"].clone()
        last = int(own[0].nonzero()[-1])
        words[0, :last] = 1  # what was said before
        with torch.no_grad():
            assert is_close(model({**batch, "words": words})[0, last], found[0, last], SAME)
            words[0, last] = 2
            assert is_far(model({**batch, "words": words})[0, last], found[0, last], SAME)


def test_files_of_ones_own(dialogues, tmp_path):
    file = tmp_path / "other" / "mine.csv"
    file.parent.mkdir()
    write(file, rows(0), columns=("text", "resists"))
    sample = dialogues.open(file)
    assert sample.target is None and len(sample.inputs) == 5
    (said,) = dialogues.predict(dialogues.reference(8).eval(), dialogues.collate([sample]))
    own = [n for n, one in enumerate(sample.about["own"]) if one]
    assert str(said).split("; ")[0].split()[0] == str(own[0] + 1) and len(str(said).split("; ")) == len(own)
    for text, fault in (
        ("text,label\nhi,x\n", "header"), ("text,resists\nhi,yes\n", "not 'yes'"),
        ("text,resists\nhi,0\n", "no turn of who"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=fault):
            read_dialogue(file)
    with pytest.raises(UserError, match="10 are needed"):
        write(file, rows(0))
        ResistingStrategies.read(file.parent)
    with pytest.raises(UserError, match="no dialogue"):
        ResistingStrategies.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="as they come"):
        dialogues.around([])


def test_outcome_by_what_is_seen_of_a_dialogue():
    """Half of forty dialogues: the second turn has a label that says who gives, the last one says so in words."""
    made = [
        Dialogue(f"d{n}", (
            Turn("please give", False), Turn("hello there", True, "self-pity" if n % 2 else NONE), Turn("well", False),
            Turn("yes I give" if n % 2 else "no I never do", True, NONE),
        ))
        for n in range(40)
    ]  # fmt: skip
    order = np.random.default_rng(0).permutation(40)
    train, test = ([made[i] for i in some] for some in (order[:20], order[20:]))
    gave = order % 2 == 1

    def area(seen, share, gave=gave):
        return roc_auc_score(gave[20:], PersuasionOutcome(share=share).odds(seen, train, gave[:20], test))

    assert area("strategies", 0.5) == area("both", 0.5) == area("text", 1.0) == 1
    assert area("text", 0.5) == area("length", 0.5) == 0.5  # the end is not seen
    assert area("length", 1.0) == 1 and area("strategies", 1.0, order % 4 < 2) < 0.9
    one = PersuasionOutcome(share=0.01).beginning(Dialogue("d", (Turn("a", True), Turn("b", True))))
    assert [turn.text for turn in one.turns] == ["a"]
    with pytest.raises(UserError, match="seen"):
        tasks.rows(PersuasionOutcome(), tasks.context(Arm("x")))


def test_the_area_is_of_the_pairs_of_a_fold():
    needs("resper-persuasion")
    needs("resper-donations")
    arm = Arm("length", options={"seen": "length"})
    task = PersuasionOutcome(share=0.1)
    found = {row.sample: row.value for row in tasks.rows(task, tasks.context(arm))}
    assert len(found) == 288
    names, gave = sorted(found, key=persuasion_outcome.by_hash), persuasion.donated()
    by_name = {one.name: one for one in persuasions()}
    right, areas, pairs = np.array([gave[name] for name in names]), [], []
    for fold in range(10):
        held = np.arange(288) % 10 == fold
        train, test = ([by_name[n] for n, h in zip(names, held, strict=True) if h == kind] for kind in (False, True))
        areas.append(roc_auc_score(right[held], task.odds("length", train, right[~held], test)))
        pairs.append(right[held].sum() * (~right[held]).sum())
    assert is_close(mean(found.values()), np.average(areas, weights=pairs), SAME)


def test_fields_that_will_not_do():
    for wrong in (
        lambda: ResistingStrategies(most=2),
        lambda: PersuasionOutcome(share=0),
        lambda: PersuasionOutcome(share=2),
    ):
        with pytest.raises(UserError):
            wrong()
    assert ResistingStrategies(corpus="negotiation").key.endswith("negotiation")
    assert resisting_strategies.LEARNED == "learned"
