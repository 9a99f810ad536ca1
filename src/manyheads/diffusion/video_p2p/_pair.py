# SPDX-License-Identifier: Apache-2.0
"""What a run knows of its pairs of prompts: how columns are carried over, and where words differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...call import Prompt
from .._alignment import changed, factors, refinement, replacement, same_number

__all__ = ["Edit", "PromptPairs", "repeated"]

Edit = Literal["auto", "replace", "refine"]
Columns = tuple[Tensor, Tensor, Tensor]


@dataclass(eq=False)
class PromptPairs:
    """Pairs of prompts of a run.

    Attributes:
        texts: source and target of each, by every tokenizer.
        edit: how words are carried over.
        weights: words of the targets with factors.
        words: that the blend follows; those that differ or are reweighted if none.
    """

    texts: list[tuple[tuple[Prompt, ...], tuple[Prompt, ...]]]
    edit: Edit
    weights: Sequence[tuple[str, float]]
    words: Sequence[str]
    _columns: dict[tuple[object, ...], Columns] = field(default_factory=dict)
    _differing: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def columns(self, size: int, like: Tensor) -> Columns:
        """M ``[P, S, S]``, own shares and factors ``[P, S]`` for the ``size`` text tokens of P pairs."""
        key = size, like.device, like.dtype
        if key not in self._columns:
            made = [self._aligned(source, target, size) for source, target in self.texts]
            matrix, own, factor = (torch.stack(x).to(like) for x in zip(*made, strict=True))
            self._columns[key] = matrix, own, factor
        return self._columns[key]

    def _aligned(self, source: tuple[Prompt, ...], target: tuple[Prompt, ...], size: int) -> Columns:
        whole = self.edit == "replace" or (self.edit == "auto" and same_number(source, target))
        matrix, own = (replacement if whole else refinement)(source, target, size)
        return matrix, own, factors(target, self.weights, size)

    def differing(self) -> list[tuple[list[int], list[int]]]:
        """Places of the tokens that the blend follows, in source and target of each pair."""
        if not self._differing:
            for source, target in self.texts:
                there, here = changed(source, target, self.words)
                for word, _ in () if self.words else self.weights:
                    more = changed(source, target, [word])
                    there, here = there + more[0], here + more[1]
                self._differing.append((there, here))
        return self._differing


def repeated(x: Tensor, rows: int) -> Tensor:
    """What is of each pair, or of each row, for the frames of each that attend apart."""
    return x.repeat_interleave(rows // len(x), 0)
