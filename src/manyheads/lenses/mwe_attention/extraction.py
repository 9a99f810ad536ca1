# SPDX-License-Identifier: Apache-2.0
"""Multi-word expressions of a corpus, and which expression of another language each goes with.

The paper tags words and matches patterns of tags (mwetoolkit), and aligns what it finds (MPAligner). No tagger is
needed here: a candidate is an n-gram of 2 to 5 words that is found five times or more, begins and ends with none of the
most frequent words, and holds together: its PMI,

    min over split points k of  log( p(w_1 ... w_n) / (p(w_1 ... w_k) p(w_k+1 ... w_n)) ),

is high. A part of a longer expression that is never met alone is none. Two expressions go with one another where each
is the other's best match by the Jaccard weight of their sentences, ``c(s, t) / (c(s) + c(t) - c(s, t))``.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError

__all__ = [
    "Expression", "Found", "augmented", "expressions", "jaccard", "matches", "places", "read_list", "words",
]  # fmt: skip

Expression = tuple[str, ...]
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Found:
    """An n-gram of a corpus.

    Attributes:
        words: of it.
        count: how often it is met.
        pmi: how it holds together, nats.
    """

    words: Expression
    count: int
    pmi: float


def words(sentence: str) -> list[tuple[str, int, int]]:
    """Words of a sentence in lower case, each with its first character and the one behind it."""
    return [(found[0].lower(), found.start(), found.end()) for found in _WORD.finditer(sentence)]


def _grams(sentences: Iterable[Sequence[str]], longest: int) -> Counter[Expression]:
    counts: Counter[Expression] = Counter()
    for sentence in sentences:
        for n in range(1, longest + 1):
            counts.update(tuple(sentence[i : i + n]) for i in range(len(sentence) - n + 1))
    return counts


def expressions(
    sentences: Sequence[Sequence[str]], *, pmi: float = 3.0, count: int = 5, longest: int = 5, stop: int = 100
) -> list[Found]:
    """N-grams that hold together, the most frequent first; the order of the corpus is nothing to it.

    Args:
        sentences: words of each.
        pmi: least, in nats; ``-math.inf`` for all candidates.
        count: least.
        longest: words of an expression.
        stop: so many of the most frequent words begin and end none.
    """
    counts = _grams(sentences, longest)
    single = sorted(((n, gram) for gram, n in counts.items() if len(gram) == 1), key=lambda x: (-x[0], x[1]))
    total, edges = sum(n for n, _ in single), {gram[0] for _, gram in single[:stop]}

    def holds(gram: Expression) -> float:
        parts = (counts[gram[:k]] * counts[gram[k:]] for k in range(1, len(gram)))
        return min(math.log(counts[gram] * total / part) for part in parts)

    kept = {
        gram: Found(gram, n, holds(gram))
        for gram, n in counts.items()
        if len(gram) > 1 and n >= count and gram[0] not in edges and gram[-1] not in edges
    }
    kept = {gram: one for gram, one in kept.items() if one.pmi >= pmi}
    inside = {
        part
        for gram, one in kept.items()
        for part in (gram[:-1], gram[1:])
        if part in kept and kept[part].count == one.count
    }
    return sorted((one for gram, one in kept.items() if gram not in inside), key=lambda x: (-x.count, x.words))


def jaccard(both: int, first: int, second: int) -> float:
    """``c(s, t) / (c(s) + c(t) - c(s, t))``; 1 where each is never met without the other."""
    return both / (first + second - both)


def matches(
    pairs: Sequence[tuple[Sequence[str], Sequence[str]]], sources: Iterable[Expression], *, least: float = 0.2,
    count: int = 5, longest: int = 3, stop: int = 50,
) -> dict[Expression, tuple[Expression, float]]:  # fmt: skip
    """For each source expression the target n-gram that goes with it, and the Jaccard weight of their sentences.

    A target may be a single word, as a compound is.

    Args:
        pairs: words of sentences and of their translations.
        sources: expressions to match.
        least: weight.
        count: least, of a target n-gram.
        longest: words of one.
        stop: so many of the most frequent target words begin and end none.
    """
    wanted = set(sources)
    sizes = sorted({len(one) for one in wanted})
    single = Counter(word for _, target in pairs for word in set(target))
    edges = {word for word, _ in sorted(single.items(), key=lambda x: (-x[1], x[0]))[:stop]}
    mine: Counter[Expression] = Counter()
    theirs: Counter[Expression] = Counter()
    both: dict[Expression, Counter[Expression]] = defaultdict(Counter)
    for source, target in pairs:
        said = {tuple(source[i : i + n]) for n in sizes for i in range(len(source) - n + 1)} & wanted
        grams = {
            tuple(target[i : i + n])
            for n in range(1, longest + 1)
            for i in range(len(target) - n + 1)
            if target[i] not in edges and target[i + n - 1] not in edges
        }
        theirs.update(grams)
        mine.update(said)
        for one in said:
            both[one].update(grams)
    weights = {
        (one, gram): jaccard(n, mine[one], theirs[gram])
        for one, seen in both.items()
        for gram, n in seen.items()
        if theirs[gram] >= count
    }
    best, back = _best(weights, 0), _best(weights, 1)
    return {
        one: (gram, weights[one, gram])
        for one, gram in best.items()
        if back[gram] == one and weights[one, gram] >= least
    }


def _best(weights: dict[tuple[Expression, Expression], float], side: int) -> dict[Expression, Expression]:
    """For each expression of a side the other's of the greatest weight; the longer one of equals."""
    found: dict[Expression, tuple[tuple[float, int, Expression], Expression]] = {}
    for pair, weight in weights.items():
        key, other = pair[side], pair[1 - side]
        rank = (weight, len(other), other)
        if key not in found or rank > found[key][0]:
            found[key] = (rank, other)
    return {key: other for key, (_, other) in found.items()}


