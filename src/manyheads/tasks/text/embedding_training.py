# SPDX-License-Identifier: Apache-2.0
"""How well embeddings tell similar sentences and relevant documents, after a contrastive training of every arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...conversion import EncoderConversion
from ...data.ranking import collection, words
from ...data.sentences import PAIRS, pairs
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...models.text_encoder import TextEncoder, made_pooler
from ...training.encoding import pair_loss, tune
from .._statistics import rank_correlation_values
from ._text_task import model_of
from .encoder_tuning import cut, encoder_for

__all__ = ["EmbeddingTraining", "cosines", "triples"]

_NEAR, _FAR = 4.5, 3.5  # relatedness of a pair that fits, and of one that does not
Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class EmbeddingTraining(Task):
    """Train the encoder of every arm on sentences that entail each other, and judge its cosines.

    Training pairs are SICK's, with a sentence about the same that says something else as a hard negative. Arms train as
    many parameters: adapters of those with smaller poolers have a higher rank. In place of a strategy the option
    ``encoder`` names a published encoder, which is not trained, or ``words``: counts of words, weighted by their
    rarity. ``steps`` of 0 among an arm's options leaves it untrained.

    ``similarity`` is Spearman's correlation of cosines with people's scores, as a jackknife pseudo-value for each
    pair, whose mean is the correlation. ``ndcg`` is of the first ten of Cranfield's documents that some chosen query
    has judged relevant, beside others.

    Attributes:
        sets: pairs of :mod:`manyheads.data.sentences` that similarity is of.
        samples: pairs of each set.
        queries, documents: of Cranfield.
        steps, batch: of the training.
        lr, head_lr: highest rates of adapters and of the pooler.
        rank: of adapters of the arm with the largest pooler.
        layers: lowest ones of the model that are kept; 0 for all.
        length: tokens of a text at most.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("similarity", "rank correlation of cosines with people's scores", higher=True),
        Metric("ndcg", "nDCG@10 of cosines", higher=True, kind="share"),
        Metric("trained_parameters", "parameters that are trained"),
        Metric("training_loss", "loss in the last quarter of the training, nats"),
    )

    sets: tuple[str, ...] = ("sts-2014-images", "sts-2014-headlines")
    samples: int = 500
    queries: int = 100
    documents: int = 700
    steps: int = 200
    batch: int = 32
    lr: float = 1e-3
    head_lr: float = 1e-3
    rank: int = 16
    layers: int = 0
    length: int = 128

    def __post_init__(self) -> None:
        if not self.sets or set(self.sets) - set(PAIRS):
            raise UserError(f"sets are of {', '.join(PAIRS)}")
        if min(self.samples - 3, self.queries, self.documents - 10, self.steps, self.batch, self.rank) < 0:
            raise UserError("give 3 samples, 10 documents or more, and no counts below 0")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: self._triples(run), lambda: self._similar(run), lambda: self._ranked(run))

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for seed in run.seeds:
            for arm in run.arms:
                cost = 0.5 + (self._steps(arm) * self.batch * 9 / (4 * self.samples + self.documents))
                given = {"arm": arm.key, "seed": seed}
                found.append(
                    WorkUnit(self.key, f"{arm.key}/{seed}", cost, f"{arm.key}: embeddings, training {seed + 1}", given)
                )
        return found

    def _steps(self, arm: Arm) -> int:
        return 0 if "encoder" in arm.options else int(arm.options.get("steps", self.steps))

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        if steps := self._steps(arm):
            encoder = self._fresh(run, arm, seed)
            trained, losses = self._trained(run, encoder, seed, steps)
            late = losses[-max(1, steps // 4) :]
            yield self.row("training_loss", arm, sum(late) / len(late), f"training {seed}", seed=seed)
            yield self.row("trained_parameters", arm, trained, "model", seed=seed)
            similar, ranked = self._judged(run, encoder.encode)
        else:  # the same for all seeds
            words_alone = arm.options.get("encoder") == "words"
            similar, ranked = run.kept(
                ("as it is", self.key, arm.key),
                lambda: self._judged(run, _word_vectors if words_alone else self._fresh(run, arm, 0).encode),
            )
        for name, values in similar.items():
            for one, value in zip(self._similar(run)[name], values, strict=True):
                yield self.row("similarity", arm, value, f"{name} {one.name}", seed=seed, at={"pairs": name})
        for query, value in zip(self._ranked(run)[0], ranked, strict=True):
            yield self.row("ndcg", arm, value, f"query {query}", seed=seed)

    def _fresh(self, run: RunContext, arm: Arm, seed: int) -> TextEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, pooler=seed))
            return encoder_for(run, arm, self.layers, 0, self.length)

    def _judged(self, run: RunContext, encode: Encode) -> tuple[dict[str, list[float]], list[float]]:
        """Pseudo-values of each set of pairs, and what each query's ranking is worth."""
        from ..training._rankings import judged

        similar = {}
        for name, some in self._similar(run).items():
            said = cosines(encode([one.first for one in some] + [one.second for one in some]))
            similar[name] = rank_correlation_values(said, [one.score for one in some]).tolist()
        asked, documents, grades = self._ranked(run)
        vectors = nn.functional.normalize(encode([*asked.values(), *documents]), dim=-1)
        scores = (vectors[: len(asked)] @ vectors[len(asked) :].T).tolist()
        chosen, every = range(len(documents)), np.ones(len(documents), bool)
        return similar, [judged(some, chosen, own, every)["ndcg"] for some, own in zip(scores, grades, strict=True)]

    def _trained(self, run: RunContext, encoder: TextEncoder, seed: int, steps: int) -> tuple[int, list[float]]:
        """How many parameters were trained, and the losses."""
        found = self._triples(run)
        per = sum(m.in_features + m.out_features for m in encoder.model.modules() if isinstance(m, nn.Linear))
        own = sum(p.numel() for p in encoder.pooler.parameters())
        rank = self.rank + round((self._largest(run) - own) / per)

        def get_batch(step: int) -> list[Any]:
            some = run.rng(training=seed, step=step).choice(len(found), self.batch, replace=False).tolist()
            return [encoder.read([found[i][k] for i in some]) for k in range(3)]

        state = tune(
            encoder, get_batch, pair_loss, steps, lr=self.lr, head_lr=self.head_lr, train="lora", rank=rank,
            on_step=lambda _: run.advance(self.batch * 9 / (4 * self.samples + self.documents)),
        )  # fmt: skip
        return rank * per + own, state.losses

    def _largest(self, run: RunContext) -> int:
        """Parameters of the largest pooler among the arms."""

        def make() -> int:
            from ...integrations.anatomy import ModelAnatomy

            anatomy, sizes = ModelAnatomy(cut(model_of(run), self.layers)), [0]
            for arm in run.arms:
                if arm.spec:
                    design = cast(EncoderConversion, arm.strategy).design(anatomy)
                    with torch.device("meta"):
                        sizes.append(sum(p.numel() for p in made_pooler(design.pooler, design.config).parameters()))
            return max(sizes)

        return cast(int, run.kept(("largest pooler", self.layers), make))

    def _triples(self, run: RunContext) -> list[tuple[str, str, str]]:
        return cast(list[tuple[str, str, str]], run.kept("triples", triples))

    def _similar(self, run: RunContext) -> dict[str, list[Any]]:
        def make() -> dict[str, list[Any]]:
            found = {name: [one for one in pairs(name) if one.part == "test"] for name in self.sets}
            return {
                name: [some[i] for i in run.rng(pairs=name).permutation(len(some))[: self.samples]]
                for name, some in found.items()
            }

        return cast(dict[str, list[Any]], run.kept(("similar", self.sets, self.samples), make))

    def _ranked(self, run: RunContext) -> tuple[dict[str, str], list[str], list[np.ndarray]]:
        """Queries, documents, and grades of these for each query."""

        def make() -> tuple[dict[str, str], list[str], list[np.ndarray]]:
            found, rng = collection("cranfield"), run.rng(collection="cranfield")
            drawn = [found.judged[i] for i in rng.permutation(len(found.judged))]
            chosen, kept = list[str](), list[str]()
            for query in drawn[: self.queries]:
                more = [d for d in found.qrels[query] if d not in kept]
                if len(kept) + len(more) <= self.documents:
                    chosen.append(query)
                    kept += more
            others = [d for d in found.documents if d not in kept]
            kept += [others[i] for i in rng.permutation(len(others))[: self.documents - len(kept)]]
            grades = [np.array([found.qrels[query].get(d, 0) for d in kept]) for query in chosen]
            return {q: found.queries[q] for q in chosen}, [found.documents[d] for d in kept], grades

        held: tuple[dict[str, str], list[str], list[np.ndarray]] = run.kept(
            ("ranked", self.queries, self.documents), make
        )
        return held


