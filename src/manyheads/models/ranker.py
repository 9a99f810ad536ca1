# SPDX-License-Identifier: Apache-2.0
"""A model that ranks documents for a query: a vocabulary, vectors of its words, and what a ``Ranker`` makes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.ranking import words
from ..errors import UserError
from ..spec import parse
from ..strategy import Ranker, RankerConfig, Strategy
from .word_vectors import word_vectors

__all__ = ["PAD", "UNKNOWN", "RankingModel", "padded", "vocabulary"]

PAD, UNKNOWN = 0, 1
_AT_ONCE = 32_768  # words of documents that are read at once
_PAIRS = {"cpu": 2**22, "cuda": 2**28}  # entries of the kernels of pairs scored at once: what a cache holds, or 1 GB


class RankingModel(nn.Module):
    """Scores documents for queries.

    Attributes:
        strategy: what ranks.
        config: its size.
        ids: of words; of none that is padding (0) or unknown (1).
    """

    def __init__(self, strategy: Strategy | str, vocabulary: Sequence[str], config: RankerConfig | None = None) -> None:
        super().__init__()
        ranker = parse(strategy)
        if not isinstance(ranker, Ranker):
            raise UserError(f"{ranker.slug} ranks no documents; `manyheads find ranking` says what does")
        self.strategy, self.config = ranker, config or RankerConfig()
        self.ids = {word: i for i, word in enumerate(vocabulary, UNKNOWN + 1)}
        self.embed = nn.Embedding(len(self.ids) + 2, self.config.dim, padding_idx=PAD)
        self.ranker: Any = ranker.ranker(self.config)

    @classmethod
    def on(
        cls, strategy: Strategy | str, texts: Iterable[Sequence[str]], config: RankerConfig | None = None, *,
        least: int = 2, most: int = 20_000,
    ) -> RankingModel:  # fmt: skip
        """An untrained model of the words of ``texts`` that occur ``least`` times, with vectors of their company."""
        held = list(texts)
        model = cls(strategy, vocabulary(held, least, most), config)
        vectors = word_vectors([model.numbered(text) for text in held], len(model.ids) + 2, model.config.dim)
        model.embed.load_state_dict({"weight": vectors})
        return model

    def numbered(self, text: Sequence[str]) -> list[int]:
        """Ids of words."""
        return [self.ids.get(word, UNKNOWN) for word in text]

    def queries(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Ids ``[N, Q]`` of queries, cut to the words that are read."""
        return padded([self.numbered(text[: self.config.query]) for text in texts], self.embed.weight.device)

    def documents(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Ids ``[N, T]`` of documents, likewise."""
        return padded([self.numbered(text[: self.strategy.terms]) for text in texts], self.embed.weight.device)

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Scores ``[B]``, float32, of ids ``[B, Q]`` and ``[B, T]``."""
        q_real, d_real = queries > UNKNOWN, documents > UNKNOWN
        q = self.ranker.query(self.embed(queries) * q_real[..., None], q_real)
        d = self.ranker.document(self.embed(documents) * d_real[..., None], d_real)
        score: Tensor = self.ranker.score(q, q_real, d, d_real)
        return score

    @torch.no_grad()
    def scores(
        self, queries: Sequence[Sequence[str]], documents: Sequence[Sequence[str]], chosen: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Scores of the documents ``chosen`` for each query, by their index; a document is read once for all queries.

        Args:
            queries, documents: their words.
            chosen: for each query, which documents.
        """
        read = [self.numbered(text[: self.strategy.terms]) for text in documents]
        asked: dict[int, list[tuple[int, int]]] = {}
        for i, some in enumerate(chosen):
            for place, which in enumerate(some):
                asked.setdefault(which, []).append((i, place))
        q = self.queries(queries)
        q_real = q > UNKNOWN
        q_read = self.ranker.query(self.embed(q) * q_real[..., None], q_real)
        found = [[0.0] * len(some) for some in chosen]
        for group in _groups(sorted(asked, key=lambda d: len(read[d])), read):
            d = padded([read[i] for i in group], q.device)
            d_real = d > UNKNOWN
            d_read = self.ranker.document(self.embed(d) * d_real[..., None], d_real)
            pairs = [(i, row, place) for row, document in enumerate(group) for i, place in asked[document]]
            step = max(1, _PAIRS.get(q.device.type, 2**22) // (16 * q.shape[1] * d.shape[1]))
            for start in range(0, len(pairs), step):
                part = pairs[start : start + step]
                left, right = ([pair[k] for pair in part] for k in (0, 1))
                scores = self.ranker.score(q_read[left], q_real[left], d_read[right], d_real[right]).tolist()
                for (i, _, place), score in zip(part, scores, strict=True):
                    found[i][place] = score
        return found

    def rank(self, query: str, documents: Sequence[str]) -> list[tuple[int, float]]:
        """Index and score of ``documents``, the best first.

        model = RankingModel.load("runs/ranking/models/tkl_local/seed-0")
        model.rank("lift of a swept wing", [page.read_text() for page in pages])
        """
        read = [words(text) for text in documents]
        if not any(word in self.ids for word in words(query)):
            raise UserError(
                f"none of the words of {query!r} is known to this model; ask in the words of its collection"
            )
        found = self.scores([words(query)], read, [range(len(read))])[0]
        return sorted(enumerate(found), key=lambda pair: -pair[1])

    def save(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"strategy": self.strategy.spec, **asdict(self.config), "words": list(self.ids)})
        (place / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, place / "model.safetensors")

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> RankingModel:
        """What :meth:`save` wrote.

        Raises:
            UserError: there is no such model.
        """
        place = Path(folder)
        try:
            held: dict[str, object] = json.loads((place / "config.json").read_text(encoding="utf-8"))
            strategy, known = str(held.pop("strategy")), held.pop("words")
            assert isinstance(known, list)
            model = cls(strategy, known, RankerConfig(**held))  # type: ignore[arg-type]
            model.load_state_dict(load_file(place / "model.safetensors", device=device))
        except (FileNotFoundError, KeyError) as error:
            raise UserError(f"{folder} holds no ranking model: {error.args[-1]} is missing") from error
        return model.to(device).eval()


def vocabulary(texts: Iterable[Sequence[str]], least: int, most: int) -> list[str]:
    """The words that occur ``least`` times or more, the commonest ``most`` of them, the commonest first."""
    counts = Counter(word for text in texts for word in text)
    order = sorted((word for word, count in counts.items() if count >= least), key=lambda word: (-counts[word], word))
    return order[:most]


def padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """Rows of ids as one tensor ``[N, longest]``, padded on the right; one column at least."""
    longest = max(1, *map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], device=device)


def _groups(order: Sequence[int], read: Mapping[int, Sequence[int]] | Sequence[Sequence[int]]) -> Iterable[list[int]]:
    """Documents in their order, by as many as are read at once."""
    group: list[int] = []
    for d in order:
        if group and (len(group) + 1) * len(read[d]) > _AT_ONCE:
            yield group
            group = []
        group.append(d)
    if group:
        yield group
