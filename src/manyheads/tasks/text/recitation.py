# SPDX-License-Identifier: Apache-2.0
"""A passage of a context word for word, one of its own or one that has nothing to do with what is around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor

from ...experiment import Metric, RunContext
from ._corpus import encode
from ._fed import FedTask, Judged
from ._prefill import token_nll

__all__ = ["Recitation"]


@dataclass(frozen=True, kw_only=True)
class Recitation(FedTask):
    """Loss of a passage that comes a second time, behind the context: what is left of it there is what it saves.

    Condition ``passage``: ``own`` is one as it stands in the text; ``foreign`` one of another text in its place, which
    nothing around it lets expect: a surprise. Both are begun by a few tokens that are not judged.

    Attributes:
        fed: tokens of a passage.
        cue: of these, that are given.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("token_nll", "loss of a passage, again", "nats/token", what="recited behind the context it stands in"),
    )

    fed: int = 32
    cue: int = 8

    def drawn(self, run: RunContext, length: int) -> dict[str, list[tuple[Any, Any]]]:
        def make() -> dict[str, list[tuple[Any, Any]]]:
            contexts = self.contexts(run)
            found = [ids for ids, _, _ in contexts.plain("recitation", length, self.samples + 1, 1)]
            rng, between = run.rng(recitation=length), encode(contexts.tokenizer, "\n\n")
            own, foreign = [], []
            for i, whole in enumerate(found[:-1]):
                ids, other = whole[:length], found[i + 1]
                at = int(rng.integers(length // 8, length - length // 8 - self.fed))
                passage, planted = ids[at : at + self.fed], other[at : at + self.fed]
                own.append((ids, np.concatenate([between, passage])))
                changed = np.concatenate([ids[:at], planted, ids[at + self.fed :]])
                foreign.append((changed, np.concatenate([between, planted])))
            return {"own": own, "foreign": foreign}

        key = ("recitation", length, self.samples, self.fed)
        return cast(dict[str, list[tuple[Any, Any]]], run.kept(key, make))

    def judged(self, variant: str, logits: Tensor, fed: Tensor) -> Iterator[Judged]:
        nats = token_nll(logits, fed[:, 1:])[:, self.cue - self.fed :]
        yield "token_nll", {"passage": variant}, nats.mean(1).tolist()
