# SPDX-License-Identifier: Apache-2.0
"""How many of its codewords a trained language model uses on text, and how far keys are from theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...mixers.longvq import Codebook
from ...models.decoder import TokenModel
from ._training_task import at_once
from .recall_in_text import RecallInText

__all__ = ["CodebookUse", "key_error", "perplexity"]


@dataclass(frozen=True, kw_only=True)
class CodebookUse(RecallInText):
    """The models of ``recall_in_text``, read on its held-out text; a value for every layer with a codebook.

    ``codebook_perplexity`` is the exponential of the entropy of the codes: so many codewords, all equally frequent,
    would tell as much. ``key_error`` is the mean squared distance of keys from their codewords over that from the mean
    of all keys: 1 says that one codeword would do as well.
    """

    reports: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("codebook_perplexity", "codewords used, effectively", higher=True),
        Metric("key_error", "squared error of keys, share of their variance"),
    )

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        books = [module for module in model.modules() if isinstance(module, Codebook)]
        if not books:
            raise UserError(f"{arm.key} has no codebook: leave it out of codebook_use, by only")
        held: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

        def kept(book: Any, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            held.setdefault(id(book), []).append((given[0], made[0], made[1]))

        with ExitStack() as hooks:
            for book in books:
                hooks.callback(book.register_forward_hook(kept).remove)
            for ids in self._windows(run, max(self.times))[0][:, : self.length].split(at_once(self.length)):
                model(ids.to(run.device))
        for i, book in enumerate(books):
            keys, nearest, codes = (torch.cat(parts) for parts in zip(*held[id(book)], strict=True))
            about: dict[str, Any] = {"context": f"layer {i}", "seed": seed}
            yield self.row("codebook_perplexity", arm, perplexity(codes, book.counts.shape[1]), f"layer {i}", **about)
            yield self.row("key_error", arm, key_error(keys, nearest), f"layer {i}", **about)

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.metrics


def perplexity(codes: Tensor, size: int) -> float:
    """Exponential of the entropy of ``codes``, numbers below ``size``."""
    share = torch.bincount(codes.flatten(), minlength=size).double() / codes.numel()
    return float(torch.special.entr(share).sum().exp())


def key_error(keys: Tensor, nearest: Tensor) -> float:
    """Squared distance of ``keys [..., d]`` from ``nearest``, as a share of their variance."""
    keys, nearest = keys.flatten(0, -2).double(), nearest.flatten(0, -2).double()
    return float((keys - nearest).square().sum() / (keys - keys.mean(0)).square().sum())
