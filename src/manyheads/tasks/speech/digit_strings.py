# SPDX-License-Identifier: Apache-2.0
"""Strings of spoken digits by speakers that no training has seen, recognised by CTC: word error rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from .._blocks import Transformer
from ._ctc import best_paths, ctc_losses, ctc_mean
from ._digits import WER, DigitStringData, Transcript, aligned, word_errors
from ._encoder import MELS, Conformer, SpeechEncoder, log_mel

__all__ = ["DigitStrings"]

_CLASSES = 11  # the blank, then ten digits


@dataclass(frozen=True, kw_only=True)
class DigitStrings(DigitStringData):
    """The Free Spoken Digit Dataset: recordings of one speaker, put together with short gaps.

    The mean over strings is the word error rate of all. Intervals are over strings and trainings, not over speakers, of
    whom the test part has one.

    Attributes:
        kernel: frames of the Conformer's convolution.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (*WER, Metric("ctc_nll", "held-out CTC loss, nats/word", "nats/word"))
    references: ClassVar[tuple[str, ...]] = ("conformer", "transformer")

    kernel: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError("a kernel is a window around a frame: give an odd number of frames")

    def around(self, blocks: Sequence[nn.Module], positions: bool = False) -> SpeechEncoder:
        return SpeechEncoder(blocks, self.dim, _CLASSES, self.dropout, positions)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        size = self.dim, self.heads, width, self.dropout
        if (kind or self.references[0]) == "transformer":
            return self.around([Transformer(*size) for _ in range(self.layers)], positions=True)
        return self.around([Conformer(*size, self.kernel) for _ in range(self.layers)])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, mask = model(batch["inputs"], batch["mask"])
        return ctc_mean(logits, mask, batch["targets"], batch["counts"])

    def predict(self, model: nn.Module, batch: Batch) -> list[Transcript]:
        logits, mask = model(batch["inputs"], batch["mask"])
        log_probs = [row[there] for row, there in zip(logits.float().log_softmax(-1).cpu(), mask.cpu(), strict=True)]
        return [Transcript(*both) for both in zip(best_paths(logits, mask), log_probs, strict=True)]

    def score(self, sample: Sample, said: Transcript) -> Mapping[str, float]:
        targets = torch.tensor([[int(digit) + 1 for digit in sample.target.split()]])
        mask, counts = torch.ones(1, len(said.log_probs), dtype=torch.bool), torch.tensor([targets.shape[1]])
        loss = ctc_losses(said.log_probs[None], mask, targets, counts)
        return {**word_errors(sample.target, said.text), "ctc_nll": float(loss) / targets.shape[1]}

    def truth(self, sample: Sample) -> Transcript:
        path = [k for digit in sample.target.split() for k in (int(digit) + 1, 0)]
        sure = torch.full((len(path), _CLASSES), 1e-4).scatter_(1, torch.tensor(path)[:, None], 1.0)
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
