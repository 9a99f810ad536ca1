# SPDX-License-Identifier: Apache-2.0
"""What rankers are judged on: long documents of a collection, BM25's candidates for each query, and their grades."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.ranking import Bundle, Collection, bundled, folds, words
from ...errors import UserError
from .._embedded import embedded_texts

__all__ = ["BM25", "Rankings", "Texts", "judged", "passage_vectors"]

_HARD = 50  # documents that BM25 has first, of which those that are not relevant are hard to tell from one that is
_PASSAGE = 160  # words of a passage that an encoder reads; the usual ones read 256 tokens
_TOP = 10


class BM25:
    """Okapi BM25 as Lucene has it, by the library bm25s (``[train]``): scores of all of ``texts``."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        # bm25s starts JAX where that is installed, which by default takes three quarters of a GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import bm25s
        except ImportError as error:
            raise UserError("ranking needs bm25s: pip install 'manyheads[train]'") from error
        self._index: Any = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
        self._index.index([list(text) for text in texts], show_progress=False)
        self._count = len(texts)

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """float32 ``[N]``; 0 where no word of the query stands."""
        known = [word for word in query if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self._count, dtype=np.float32)
        found: np.ndarray = self._index.get_scores(known)
        return found


@dataclass(frozen=True)
class Texts:
    """The words of a collection.

    Attributes:
        of: where they are from.
        documents, queries: words by id.
        hard: by judged query, documents that are not relevant and that BM25 has among its first.
    """

    of: Collection
    documents: Mapping[str, list[str]]
    queries: Mapping[str, list[str]]
    hard: Mapping[str, list[str]]

    @classmethod
    def read(cls, found: Collection) -> Texts:
        """Split into words, and look for what is hard."""
        documents = {name: read for name, text in found.documents.items() if (read := words(text))}
        queries = {name: words(found.queries[name]) for name in found.judged}
        ids, index, hard = list(documents), BM25(list(documents.values())), {}
        for query, text in queries.items():
            first = np.argsort(-index.scores(text), kind="stable")[:_HARD]
            hard[query] = [ids[i] for i in first if ids[i] not in found.qrels[query]]
        return cls(found, documents, queries, hard)

    def pairs(
        self, queries: Sequence[str], count: int, parts: int, rng: np.random.Generator
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """Queries drawn from these, each with the parts of a document of which one is relevant, and of one that is not.

        The part that the latter is built around is of the hard ones every second time.
        """
        ids = list(self.documents)
        for _ in range(count):
            query = queries[int(rng.integers(len(queries)))]
            good = [name for name in self.of.qrels[query] if name in self.documents]
            hard = self.hard[query] if rng.random() < 0.5 else []
            other = hard or self._others(query, ids, 1, rng)
            made = []
            for some in (good, other):
                around = self._others(query, ids, parts - 1, rng)
                around.insert(int(rng.integers(parts)), some[int(rng.integers(len(some)))])
                made.append(around)
            yield query, made[0], made[1]

    def _others(self, query: str, ids: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
        """Documents that are not relevant."""
        found: list[str] = []
        while len(found) < count:
            name = ids[int(rng.integers(len(ids)))]
            if name not in self.of.qrels[query]:
                found.append(name)
        return found


@dataclass(frozen=True)
class Rankings:
    """Documents to rank and how they are graded.

    Attributes:
        texts: of the collection.
        parts: of a training document.
        train, tuning, test: queries.
        bundles: the documents.
        index: of them.
        chosen: by query of ``tuning`` and ``test``, which documents are ranked, BM25's first.
    """

    texts: Texts
    parts: int
    train: list[str]
    tuning: list[str]
    test: list[str]
    bundles: list[Bundle]
    index: BM25
    chosen: Mapping[str, list[int]]

    @classmethod
    def of(
        cls, texts: Texts, *, parts: int, count: int, fold: int, candidates: int, order: np.random.Generator,
        rng: np.random.Generator,
    ) -> Rankings:  # fmt: skip
        """Fold ``fold`` of ``count``, in the queries' ``order``, on documents of ``parts`` drawn by ``rng``."""
        train, tuning, test = folds(texts.of, count, fold, order)
        bundles = bundled(texts.documents, parts, rng)
        index = BM25([one.words for one in bundles])
        chosen = {
            query: np.argsort(-index.scores(texts.queries[query]), kind="stable")[: candidates or None].tolist()
            for query in (*tuning, *test)
        }
        return cls(texts, parts, train, tuning, test, bundles, index, chosen)

    def grades(self, query: str) -> np.ndarray:
        """Grade of every document, that of its best part: int ``[N]``."""
        qrels = self.texts.of.qrels[query]
        return np.array([max(qrels.get(part, 0) for part in one.parts) for one in self.bundles])

    def depths(self, query: str, edges: Sequence[int]) -> np.ndarray:
        """Which of the stretches between ``edges`` all relevant parts of a document begin in, -1 for none: ``[N]``."""
        qrels, found = self.texts.of.qrels[query], np.full(len(self.bundles), -1)
        for i, one in enumerate(self.bundles):
            places = {
                int(np.searchsorted(edges, start, side="right"))
                for part, start in zip(one.parts, one.starts, strict=True)
                if part in qrels
            }
            if len(places) == 1:
                found[i] = places.pop()
        return found


def judged(scores: Sequence[float], chosen: Sequence[int], grades: np.ndarray, among: np.ndarray) -> dict[str, float]:
    """nDCG and reciprocal rank within the first ten, gains as graded, of ``scores`` of the documents ``chosen``.

    Args:
        scores: as many as are chosen; what is not chosen stands behind.
        chosen: indices.
        grades: ``[N]``.
        among: bool ``[N]``, the documents that there are; others count as if they were not.
    """
    try:
        from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_reciprocal_rank
    except ImportError as error:
        raise UserError("ranking needs torchmetrics: pip install 'manyheads[train]'") from error
    every = np.full(len(grades), min(scores) - 1.0)
    every[list(chosen)] = scores
    # Places from the end, for torchmetrics takes what scores 0 or less for not found, and rounds scores to float32.
    ranked = torch.from_numpy(np.unique(every[among], return_inverse=True)[1] + 1.0)
    target = torch.from_numpy(grades[among])
    return {
        "ndcg": float(retrieval_normalized_dcg(ranked, target, top_k=_TOP)),
        "mrr": float(retrieval_reciprocal_rank(ranked, target > 0, top_k=_TOP)),
    }


def passage_vectors(model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Embeddings ``[P, dim]`` of length 1 of the passages of each text: the mean of a passage's last hidden states."""
    cut = [
        (name, " ".join(text[start : start + _PASSAGE]))
        for name, text in texts.items()
        for start in range(0, max(1, len(text)), _PASSAGE)
    ]
    cut.sort(key=lambda one: len(one[1]))
    found: dict[str, list[Tensor]] = {name: [] for name in texts}
    vectors = embedded_texts(model, tokenizer, [text for _, text in cut], None, at_once=32)
    for (name, _), vector in zip(cut, vectors, strict=True):
        found[name].append(vector)
    return {name: torch.stack(own) for name, own in found.items()}
