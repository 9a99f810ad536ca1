# SPDX-License-Identifier: Apache-2.0
"""A translation model is trained, and its attention on multi-word expressions is compared with that on other pairs.

Expressions are n-grams of the training corpus that hold together (PMI), each with the target n-gram that goes with it;
the other pairs are n-grams that do not hold together, matched to targets in the same way. A sample is an occurrence of
an expression and one of a literal pair: as many words on either side, and as nearly as can be of one frequency. The
model reads the reference translations, so that its own errors are no part of it. Sentences are those of the training
corpus: of literal pairs too few stand in others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ...data.translations import Language, Pair, pairs
from ...errors import UserError, refusal
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...lenses.mwe_attention import MEASURES
from ...lenses.mwe_attention.extraction import Expression, Found, expressions, matches, places, words
from ...models.translator import collate
from ._translation import TranslationTask

__all__ = ["MatchedExpressions"]

_READ = 64  # sentences that are read at once
_EACH = 3  # occurrences of an expression at most
_TRIES = 5  # nearest literal pairs by frequency among which one is taken
Span = tuple[int, int]


@dataclass(frozen=True)
class _Place:
    """An occurrence: which sentence, its words on both sides, and what it is."""

    sentence: int
    source: Span
    target: Span
    words: Expression


@dataclass(frozen=True, kw_only=True)
class MatchedExpressions(TranslationTask):
    """A value for each occurrence; arms are ``literal pairs``, ``expressions`` and ``elsewhere``.

    The last one is a control: the rows of an expression's translation on as many tokens elsewhere in the sentence.

    Attributes:
        corpus, source, target: of :func:`manyheads.data.translations.pairs`.
        samples: occurrences.
        holds: PMI from which an n-gram is an expression, nats.
        loose: PMI up to which it is none.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("focus", "attention of a translation's rows on its source", higher=True),
        Metric("lift", "focus over that of even attention", higher=True),
        Metric("evenness", "evenness of the attention within the source span"),
        Metric("block", "share of the block that is one pattern (rank one)"),
        Metric("spread", "entropy of the rows of a translation", "nats"),
        Metric("frequency", "occurrences of the n-gram in the corpus, natural logarithm"),
    )

    corpus: str = "multi30k"
    source: Language = "en"
    target: Language = "de"
    samples: int = 300
    holds: float = 4.0
    loose: float = 2.5

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: pairs(self.corpus, self.source, self.target)("train"))

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = unit.params["seed"]
        train = pairs(self.corpus, self.source, self.target)("train")
        drawn, counts = run.kept(("occurrences", self.key), lambda: self._drawn(run, train))
        tokenizer, (model,) = self.trained(run, unit, train, seed)
        literal, mine = ([pair[i] for pair in drawn] for i in (0, 1))
        found = {"literal pairs": self._seen(run, model, tokenizer, train, literal, False)}
        found["expressions"] = self._seen(run, model, tokenizer, train, mine, False)
        found["elsewhere"] = self._seen(run, model, tokenizer, train, mine, True)
        for metric in MEASURES:
            known = np.isfinite([found[arm.name][metric] for arm in run.arms]).all(0)
            for arm in run.arms:
                for i in np.flatnonzero(known):
                    name = " ".join(mine[i].words)
                    yield self.row(metric, arm, found[arm.name][metric][i], f"{i}", context=name, seed=seed)
        for arm in run.arms:
            of = literal if arm.name == "literal pairs" else mine
            logs = [math.log(counts[place.words]) for place in of]
            yield from self.each("frequency", arm, logs, seed=seed)

    def _drawn(self, run: RunContext, train: Sequence[Pair]) -> tuple[list[tuple[_Place, _Place]], dict[Any, int]]:
        """Occurrences of a literal pair and of an expression, and how often each n-gram is met."""
        said = [([w for w, *_ in words(source)], [w for w, *_ in words(target)]) for source, target in train]
        sources, real = [source for source, _ in said], self.corpus == "multi30k"
        loose = expressions(sources, pmi=-math.inf, stop=20 if real else 0)
        kinds: dict[bool, list[Found]] = {
            False: [one for one in loose if one.pmi <= self.loose],
            True: expressions(sources, pmi=self.holds, stop=100 if real else 0),
        }
        rng, standing = run.rng(occurrences="expressions"), {}
        for kind, grams in kinds.items():
            matched = matches(said, [one.words for one in grams], stop=50 if real else 0)
            standing[kind] = _standing(said, matched, rng)
        drawn: list[tuple[_Place, _Place]] = []
        counts = {one.words: one.count for grams in kinds.values() for one in grams}
        free = {shape: list(places) for shape, places in standing[False].items()}
        whole = [(shape, place) for shape, places in sorted(standing[True].items()) for place in places]
        for at in rng.permutation(len(whole)):
            shape, place = whole[int(at)]
            near = sorted(
                free.get(shape, []), key=lambda x: (abs(math.log(counts[x.words] / counts[place.words])), x.sentence)
            )[:_TRIES]
            if near and len(drawn) < self.samples:
                other = near[int(rng.integers(len(near)))]
                free[shape].remove(other)
                drawn.append((other, place))
        if len(drawn) < 2:
            raise UserError(f"{self.corpus} has no expressions with literal pairs of their frequency; take more text")
        return drawn, counts

    def _seen(
        self, run: RunContext, model: Any, tokenizer: Any, train: Sequence[Pair], of: Sequence[_Place], elsewhere: bool
    ) -> dict[str, Any]:
        """The measures of each of ``of``, by name, ``[N]``."""
        import manyheads

        rng, records = run.rng(occurrences="elsewhere"), []
        for start in range(0, len(of), _READ):
            part, rows, said, stands = of[start : start + _READ], [], [], []
            for place in part:
                ids, spans = zip(*(_tokens(tokenizer, *x) for x in zip(train[place.sentence], (
                    place.source, place.target), strict=True)), strict=True)  # fmt: skip
                rows.append(ids)
                stands.append([_moved(spans[0], len(ids[0]) - 1, rng) if elsewhere else spans[0]])
                said.append([spans[1]])
            batch = collate(rows, run.device)
            roles = manyheads.TokenSpans({"expression": said}, {"expression": stands})
            with manyheads.watch(model, "mwe_attention", roles=roles) as seen, torch.no_grad():
                model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False)
            records += seen.compute().records["expressions"]
        return {name: np.array([record[name] for record in records]) for name in MEASURES}


