# SPDX-License-Identifier: Apache-2.0
"""Scores of tokens: one that knows the answer is perfect, its opposite the worst; on text, what follows from it."""

import math

import numpy as np

from manyheads.data.phrases import PhraseLanguage as Language
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses import phrase_language
from manyheads.tasks.lenses.peaks_in_text import PeaksInText
from manyheads.tasks.lenses.phrase_language import PhraseLanguage
from oracles.tasks import context, rows, values
from tolerance import DRAWN

ARMS = Arm("blind"), *(Arm(name, options={"score": name}) for name in ("waad", "fai", "entropy"))
TASK = PhraseLanguage(steps=2, dim=16, length=64, batch=2, sequences=12)


def test_scores_that_know_are_perfect(monkeypatch):
    run, known = context(*ARMS), phrase_language.scores
    test = Language.of(0).draw(12, 64, run.torch_rng(test="phrase_language"))

    def answers(*given):
        found, logits = known(*given)
        for n, each in enumerate(found):
            head = np.roll(test.starts[n].numpy(), -1).astype(float)
            each |= {"waad": head, "entropy": -head, "fai": test.definitions[n].numpy().astype(float)}
        return found, logits

    monkeypatch.setattr(phrase_language, "scores", answers)
    found = rows(TASK, run)
    assert (values(found, "head_auroc", "waad") == 1).all() and (values(found, "head_auroc", "entropy") == 0).all()
    assert (values(found, "definitions_found", "fai") == 1).all()
    blind = values(found, "head_auroc", "blind")
    # Of m rows among n others by chance: variance (m + n + 1) / (12 m n), of some 14 among 39 of each sequence.
    expected = math.sqrt(54 / (12 * 14 * 39) / len(blind))
    assert abs(blind.mean() - 0.5) < DRAWN * expected
    assert {row.arm for row in found if row.metric == "lookup_loss"} == {"blind"}


def test_a_unit_repeats_to_the_bit():
    assert rows(TASK, context(*ARMS)) == rows(TASK, context(*ARMS))


def test_peaks_in_text():
    found = rows(PeaksInText(tokens=96, windows_of=3, text="code"), context(*ARMS, subject=CausalLM("default")))
    assert (values(found, "follows_waad", "waad") == 1).all() and (values(found, "follows_waad", "blind") < 1).any()
    assert (values(found, "peak_entropy", "entropy") > values(found, "peak_entropy", "blind")).all()
    assert len(values(found, "peak_entropy", "fai")) == 3
