# SPDX-License-Identifier: Apache-2.0
"""How well rankers of each arm, trained on a collection's judgements, rank long documents for queries of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data.ranking import collection
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...models.ranker import PAD, RankingModel
from ...strategy import Ranker, RankerConfig
from ...training.fit import Diverged, TrainState
from ...training.ranking import Pairs, train_ranker
from ._decoders import mixer_of
from ._rankings import Rankings, Texts, judged, passage_vectors
from ._trained import arm_folder

__all__ = ["Ranking"]

RULES = ("bm25", "embedding", "random")


@dataclass(frozen=True, kw_only=True)
class Ranking(Task):
    """Rank documents for queries that no training saw, by folds.

    The seed says which fold of the queries tests, and which documents are laid together where ``parts`` is above 1:
    long documents are then made up, of real texts and judgements (:mod:`manyheads.data.ranking`). Training documents
    are laid together anew for every pair. Of the weights at ``looks`` times of the training those are kept that rank
    the tuning queries best. An arm ranks by its strategy, or by the rule that its option ``ranker`` names: ``bm25``;
    ``embedding``, the best cosine of the query and a passage of 160 words, by a published encoder as it is;
    ``random``.

    ``ndcg`` and ``mrr`` are of the first ten. ``ndcg_by_depth`` counts as relevant only the documents all of whose
    relevant parts begin in a stretch of words, and leaves out those that have others.

    Attributes:
        collection: a name of :data:`manyheads.data.ranking.NAMES`, or a folder; the run's ``data["collection"]`` first.
        parts: documents of the collection to one that is ranked.
        folds: of the queries.
        candidates: documents that BM25 puts first, which are ranked; 0 for all.
        edges: words at which a stretch ends.
        dim, heads, layers, hidden: of a model; fused attention on a GPU needs 8, 16, 24, ... channels of a head.
        steps, batch: of a training, and pairs of a step.
        rates: learning rates that every arm tries on the first fold, judged by the tuning queries.
        tune_steps: of a training that only chooses the rate; 0 for ``steps``.
        looks: times that the tuning queries are ranked.
        encoder: whose embeddings rank, see :func:`manyheads.models.load_reader`.
        only: names of the arms that are measured; all when empty.
        label: what it is called where an experiment ranks twice.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("ndcg", "nDCG@10", higher=True, kind="share"),
        Metric("mrr", "MRR@10", higher=True, kind="share"),
        Metric("ndcg_by_depth", "nDCG@10 by where the answer begins", higher=True, kind="share"),
        Metric("tuning_ndcg", "nDCG@10 on the tuning queries", higher=True),
    )

    collection: str = "cranfield"
    parts: int = 8
    folds: int = 5
    candidates: int = 0
    edges: tuple[int, ...] = (200, 400)
    dim: int = 160
    heads: int = 10
    layers: int = 2
    hidden: int = 100
    steps: int = 300
    batch: int = 16
    rates: tuple[float, ...] = (5e-4,)
    tune_steps: int = 0
    looks: int = 5
    encoder: str = "all-minilm-l6-v2"
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if min(self.parts, self.steps, self.batch, self.looks) < 1 or self.folds < 3 or not self.rates:
            raise UserError("parts, steps, batch and looks are 1 or more, folds 3 or more, rates one or more")
        if 0 < self.candidates < 10:
            raise UserError("the first ten are judged: give 10 candidates or more, or 0 for all")

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for seed in run.seeds:
            for arm in self.measured(run):
                trained = "ranker" not in arm.options
                cost = float(self.steps if trained else 1)
                label = f"{arm.key}: ranking, {'training' if trained else 'fold'} {seed + 1}"
                given = {"arm": arm.key, "seed": seed}
                found.append(WorkUnit(self.key, f"{arm.key}/{seed}", cost, label, given, shares=f"fold {seed}"))
        return found

    def measured(self, run: RunContext) -> list[Arm]:
        """Arms that are measured.

        Raises:
            UserError: one ranks nothing.
        """
        arms = [arm for arm in run.arms if not self.only or arm.name in self.only]
        for arm in arms:
            rule = arm.options.get("ranker")
            if (rule is None and not isinstance(mixer_of(run, arm), Ranker)) or rule not in (None, *RULES):
                raise UserError(
                    f"{arm.key} ranks no documents; give a Ranker, or the option ranker: {', '.join(RULES)}"
                )
        return arms

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: self._rankings(run, run.seeds[0]))

    def guard(self, run: RunContext) -> None:
        """Refuse an encoder that cannot be loaded before anything is trained."""
        if any(arm.options.get("ranker") == "embedding" for arm in self.measured(run)):
            _passages(run, self.encoder, self._texts(run))

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        rule = arm.options.get("ranker")
        held = self._rankings(run, seed)
        if rule is None:
            rate = self._rate(run, arm)
            model, seen, state = self._trained(run, arm, seed, rate, self.steps)
            if run.folder is not None:
                model.save(arm_folder(run.folder, arm.key) / f"{self.key}-{seed}")
            losses = [round(sum(x) / len(x), 4) for x in _pieces(state.losses, 8)]
            about = {"rate": rate, "losses": losses, "looks": seen, "seconds": state.seconds}
            yield self.row("tuning_ndcg", arm, max(seen), f"fold {seed}", seed=seed, about=about)
            scores = self._scores(model, held, held.test)
        else:
            scores = _by_rule(self, run, rule, seed, held)
        for query, some in zip(held.test, scores, strict=True):
            grades, depths, name = held.grades(query), held.depths(query, self.edges), f"query {query}"
            for metric, value in judged(some, held.chosen[query], grades, grades >= 0).items():
                yield self.row(metric, arm, value, name, seed=seed)
            for i, stretch in enumerate(_stretches(self.edges) if self.edges else ()):
                if (depths == i).any():
                    found = judged(some, held.chosen[query], grades, (depths == i) | (grades == 0))["ndcg"]
                    yield self.row("ndcg_by_depth", arm, found, name, seed=seed, at={"depth": stretch})

    def _texts(self, run: RunContext) -> Texts:
        return cast(
            Texts,
            run.kept(
                ("ranked", self.collection),
                lambda: Texts.read(collection(run.data.get("collection") or self.collection)),
            ),
        )

    def _rankings(self, run: RunContext, seed: int) -> Rankings:
        def make() -> Rankings:
            return Rankings.of(
                self._texts(run), parts=self.parts, count=self.folds, fold=seed, candidates=self.candidates,
                order=run.rng(folds=self.folds), rng=run.rng(bundles=self.parts, training=seed),
            )  # fmt: skip

        return cast(Rankings, run.kept_last("rankings", (self.key, seed), make))

    def _rate(self, run: RunContext, arm: Arm) -> float:
        """The rate at which the arm ranks the tuning queries of the first fold best, the lower of two equals."""
        if len(self.rates) == 1:
            return self.rates[0]

        def make() -> float:
            first, best = run.seeds[0], {}
            for rate in self.rates:
                try:
                    best[rate] = max(self._trained(run, arm, first, rate, self.tune_steps or self.steps)[1])
                except Diverged:
                    continue
            if not best:
                raise UserError(f"{arm.key}: training diverges at all rates; give lower ones")
            return max(best, key=lambda rate: (best[rate], -rate))

        return cast(float, run.kept(("rate", self.key, arm.key), make))

    def _trained(
        self, run: RunContext, arm: Arm, seed: int, rate: float, steps: int
    ) -> tuple[RankingModel, list[float], TrainState]:  # fmt: skip
        """The arm's model of a seed, how it ranked the tuning queries at each look, and its training."""
        held, model = self._rankings(run, seed), self._fresh(run, mixer_of(run, arm), seed).to(run.device)
        ids = {name: torch.tensor(model.numbered(text)) for name, text in held.texts.documents.items()}

        def get_batch(step: int) -> Pairs:
            drawn = held.texts.pairs(held.train, self.batch, held.parts, run.rng(training=seed, step=step))
            queries, better, worse = zip(*drawn, strict=True)
            asked = model.queries([held.texts.queries[query] for query in queries])
            both = [torch.cat([ids[part] for part in parts])[: model.strategy.terms] for parts in (*better, *worse)]
            read = pad_sequence(both, batch_first=True, padding_value=PAD).to(run.device)
            return asked, read[: self.batch], read[self.batch :]

        seen: list[float] = []
        best: dict[str, Any] = {}
        every = max(1, steps // self.looks)

        def on_step(state: TrainState) -> None:
            run.advance(1.0)
            if state.step % every and state.step < steps:
                return
            model.eval()
            scores = self._scores(model, held, held.tuning)
            found = [
                judged(some, held.chosen[query], held.grades(query), held.grades(query) >= 0)["ndcg"]
                for query, some in zip(held.tuning, scores, strict=True)
            ]
            seen.append(sum(found) / len(found))
            if seen[-1] == max(seen):
                best.update(copy.deepcopy(model.state_dict()))
            model.train()

        state = train_ranker(model, get_batch, steps, lr=rate, on_step=on_step)
        model.load_state_dict(best)
        return model, seen, state

    def _fresh(self, run: RunContext, strategy: Any, seed: int) -> RankingModel:
        """An untrained model; the vectors of its words are made once for all arms."""
        texts = self._texts(run).documents
        config = RankerConfig(dim=self.dim, heads=self.heads, layers=self.layers, hidden=self.hidden)
        with torch.random.fork_rng(devices=[]):
            key = ("vectors", self.collection, config.dim)
            first: RankingModel = run.kept(key, lambda: RankingModel.on(strategy, texts.values(), config))
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            model = RankingModel(strategy, list(first.ids), config)
        model.embed.load_state_dict(first.embed.state_dict())
        return model

    def _scores(self, model: RankingModel, held: Rankings, queries: Sequence[str]) -> list[list[float]]:
        asked = [held.texts.queries[query] for query in queries]
        return model.scores(asked, [one.words for one in held.bundles], [held.chosen[query] for query in queries])


def _by_rule(task: Ranking, run: RunContext, rule: str, seed: int, held: Rankings) -> list[list[float]]:
    """Scores of the test queries' documents without training."""
    chosen = [held.chosen[query] for query in held.test]
    if rule == "random":
        rng = run.rng(ranked="random", training=seed)
        return [rng.random(len(some)).tolist() for some in chosen]
    if rule == "bm25":
        every = [held.index.scores(held.texts.queries[query]) for query in held.test]
        return [found[some].tolist() for found, some in zip(every, chosen, strict=True)]
    documents, queries = _passages(run, task.encoder, held.texts)
    found = []
    for query, some in zip(held.test, chosen, strict=True):
        best = {name: float((vectors @ queries[query][0]).max()) for name, vectors in documents.items()}
        found.append([max(best[part] for part in held.bundles[i].parts) for i in some])
    return found


def _passages(run: RunContext, encoder: str, texts: Texts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Embeddings of the passages of documents and queries, on the CPU; made once a process."""

    def make() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from ...models import load_reader

        model, tokenizer = load_reader(encoder, run.device, torch.float32)
        return passage_vectors(model, tokenizer, texts.documents), passage_vectors(model, tokenizer, texts.queries)

    key = ("passages", texts.of.name, encoder)
    return cast(tuple[dict[str, Tensor], dict[str, Tensor]], run.kept(key, make))


def _stretches(edges: Sequence[int]) -> list[str]:
    """Names of the stretches between edges."""
    bounds = [0, *edges]
    return [*(f"{a} to {b - 1}" for a, b in zip(bounds, edges, strict=False)), f"{bounds[-1]} on"]


def _pieces(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """``values`` in at most ``count`` pieces of one length but the last."""
    step = max(1, -(-len(values) // count))
    return [values[i : i + step] for i in range(0, len(values), step)]