def _standing(
    said: Sequence[tuple[list[str], list[str]]], matched: dict[Expression, tuple[Expression, float]],
    rng: np.random.Generator,
) -> dict[tuple[int, int], list[_Place]]:  # fmt: skip
    """Some occurrences of each expression beside its translation, by how many words both have."""
    firsts: dict[str, list[Expression]] = defaultdict(list)
    for one in matched:
        firsts[one[0]].append(one)
    found: dict[Expression, list[_Place]] = defaultdict(list)
    for n, (source, target) in enumerate(said):
        for one in {gram for word in set(source) for gram in firsts.get(word, ())}:
            mine, theirs = places(source, one), places(target, matched[one][0])
            if len(mine) == len(theirs) == 1:
                found[one].append(_Place(n, mine[0], theirs[0], one))
    made: dict[tuple[int, int], list[_Place]] = defaultdict(list)
    for one in sorted(found):
        for i in rng.permutation(len(found[one]))[:_EACH]:
            made[len(one), len(matched[one][0])].append(found[one][int(i)])
    return made


def _tokens(tokenizer: Any, text: str, span: Span) -> tuple[list[int], Span]:
    """Token ids of ``text``, and the tokens of its words ``span``."""
    coded, at = tokenizer(text, return_offsets_mapping=True), words(text)[span[0] : span[1]]
    first, last = at[0][1], at[-1][2]
    inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < last and b > first and b > a]
    return coded["input_ids"], (inside[0], inside[-1] + 1)


def _moved(span: Span, size: int, rng: np.random.Generator) -> Span:
    """Another span of that length among ``size`` tokens, apart from it where there is room."""
    length = span[1] - span[0]
    starts = [i for i in range(size - length + 1) if i + length <= span[0] or i >= span[1]] or [0]
    at = starts[int(rng.integers(len(starts)))]
    return at, at + length
