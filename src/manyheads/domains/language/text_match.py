# SPDX-License-Identifier: Apache-2.0
"""Replies by what they share with a context, which every trained model has to beat: nothing is trained.

``by=words`` is BM25, of the words of all messages so far; ``by=meaning`` the cosine of mean states of the published
encoder that trained models start from.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import UserError
from ...recipe import Procedure

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TextMatch"]


@dataclass(frozen=True, kw_only=True)
class TextMatch(Procedure):
    """Scores of replies by words or by meaning.

    Attributes:
        by: ``words`` or ``meaning``.
    """

    task: ClassVar[str] = "response_selection"

    by: Literal["words", "meaning"] = field(
        default="words", metadata={"help": "BM25 of words, or the cosine of a published encoder's mean states"}
    )

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "matched"):
            raise UserError(f"text_match: {task.name} has no replies: give --task response_selection")
        samples = task.judged("test")
        said = task.matched(samples, self.by)
        rows = self.scored(task, samples, said)
        return (row for row in rows if row[0] in ("recall", "mrr"))  # no logits: a loss of them would say nothing