def places(sentence: Sequence[str], expression: Expression) -> list[tuple[int, int]]:
    """Where ``expression`` stands among the words of ``sentence``: first word and the one behind it."""
    n = len(expression)
    return [(i, i + n) for i in range(len(sentence) - n + 1) if tuple(sentence[i : i + n]) == expression]


def augmented(
    pairs: Sequence[tuple[str, str]], matched: dict[Expression, tuple[Expression, float]], how: str = "phrases",
    share: float = 0.1, seed: int = 0,
) -> list[tuple[str, str]]:  # fmt: skip
    """``pairs`` and, shuffled among them, what the paper adds.

    Args:
        pairs: of sentences.
        matched: of :func:`matches`.
        how: ``phrases`` adds each pair of expressions as a line of its own, ``sentences`` each pair of sentences that
            has one once more.
        share: of the corpus that is added at most; those of the greatest weight, or the first sentences.
        seed: of the shuffling.
    """
    if how == "phrases":
        ranked = sorted(matched.items(), key=lambda x: (-x[1][1], x[0]))
        added = [(" ".join(source), " ".join(target)) for source, (target, _) in ranked]
    elif how == "sentences":
        added = [
            pair
            for pair in pairs
            if any(
                places([w for w, *_ in words(pair[0])], one) and places([w for w, *_ in words(pair[1])], other)
                for one, (other, _) in matched.items()
            )
        ]
    else:
        raise UserError(f"{how!r} is no way to augment a corpus; write phrases or sentences")
    made = [*pairs, *added[: int(share * len(pairs))]]
    return [made[i] for i in np.random.default_rng(seed).permutation(len(made))]


def read_list(path: str | Path) -> list[Expression]:
    """Expressions of a list of one's own, one a line.

    Raises:
        UserError: it cannot be read, or a line is a single word.
    """
    try:
        found = [tuple(w for w, *_ in words(line)) for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); write an expression a line") from None
    if alone := [one for one in found if len(one) == 1]:
        raise UserError(f"{path}: {alone[0][0]!r} is a single word; an expression has two or more")
    return [one for one in found if one]
