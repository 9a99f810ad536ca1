# SPDX-License-Identifier: Apache-2.0
"""Zero-shot grammar: whether a trained byte language model finds the acceptable sentence of a pair likelier."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from ...data import files
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...training import token_nll
from .byte_lm import ByteLM

__all__ = ["MinimalPairs"]

_FOLDER = "bias/blimp"  # in the folder of the data: 67 files of 1,000 pairs
_AT_ONCE = 256  # sentences judged at once


@dataclass(frozen=True, kw_only=True)
class MinimalPairs(ByteLM):
    """The models of ``byte_lm`` on BLiMP (Warstadt et al., arXiv 1912.00582), after no training for it.

    A pair is right where the log-likelihood of the whole acceptable sentence, read after a line end and with one behind
    it, is above that of the other; guessing gives one half. All paradigms are asked, the first ``each_of`` pairs of
    each; as they are the benchmark's own and no sample of paradigms, a pair stands for itself in an interval.

    Attributes:
        each_of: pairs of each paradigm.
    """

    reports: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("preferred", "minimal pairs right", higher=True, kind="share", floor=0.5),
    )

    each_of: int = 30

    def unsupported_reason(self, run: RunContext) -> str | None:
        if files.folder(_FOLDER) is None:
            return f"BLiMP is not here: put its 67 files into {_FOLDER} of a folder that MANYHEADS_DATA names"
        return None

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        ids, counts, names = self._pairs(run)
        losses = [
            (token_nll(model, part.to(run.device), _AT_ONCE) * counted).sum(1)
            for part, counted in zip(ids.split(_AT_ONCE), counts.split(_AT_ONCE), strict=True)
        ]
        good, bad = torch.cat(losses).view(-1, 2).unbind(1)
        for name, right in zip(names, (good < bad).tolist(), strict=True):
            yield self.row("preferred", arm, right, name, seed=seed)

    def _pairs(self, run: RunContext) -> tuple[Tensor, Tensor, list[str]]:
        """Sentences in pairs, acceptable first: bytes ``[2 N, T + 1]``, predictions that count, and names ``[N]``."""

        def make() -> tuple[Tensor, Tensor, list[str]]:
            folder = cast(Path, files.folder(_FOLDER))
            sentences, names = [], []
            for path in sorted(folder.glob("*.jsonl")):
                with path.open(encoding="utf-8") as lines:
                    for i, line in enumerate(islice(lines, self.each_of)):
                        pair = json.loads(line)
                        sentences += [f"\n{pair[kind]}\n".encode() for kind in ("sentence_good", "sentence_bad")]
                        names.append(f"{path.stem} {i}")
            if not names:
                raise UserError(f"{folder} holds no *.jsonl of BLiMP")
            longest = max(map(len, sentences))
            ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in sentences])
            lengths = torch.tensor([len(one) for one in sentences])
            return ids, torch.arange(1, longest) < lengths[:, None], names

        return cast(tuple[Tensor, Tensor, list[str]], run.kept(("pairs", self.each_of), make))
