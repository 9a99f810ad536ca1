# SPDX-License-Identifier: Apache-2.0
"""A translation model is trained, translates sentences that it has not seen, and scores rank its translations.

Scores are those of :mod:`._scored`, and by the option ``later`` which of two systems is the later one. Quality is chrF
with the reference (Popovic 2015; characters up to 6, words up to 2: chrF++).

The second system of the hybrid is the same model at ``early`` of its training: of two translations of a sentence that
of the higher score is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ...data.translations import Pair, pairs
from ...errors import UserError
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...lenses.attention_confidence import AttentionConfidence
from ...models.translator import Translation, collate, likelihoods, translate
from ._scored import RANKED, by_prompt, judged, score_of
from ._translation import TranslationTask

__all__ = ["TranslatedSentences", "character_f"]

_READ = 64  # sentences that are read at once


def character_f(translations: Sequence[str], references: Sequence[str]) -> Any:
    """chrF++ of each translation, 0 to 100: ``[N]``.

    Raises:
        ImportError: torchmetrics, of the extra ``train``, is not there.
    """
    from torchmetrics.functional.text import chrf_score

    each: Any = chrf_score(list(translations), [[x] for x in references], return_sentence_level_score=True)
    return 100 * each[1].double().numpy()


@dataclass(frozen=True)
class _System:
    """What one system made of the test sentences."""

    made: list[Translation]
    quality: Any  # [N]


@dataclass(frozen=True, kw_only=True)
class TranslatedSentences(TranslationTask):
    """A value for each sentence.

    Attributes:
        corpus: of :func:`manyheads.data.translations.pairs`.
        samples: test sentences.
        early: share of the training after which the other system of the hybrid is taken.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("chrf", "chrF of the translations", higher=True),
        Metric("chrf_gain", "chrF above that with another sentence's reference", higher=True),
        *RANKED,
        Metric("hybrid_quality", "chrF of the translation that the score takes of two systems'", higher=True),
    )

    corpus: str = "multi30k"
    samples: int = 1000
    early: float = 0.5

    def unsupported_reason(self, run: RunContext) -> str | None:
        try:
            import torchmetrics  # noqa: F401

            pairs(self.corpus)("test")
        except UserError as error:
            return str(error)
        except ImportError:
            return "chrF needs torchmetrics: pip install 'manyheads[train]'"
        return None

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = unit.params["seed"]
        read = pairs(self.corpus)
        train, test = read("train"), read("test")[: self.samples]
        tokenizer, models = self.trained(run, unit, train, seed, early=self.early)
        systems = [self._translated(model, tokenizer, test) for model in models]
        later = systems[-1]
        yield from self.each("chrf", run.baseline, later.quality, seed=seed)
        others = character_f([x.text for x in later.made], [pair[1] for pair in test[1:] + test[:1]])
        yield from self.each("chrf_gain", run.baseline, later.quality - others, seed=seed)
        lengths = {
            "source": [len(x.source) for x in later.made], "output": [len(x.target) for x in later.made]
        }  # fmt: skip
        looked: dict[Any, dict[str, Any]] = {}
        for arm in run.arms:
            if arm.options.get("score") == "later":
                yield from self.each("hybrid_quality", arm, later.quality, seed=seed)
                continue
            found = [
                score_of(
                    run, arm, seed, [len(x.target) for x in system.made], partial(_likelihood, model, system.made),
                    partial(_confidences, looked, model, system.made), i,
                )
                for i, (model, system) in enumerate(zip(models, systems, strict=True))
            ]  # fmt: skip
            for metric, values in judged(found[-1], later.quality, lengths):
                yield from self.each(metric, arm, values, seed=seed)
            chosen = np.where(found[1] > found[0], later.quality, systems[0].quality)
            yield from self.each("hybrid_quality", arm, chosen, seed=seed)

    def _translated(self, model: Any, tokenizer: Any, test: list[Pair]) -> _System:
        made = translate(model, tokenizer, [pair[0] for pair in test])
        return _System(made, character_f([x.text for x in made], [pair[1] for pair in test]))


def _likelihood(model: Any, made: Sequence[Translation]) -> Any:
    return np.concatenate([likelihoods(model, batch).cpu().numpy() for _, batch in _read(model, made)])


def _confidences(
    looked: dict[Any, dict[str, Any]], model: Any, made: Sequence[Translation], lens: AttentionConfidence
) -> dict[str, Any]:
    """Of each translation, by name; ``looked`` keeps what a lens saw."""
    import manyheads

    if (key := (id(model), lens.spec)) not in looked:
        with manyheads.watch(model, lens) as seen, torch.no_grad():
            for part, batch in _read(model, made):
                seen.roles = manyheads.TokenSpans({"target": [[(0, len(x.target))] for x in part]})
                model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False)
        looked[key] = by_prompt(seen.compute())
    return looked[key]


def _read(model: Any, made: Sequence[Translation]) -> Iterator[tuple[Sequence[Translation], Any]]:
    """Translations a few at a time, and as the model reads them."""
    for start in range(0, len(made), _READ):
        part = made[start : start + _READ]
        yield part, collate([(x.source, x.target) for x in part], model.device)