def triples() -> list[tuple[str, str, str]]:
    """Sentences of SICK's training part, each with one that follows from it and one that says something else."""
    found = [one for one in pairs("sick") if one.part == "train"]
    others: dict[str, list[str]] = {}
    for one in found:
        if one.relation == "CONTRADICTION" or one.score < _FAR:
            others.setdefault(one.first, []).append(one.second)
            others.setdefault(one.second, []).append(one.first)
    near = [one for one in found if one.relation == "ENTAILMENT" and one.score >= _NEAR and one.first in others]
    return [(one.first, one.second, others[one.first][i % len(others[one.first])]) for i, one in enumerate(near)]


def cosines(vectors: Tensor) -> np.ndarray:
    """Of the first half of ``[2 N, D]`` with the second: ``[N]``."""
    one, two = nn.functional.normalize(vectors.double(), dim=-1).chunk(2)
    found: np.ndarray = (one * two).sum(1).numpy()
    return found


def _word_vectors(texts: Sequence[str]) -> Tensor:
    """Counts of words times ``log(N / texts that have it)``, ``[N, words]``."""
    read = [Counter(words(text)) for text in texts]
    known = {word: i for i, word in enumerate(sorted(set().union(*read)))}
    found = torch.zeros(len(texts), len(known))
    for row, counts in zip(found, read, strict=True):
        for word, count in counts.items():
            row[known[word]] = count
    return found * (len(texts) / (found > 0).sum(0)).log()
