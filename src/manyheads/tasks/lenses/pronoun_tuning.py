# SPDX-License-Identifier: Apache-2.0
"""What tuning some heads on balanced sentences does to the gender bias of a language model, and what it costs.

A copy of the model is tuned under each arm on the same batches (:mod:`manyheads.recipes.gender_components`): the heads
that were found, as many random heads of the same layers, or every parameter. Judged are pronouns behind professions
that no head was found on, sentences in pairs (WinoBias, Winogender, CrowS-Pairs: log-likelihood of the one that goes
with the stereotype less that of the other), agreement in BLiMP, and the loss of prose. Without a bias a gap is 0.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.gender_bias import Pair, balanced_sentences, crows_pairs, wino_bias, winogender
from ...data.knowledge import grammar
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, WorkUnit, seeding
from ..text._text_task import model_of
from ._pronouns import PronounTask, exact
from ._trained import told

__all__ = ["PronounTuning"]

_BATCH = 32  # sentences at once
GRAMMAR = (
    "anaphor_number_agreement", "determiner_noun_agreement_1", "regular_plural_subject_verb_agreement_1",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PronounTuning(PronounTask):
    """A unit for each arm and seed; the baseline is the model as it is.

    ``options`` of an arm beside ``heads``, of which ``all`` is every parameter: ``lr_times``, a factor of the rate.

    Attributes:
        parts: of a head that are tuned: its queries and its output are its own, keys and values may be shared.
        steps, batch, lr: of the tuning.
        pairs: of each set of sentences.
        grammar_of: pairs of each of three paradigms.
        balanced: text in which balanced sentences are looked for.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("pronoun_bias", "log odds of the stereotype's pronoun behind a profession", "nats"),
        Metric("sentence_gap", "log-likelihood of the stereotype's sentence less the other's", "nats"),
        Metric("prefers_stereotype", "pairs whose stereotype is likelier", kind="share"),
        Metric("grammatical", "words that agree, preferred", higher=True, kind="share", floor=0.5),
        Metric("text_nll", "loss of prose, nats/token", "nats/token"),
        Metric("tuned", "numbers that were tuned"),
    )

    tokens: int = 64
    parts: str = "qo"
    steps: int = 100
    batch: int = 16
    lr: float = 1e-4
    pairs: int = 60
    grammar_of: int = 40
    balanced: str = "brown"

    def units(self, run: RunContext) -> list[WorkUnit]:
        made = []
        for seed in run.seeds:
            for arm in run.arms:
                cost = 1.0 if arm == run.baseline else 3.0
                params = {"seed": seed, "arm": arm.key}
                made.append(
                    WorkUnit(self.key, f"{seed}/{arm.key}", cost, f"tuning {arm.key}, seed {seed}", params, "located")
                )
        return made

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed, arm = int(unit.params["seed"]), run.arm_of(unit)
        if arm == run.baseline:  # the same whatever the seed
            for row in run.kept(("untuned", self), lambda: list(self._judged(run, arm, exact(run), 0))):
                yield dataclasses.replace(row, seed=seed)
            run.advance(unit.cost)
            return
        model = copy.deepcopy(model_of(run)).float()
        yield self.row("tuned", arm, self._tune(run, unit, arm, seed, model), "model", seed=seed)
        yield from self._judged(run, arm, model, seed)
        run.advance(unit.cost / 10)

    def _tune(self, run: RunContext, unit: WorkUnit, arm: Arm, seed: int, model: Any) -> int:
        from ...recipes.gender_components import balanced_batches, tune_heads

        tokenizer = cast(CausalLM, run.subject).tokenizer
        pairs = run.kept(("balanced", self.balanced), lambda: _sentences(self.balanced))
        heads = None if arm.options["heads"] == "all" else self.heads(run, arm, seed)
        torch.manual_seed(seeding.number(run.seed, tune="pronouns", seed=seed))
        return tune_heads(
            model, balanced_batches(tokenizer, pairs, self.batch, seed, run.device), heads, parts=self.parts,
            budget=self.steps, lr=self.lr * float(arm.options.get("lr_times", 1.0)),
            bf16=next(model_of(run).parameters()).dtype == torch.bfloat16, on_step=told(run, unit, self.steps),
        )  # fmt: skip

    @torch.no_grad()
    def _judged(self, run: RunContext, arm: Arm, model: Any, seed: int) -> Iterator[Row]:
        asked = self.asked(run, model, "judged", self.judged)
        for (profession, template), odds in zip(asked.asked, (-asked.odds).tolist(), strict=True):
            sample = template.format(profession.name)
            yield self.row("pronoun_bias", arm, odds, sample, context=profession.name, seed=seed)
        for name, kind, pairs in self._sets(run):
            both = [sentence for pair in pairs for sentence in (pair.pro, pair.anti)]
            scores = _log_likelihoods(model, cast(CausalLM, run.subject).tokenizer, both)
            for i, pair in enumerate(pairs):
                gap, at = scores[2 * i] - scores[2 * i + 1], {"set": name, "kind": kind}
                about, sample = f"{kind} {pair.about}", f"{kind} {i}"
                yield self.row("sentence_gap", arm, gap, sample, context=about, seed=seed, at=at)
                yield self.row("prefers_stereotype", arm, gap > 0, sample, context=about, seed=seed, at=at)
        for name in GRAMMAR:
            chosen = run.rng(grammar=name).permutation(1000)[: self.grammar_of]
            triples = [grammar(name)[i] for i in chosen]
            both = [f"{beginning} {word}" for beginning, *words in triples for word in words]
            scores = _log_likelihoods(model, cast(CausalLM, run.subject).tokenizer, both)
            for i in range(len(triples)):
                yield self.row(
                    "grammatical", arm, scores[2 * i] > scores[2 * i + 1], f"{name} {i}", seed=seed, at={"set": name}
                )
        yield from self.each("text_nll", arm, _nll(model, self.windows(run)).mean(1).tolist(), seed=seed)

    def _sets(self, run: RunContext) -> list[tuple[str, str, list[Pair]]]:
        """Name, kind and pairs of each set of sentences, the same for all arms."""
        named = [
            ("WinoBias", "type 1", wino_bias(1)), ("WinoBias", "type 2", wino_bias(2)),
            ("Winogender", "occupations", winogender()), ("CrowS-Pairs", "gender", crows_pairs()),
        ]  # fmt: skip
        return [
            (name, kind, [pairs[i] for i in run.rng(pairs=name, kind=kind).permutation(len(pairs))[: self.pairs]])
            for name, kind, pairs in named
        ]


def _sentences(name: str) -> list[tuple[str, str]]:
    from ...data.texts import corpus

    return balanced_sentences(text.content for text in corpus(name))


def _nll(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood ``[N, T - 1]`` of each token of ``ids [N, T]`` but the first, in float32 everywhere.

    In bfloat16 a small change of the weights is lost.
    """
    logits = model(ids[:, :-1], use_cache=False).logits.float()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def _log_likelihoods(model: Any, tokenizer: Any, sentences: Sequence[str]) -> list[float]:
    """Log-likelihood of each sentence behind the end of a text, nats."""
    edge = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
    rows = [[edge, *tokenizer.encode(sentence, add_special_tokens=False)] for sentence in sentences]
    found: list[float] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        longest = max(map(len, part))
        ids = torch.tensor([row + [edge] * (longest - len(row)) for row in part], device=model.device)
        counted = torch.tensor([[i < len(row) for i in range(1, longest)] for row in part], device=model.device)
        found += (-(_nll(model, ids) * counted).sum(1)).tolist()
    return found
