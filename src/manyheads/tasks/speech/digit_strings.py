# SPDX-License-Identifier: Apache-2.0
"""Strings of spoken digits by speakers that no training has seen, recognised by CTC: word error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ...experiment import Metric
from ...recipe import Picture, Sample
from ._ctc import CTCTask, Transcript, ctc_losses
from ._digits import WER, DigitStringData, aligned
from ._encoder import MELS, log_mel

__all__ = ["DigitStrings"]


@dataclass(frozen=True, kw_only=True)
class DigitStrings(DigitStringData, CTCTask):
    """The Free Spoken Digit Dataset: recordings of one speaker, put together with short gaps.

    The mean over strings is the word error rate of all. Intervals are over strings and trainings, not over speakers, of
    whom the test part has one.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (*WER, Metric("ctc_nll", "held-out CTC loss, nats/word", "nats/word"))

    classes: ClassVar[int] = 11  # the blank, then ten digits

    def score(self, sample: Sample, said: Transcript) -> Mapping[str, float]:
        words = sample.target.split()
        targets, counts = torch.tensor([[int(digit) + 1 for digit in words]]), torch.tensor([len(words)])
        mask = torch.ones(1, len(said.log_probs), dtype=torch.bool)
        loss = ctc_losses(said.log_probs[None], mask, targets, counts)
        wrong = float(aligned([sample.target], [said.text]).wer)
        return {"wer": wrong, "exact": float(wrong == 0), "ctc_nll": float(loss) / len(words)}

    def truth(self, sample: Sample) -> Transcript:
        path = [k for digit in sample.target.split() for k in (int(digit) + 1, 0)]
        sure = torch.full((len(path), self.classes), 1e-4).scatter_(1, torch.tensor(path)[:, None], 1.0)
        return Transcript(sample.target, sure.log().log_softmax(-1))

    def pictures(self, samples: Sequence[Sample], said: Sequence[Any]) -> Sequence[Picture]:
        digits = list("0123456789")
        counts = np.zeros((11, 11))
        found = aligned([sample.target for sample in samples], [one.text for one in said])
        for words, heard, chunks in zip(found.references, found.hypotheses, found.alignments, strict=True):
            for chunk in chunks:
                pairs = range(max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx))
                for i in pairs:
                    row = 10 if chunk.type == "insert" else int(words[chunk.ref_start_idx + i])
                    column = 10 if chunk.type == "delete" else int(heard[chunk.hyp_start_idx + i])
                    counts[row, column] += 1
        shares = counts / counts.sum(1, keepdims=True).clip(min=1)
        confusion = Picture("digits", [*digits, "none"], [*digits, "missed"], shares, ("spoken", "recognised"))
        sample, one = samples[0], said[0]
        mel, place = log_mel(sample.inputs)[::4][: len(one.log_probs)], np.arange(len(one.log_probs))
        low, high = mel.amin(), mel.amax()
        map_ = torch.cat((((mel - low) / (high - low)).flip(1), one.log_probs.exp()[: len(mel)]), 1).T
        rows = [*(f"m{MELS - i}" for i in range(MELS)), "blank", *digits]
        times = [f"{0.04 * i:.2f}" for i in place]
        title = f"{sample.target}: recognised {one.text or 'nothing'}"
        return confusion, Picture(
            title, rows, times, map_.tolist(), ("energies of mel filters, then probabilities", "seconds")
        )
