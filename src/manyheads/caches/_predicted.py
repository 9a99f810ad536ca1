# SPDX-License-Identifier: Apache-2.0
"""Policies whose scores are predicted for every token as it comes, by a trained module that reads the layer's input."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.budget import Budget
from ..attention.protect import within
from ..call import AttentionCall, Site
from ..calls.layer_modules import LayerModules
from ..errors import UserError
from ._evict import keep_marked
from ._policy import Schedule
from ._ranking import JointRanking
from ._store import PolicyStore
from ._view import CacheView

__all__ = ["Predicted", "PredictedStore", "Predictors"]

_SCORES = "predicted"


class Predictors(LayerModules):
    """Base of modules that give scores ``[B, Hkv, T]`` of ``[B, T, D]``.

    Attributes:
        plus: whether they learn KVzip+'s scores, or KVzip's.
    """

    plus: ClassVar[bool]

    @abstractmethod
    def target(self, scores: Tensor) -> Tensor:
        """What they are to say where the score is ``scores``."""

    @abstractmethod
    def loss(self, found: Tensor, scores: Tensor) -> Tensor:
        """A scalar: how far what they say is from it."""


@dataclass(frozen=True, kw_only=True)
class Predicted(JointRanking):
    """Base: tokens by predicted scores, those above a threshold or the best of the whole model.

    With a ``threshold`` (delayed eviction, as DMS, arXiv 2506.05345, does at inference) a token is decided on when
    ``recent`` later ones have come, and dropped by a head where its score is below: how many stay depends on the text.
    ``schedule`` says when: after the prompt, or also whenever so many more tokens have come. Without one, the best of
    all tokens of all heads and layers stay within the ``budget``, once after the prompt.

    Attributes:
        modules: folder of the trained modules.
        threshold: score below which a token is dropped; None for the budget.
        recent: last tokens that are never dropped.
    """

    dense_prefill: ClassVar[bool] = False

    modules: str = field(default="", metadata={"help": "folder of the trained modules"})
    threshold: float | None = field(default=None, metadata={"help": "drop tokens scored below it; budget if not set"})
    budget: Budget = field(default=0.5, metadata={"help": "fraction (0, 1] of the tokens, or slots; if no threshold"})
    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped"})
    recent: int = field(default=128, metadata={"help": "last tokens that are never dropped"})
    schedule: Schedule = field(default="prefill", metadata={"help": "prefill, or with a threshold a number of tokens"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.modules:
            raise UserError(f"{self.slug} needs modules=FOLDER, trained on the model: {self.kind().how}")
        if self.schedule != "prefill" and (self.threshold is None or not isinstance(self.schedule, int)):
            raise UserError(
                f"{self.slug}: schedule is prefill, or with a threshold every so many tokens, not {self.schedule}"
            )

    @classmethod
    @abstractmethod
    def kind(cls) -> type[Predictors]:
        """The modules that it takes."""

    @property
    @abstractmethod
    def trained(self) -> Predictors:
        """The modules."""

    @property
    def has_budget(self) -> bool:  # type: ignore[override]
        return self.threshold is None

    @property
    def cross_layer(self) -> bool:  # type: ignore[override]
        return self.threshold is None

    @property
    def lossless(self) -> bool:
        return self.threshold is None

    def rank(self, views: list[CacheView]) -> list[Tensor]:
        return [view.state.pop(_SCORES) for view in views]

    def store(self, site: Site) -> PolicyStore:
        if site.window is not None:  # such a layer is left as it is
            return PolicyStore(replace(self, threshold=None, budget=1.0, schedule="prefill"), site)
        self.trained.check(site, self.modules)
        return PredictedStore(self, site)


class PredictedStore(PolicyStore):
    """Slots, and the scores of the last columns, on which nothing is decided yet."""

    policy: Predicted

    def reset(self) -> None:
        super().reset()
        self._scores: Tensor | None = None  # [B, Hs, M], of the last M columns

    @property
    def held(self) -> list[Tensor | None]:
        return [*super().held, self._scores]

    def attend(self, call: AttentionCall) -> Tensor | None:
        out = super().attend(call)
        if out is not None:
            self._predict(call)
        return out

    def mask(self, call: AttentionCall) -> AttentionCall:
        seen = super().mask(call)
        self._predict(call)
        return seen

    def evict(self, call: AttentionCall) -> None:
        if self._scores is not None and self.policy.threshold is None:
            self.state[_SCORES] = self._scores
        super().evict(call)
        if self.policy.schedule == "prefill" and not self.prefilling:
            self._scores = None

    def compress(self, view: CacheView, share: Tensor | float | None = None) -> None:
        """Drop what is below the threshold and has left the window; or the base's eviction within a budget."""
        threshold, slots = self.policy.threshold, self.live
        if threshold is None:
            super().compress(view, share)
            if self._waiting is None:
                self.state.pop(_SCORES, None)
            return
        self._since = 0
        assert self._scores is not None
        columns, first = slots.columns(), slots.seen - self._scores.shape[2]
        score = self._scores.gather(2, (columns - first).clamp(min=0))
        late = view.positions >= (view.counts - self.policy.recent)[:, None, None]
        kept = late | (columns < first) | (score >= threshold) | (view.positions < self.policy.sinks)
        if view.spans is not None:
            kept = kept | within(view.positions, view.spans)
        kept = kept & (columns >= 0)
        if not bool((kept | (columns < 0)).all()):
            keep_marked(slots, kept)
            self._ragged = True
        wait = self.policy.recent + int((slots.seen - view.counts).max())  # columns of the window, in every row
        self._scores = self._scores[:, :, max(0, self._scores.shape[2] - wait) :].clone()

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        if self._scores is not None:
            self._scores = self._scores[rows.to(self._scores.device)]

    def crop(self, count: int) -> None:
        super().crop(count)
        if self._scores is not None and count:
            self._scores = self._scores[:, :, : self._scores.shape[2] - count]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._scores = state["scores"]

    def _predict(self, call: AttentionCall) -> None:
        """Note the scores of the new tokens, where they are still to be decided on."""
        if self._forwards and self.policy.schedule == "prefill" and not self.prefilling and self._scores is None:
            return
        trained = self.policy.trained
        hidden = trained.reads(call, self.policy.modules)
        assert self.site.layer is not None
        with torch.no_grad():
            scores: Tensor = trained.placed(self.site.layer, hidden)(hidden)
        self._scores = scores if self._scores is None else torch.cat([self._scores, scores], 2)
