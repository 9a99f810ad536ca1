# SPDX-License-Identifier: Apache-2.0
"""Wait-k: read k of the source, then write one and read one in turn (STACL, Ma et al. 2019, arXiv 1810.08398).

What simultaneous translators with a policy of their own have to beat. The model learns with what it will have read:
word i attends to the first k + i - 1 of the source. First it learns for ``before`` times the steps to translate whole
sentences, as others do that are tuned from such a model. With ``paths`` a k is drawn for each batch, so that one model
serves all (Elbayad et al. 2020, 2005.08595).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...recipe import Batch, Recipe

__all__ = ["WaitK"]


@dataclass(frozen=True, kw_only=True)
class WaitK(Recipe):
    """A translator that starts k pieces after its source does, and keeps its pace.

    Attributes:
        k: pieces that are read before the first is written; 0 for the whole sentence.
        paths: train with any k; ``k`` is then how the model is used.
        before: steps of learning to translate whole sentences before, by those of the training.
    """

    task: ClassVar[str] = "simultaneous_translation"

    k: Annotated[int, Field(ge=0)] = field(default=3, metadata={"help": "pieces ahead of the output; 0 for all"})
    paths: bool = field(default=False, metadata={"help": "train with a k that is drawn for each batch"})
    before: Annotated[float, Field(ge=0)] = field(
        default=1.0, metadata={"help": "steps of learning with whole sentences before, by those of the training"}
    )

    def start(self, task: Any, model: nn.Module, fit: Any) -> None:
        if steps := round(self.before * task.steps):
            samples = task.samples("train")
            fit(model, lambda rng: self.batches(task, rng, samples), lambda m, b: task.loss(m, b, _ahead(0, b)), steps)

    def loss(self, task: Any, model: nn.Module, batch: Batch) -> Tensor:
        longest = batch["mask_0"].shape[1]
        k = int(torch.randint(1, longest + 1, ())) if self.paths else self.k
        found: Tensor = task.loss(model, batch, _ahead(k, batch))
        return found

    def predict(self, task: Any, model: nn.Module, batch: Batch) -> Sequence[Any]:
        def reading(seen: Tensor, length: Tensor) -> Tensor:
            return torch.full_like(length, self.k + seen.shape[1] - 1) if self.k else length

        found: Sequence[Any] = task.streamed(model, batch, reading)
        return found


def _ahead(k: int, batch: Batch) -> Tensor:
    """What has been read before each word ``[1, T]``, of sources that may be shorter."""
    words, source = batch["words"], batch["mask_0"]
    place = torch.arange(words.shape[1], device=words.device)[None]
    return place + k if k else torch.full_like(place, source.shape[1])
