# SPDX-License-Identifier: Apache-2.0
"""Verification: folds in which every speaker is tested once, pairs, and predictions of two files."""

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.recipe import Sample
from manyheads.tasks._field_training import FieldTraining, load_model
from manyheads.tasks.speech._verification import AttentiveStatistics, Classified, Match, MeanPool
from manyheads.tasks.speech.speaker_verification import SpeakerVerification
from oracles import tasks
from tiny.recordings import digits, write
from tolerance import PROJECTED, is_close, is_far

__all__ = ["digits"]

TINY = {
    "dim": 16, "layers": 1, "heads": 2, "batch": 2, "steps": 2, "rates": (3e-3,), "samples_judged": 16, "phrases": 2,
    "paces": (1.0, 1.1), "variants": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A folder of six speakers who say three digits eight times each."""
    place = tmp_path_factory.mktemp("six")
    for i, speaker in enumerate(("ann", "bob", "cid", "dot", "eve", "fay")):
        for digit in range(3):
            for n in range(8):
                write(place / f"{digit}_{speaker}_{n}.wav", rate=8000, pitch=200 + 90 * i + 150 * digit + 5 * n)
    return place


def test_every_speaker_is_tested_in_one_fold(six):
    made = [SpeakerVerification(folder=str(six), fold=fold, **TINY) for fold in range(4)]
    groups = [{p: {s.group for s in task.samples(p)} for p in ("test", "validation", "train")} for task in made]
    assert all(set.union(*parts.values()) == {"ann", "bob", "cid", "dot", "eve", "fay"} for parts in groups)
    assert all([len(parts[p]) for p in ("test", "validation", "train")] == [2, 1, 3] for parts in groups)
    assert set.union(*(parts["test"] for parts in groups[:3])) == set.union(*groups[0].values())
    assert groups[3] == groups[0]
    names = [{sample.name for sample in task.judged("test")} for task in made[:3]]
    assert not names[0] & names[1] and not names[1] & names[2]


def test_pairs_are_what_they_are_called(six):
    task = SpeakerVerification(folder=str(six), **TINY)
    judged = task.judged("test")
    assert [s.about["kind"] for s in judged].count("target") * 2 == len(judged) == 16
    for sample in judged:
        speaker, (kind, who) = sample.group, sample.name.split()[3:5]
        assert (who == speaker) == (kind != "speaker") and sample.target == (kind == "target")
    same = {id(s.inputs[0]) for s in judged} & {id(s.inputs[1]) for s in judged}
    assert not same  # what is enrolled is not tested
    assert {s.about["kind"] for s in task.judged("validation")} == {"target", "phrase"}
    batch = task.collate(task.draw(np.random.default_rng(0), task.samples("train")))
    assert batch["inputs"].shape[:2] == batch["mask"].shape[:2] == batch["targets"].shape == (2, 2)
    (first, second), (third, fourth) = batch["targets"].tolist()
    assert first == second and third != fourth and task.classes == 3 * 2 * 2


def test_pairs_that_are_drawn_differ_in_order_or_voice(six):
    task, kinds = SpeakerVerification(folder=str(six), **{**TINY, "batch": 40}), set()
    for same, other in task.collate(task.draw(np.random.default_rng(0), task.samples("train")))["targets"].view(
        -1, 2, 2
    ):
        assert same[0] == same[1]
        (voice, phrase), (far, reverse) = ((int(k) // 2, int(k) % 2) for k in other)  # of two phrases
        assert (voice == far) != (phrase == reverse)
        kinds.add(voice == far)
    assert kinds == {True, False}


def test_a_reversed_phrase_is_the_other_phrases_target(six):
    judged = SpeakerVerification(folder=str(six), **{**TINY, "samples_judged": 64}).judged("test")
    named = {tuple(s.name.split()): s.inputs[1] for s in judged}
    targets = {(who, phrase, j): x for (_, phrase, _, kind, who, j), x in named.items() if kind == "target"}
    reverses = {(who, phrase[::-1], j): x for (_, phrase, _, kind, who, j), x in named.items() if kind == "phrase"}
    assert reverses and all(targets[key] is x for key, x in reverses.items())


def test_embeddings_are_the_mean_of_states_and_classes_are_told_by_the_first():
    class States(torch.nn.Module):
        def forward(self, frames, mask):
            return frames[:, :2]

    batch = {"inputs": torch.randn(3, 2, 4, 8), "mask": torch.ones(3, 2, 4, dtype=torch.bool)}
    said = SpeakerVerification(**TINY).predict(States(), batch)
    one, other = batch["inputs"][:, :, :2].mean(2).unbind(1)
    want = (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)
    assert [match.cosine for match in said] == pytest.approx(want.tolist(), abs=1e-6)
    classified, frames = Classified(States(), 8, 5), batch["inputs"][:, 0]
    logits, weight = classified(frames, None), classified.head.weight
    assert is_close(logits, 10 * torch.cosine_similarity(frames[:, 0, None], weight[None], dim=-1))
    assert is_far(logits, frames[:, 0] @ weight.T)


def test_a_threshold_is_that_of_all_pairs_of_a_kind():
    task = SpeakerVerification(**TINY)
    kinds = ["target", "target", "phrase", "speaker"]
    samples = [Sample(str(i), "g", "test", None, kind == "target", {"kind": kind}) for i, kind in enumerate(kinds)]
    found = task.scores(samples, [Match(x) for x in (0.9, 0.5, 0.7, 0.1)])
    assert [set(one) for one in found] == [{"eer", "phrase_eer", "speaker_eer", "min_dcf"}] * 2 + [
        {"eer", "phrase_eer", "min_dcf"}, {"eer", "speaker_eer", "min_dcf"}
    ]  # fmt: skip
    assert sum(one.get("speaker_eer", 0) for one in found) == 0 < sum(one.get("phrase_eer", 0) for one in found)
    assert task.scores(samples[:2], [Match(0.1), Match(0.2)]) == [{}, {}]  # nothing to tell targets from


def test_a_seed_is_a_fold(six):
    task = SpeakerVerification(folder=str(six), **TINY)
    run = RunContext(Trainable(), (Arm("reference"),), seeds=(0, 2), device=torch.device("cpu"))
    rows = tasks.rows(task, run)
    heard = {
        seed: {row.about["group"] for row in rows if row.seed == seed and row.about.get("group")} for seed in (0, 2)
    }
    assert len(heard[0]) == len(heard[2]) == 2 and not heard[0] & heard[2]
    of_pairs = [row for row in rows if row.metric == "eer"]
    assert len({row.context for row in of_pairs}) * 4 == len(of_pairs) == 32  # what shares an enrolment
    shown = [row.seed for row in rows if row.about.get("pictures")]
    assert shown == [0]


def test_two_files_are_compared(six, digits, tmp_path):
    task, arm = SpeakerVerification(folder=str(six), **TINY), Arm("sv_class_token", "sv_class_token")
    run = RunContext(Trainable(), (Arm("reference"), arm), device=torch.device("cpu"), folder=tmp_path)
    FieldTraining(task, run, arm).model(0)
    model = load_model(tmp_path / "models" / "sv_class_token" / "seed-0")
    one, other = digits / "0_ann_0.wav", digits / "3_cid_1.wav"
    same, unlike, again = model.predict([one, one, one, other, other, one])
    assert same.cosine == pytest.approx(1, abs=1e-5) and str(same) == "cosine 1.000"
    assert unlike.cosine < same.cosine and again.cosine == pytest.approx(unlike.cosine, abs=1e-5)
    with pytest.raises(UserError, match="2 files at a time"):
        model.predict([one])


def test_three_speakers_are_too_few(digits):
    with pytest.raises(UserError, match="four are needed"):
        SpeakerVerification(folder=str(digits), **TINY).samples("train")


def test_poolings_are_their_formulas():
    x, mask = torch.randn(2, 6, 8, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    x[1, 4:] = 1e3
    assert is_close(MeanPool()(x, mask)[1], x[1, :4].mean(0), PROJECTED)
    assert is_far(MeanPool()(x, mask)[1], x[1].mean(0), PROJECTED)
    pool = AttentiveStatistics(8).double()
    hidden, _, weigh = pool.score
    alpha = torch.stack([weigh(hidden(x[1, t]).tanh())[0] for t in range(4)]).softmax(0)
    mean = sum(a * x[1, t] for t, a in enumerate(alpha))
    deviation = sum(a * (x[1, t] - mean) ** 2 for t, a in enumerate(alpha)).sqrt()
    assert is_close(pool(x, mask)[1], torch.cat((mean, deviation)), PROJECTED)
    assert is_close(pool(x[1:, :4])[0], pool(x, mask)[1], PROJECTED)  # without a mask all are there
    assert is_far(pool(x, mask)[1], torch.cat((mean, deviation**2)), PROJECTED)
    task = SpeakerVerification(**TINY)
    plain, weighed = (task.reference(16, kind).eval() for kind in task.references)
    frames, there = torch.randn(1, 20, 40), torch.ones(1, 20, dtype=torch.bool)
    states, short = weighed.encode(frames, there)
    want = weighed.pool(states, short) @ weighed.head.weight.T
    assert is_close(weighed(frames, there)[:, 0], want) and plain(frames, there).shape == (1, 1, 16)
