# SPDX-License-Identifier: Apache-2.0
"""What a vision-language model that knew fictitious people and events has forgotten of them, and what else is lost.

For each seed one model learns everything, another all but what is to be forgotten (option ``how="retrain"``), and
every other arm makes a copy of the first forget. Arms have an unlearning strategy and as options: ``concepts``, of
which facts are forgotten where not both; ``heads``, ``chosen`` by attribution or ``random`` ones of the same layers,
that alone are trained; ``how="noise"`` is a step in a random direction, parameter by parameter as long as that of the
arm ``like``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.fictitious import WORDS, Benchmark, Item, world
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...heads import HeadTable, layer_matched_heads
from ...lenses.unlearning_bench.losses import kl
from ...models.joined_vlm import JoinedVLM
from ...recipes.unlearning_bench import CONCEPTS, batches, important_heads, learn, pooled, read, right, unlearn
from ...training.answers import answer_logits, train_answers
from ...unlearning import Answers, Unlearning
from ._models import VLMTask

__all__ = ["UnlearningTask"]

Chosen = dict[tuple[str, str, str], list[Item]]  # by part, pictures and concept
State = dict[str, Tensor]
_TRAINING = 8.0  # what learning costs, in that of unlearning
# Where what was moved lies, by what the parameter's name has; the rest is "elsewhere".
_PLACES = {"self_attn": "attention", "attention": "tower attention", "projector": "projector", ".mlp.": "feed-forward"}


@dataclass(frozen=True, kw_only=True)
class UnlearningTask(VLMTask):
    """A unit for each seed, in which all arms begin with the same model; worlds are the same for all seeds.

    Attributes:
        people, events, forget_people, forget_events, views: of the benchmark.
        side: tokens of a picture's side.
        learn_steps, learn_batch, learn_lr, slower: of the first training.
        steps, batch, lr: of unlearning, at most.
        drop: loss of answers to be kept at which it ends.
        attack_steps: of training on one picture of each person and event that was forgotten.
        top: heads that are chosen.
        judged: questions of a part, of seen and of new pictures each.
        text_tokens: of the library's source, whose loss tells what else is lost; 0 for none.
        pool: for any but 0 a tower reads each picture that is learned once.
    """

    words: ClassVar[Sequence[str]] = WORDS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("efficacy", "facts to be forgotten that are not known", higher=True, kind="share"),
        Metric("generality", "the same in new pictures and words", higher=True, kind="share"),
        Metric("retain", "facts to be kept that are known", higher=True, kind="share", floor=0.5),
        Metric("scope", "known of what else is in pictures of the forgotten", higher=True, kind="share", floor=0.5),
        Metric("real", "plain things that are known", higher=True, kind="share", floor=0.5),
        Metric("relearned", "forgotten facts known after an attack", kind="share",
               what="after a short training on one picture of each that was forgotten, asked of new pictures"),
        Metric("gap", "distance to a model that never learned it", what="mean over all shares above but the attack's"),
        Metric("drift", "KL divergence of kept answers from before", "nats"),
        Metric("moved", "share of the squared change of weights", what="by where the weights are"),
        Metric("text_nll", "loss of text, nats/token", "nats/token"),
        Metric("steps_kept", "steps of unlearning", higher=True),
    )  # fmt: skip

    heads: int = 8
    people: int = 12
    events: int = 6
    forget_people: int = 3
    forget_events: int = 2
    views: int = 10
    side: int = 6
    learn_steps: int = 900
    learn_batch: int = 32
    learn_lr: float = 5e-3
    slower: float = 1.0
    steps: int = 60
    batch: int = 16
    lr: float = 5e-4
    drop: float = 0.1
    attack_steps: int = 10
    top: int = 4
    judged: int = 48
    text_tokens: int = 0

    @property
    def patches(self) -> int:
        return self.side

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = sum(_cost(run, arm) for arm in run.arms)
        return [WorkUnit(self.key, f"{s}", cost, f"learning and forgetting, seed {s}", {"seed": s}) for s in run.seeds]

    def guard(self, run: RunContext) -> None:
        """Refuse a baseline that is not the model as it is, and arms that do not unlearn."""
        for arm in run.arms:
            if arm.spec and (arm == run.baseline or not isinstance(arm.strategy, Unlearning)):
                raise UserError(f"the baseline is the model as it is, every other arm unlearns; {arm.spec} does not")

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = int(unit.params["seed"])
        vlm = self.fresh(run, seed)
        bench = self._bench(run, vlm)
        self._learn(run, vlm, bench, seed, True)
        first = _state(vlm)
        chosen = run.kept(("asked", self), lambda: self._chosen(run, bench))
        kept = [item for (part, pictures, _), items in chosen.items() if (part, pictures) == ("retain", "new")
                for item in items]  # fmt: skip
        before = _answers(vlm, bench, kept)
        figures: dict[str, dict[str, float]] = {}
        moved: dict[str, State] = {}
        heads = run.kept_last("heads", (self, seed), lambda: important_heads(vlm, bench, seed=seed))
        for arm in run.arms:
            _restore(vlm, first)
            mine, steps = self._changed(run, arm, seed, vlm, bench, moved, heads)
            rows = list(self._judged(run, arm, seed, mine, bench, chosen))
            figures[arm.key] = _means(rows)
            yield from rows
            after = _answers(mine, bench, kept)
            for i, (old, new) in enumerate(zip(before, after, strict=True)):
                yield self.row("drift", arm, float(kl(old, new)), f"{i}", context=_context(kept[i]), seed=seed)
            moved[arm.key] = {name: p - first[name] for name, p in _state(mine).items()}
            if steps is not None:
                yield self.row("steps_kept", arm, steps, "all", seed=seed)
                yield from self._moves(arm, seed, moved[arm.key])
            if self.text_tokens:
                yield from self._text(run, arm, seed, mine)
            yield from self._attacked(arm, seed, mine, bench, chosen)
            run.advance(_cost(run, arm))
        gold = next((arm.key for arm in run.arms if arm.options.get("how") == "retrain"), None)
        if gold is None:
            return
        for arm in run.arms:
            apart = [abs(value - figures[gold][name]) for name, value in figures[arm.key].items()]
            yield self.row("gap", arm, sum(apart) / len(apart), "all", seed=seed)

    def _bench(self, run: RunContext, vlm: JoinedVLM) -> Benchmark:
        seed = seeding.number(run.seed, world="people and events")
        return cast(Benchmark, run.kept(("benchmark", self), lambda: Benchmark(
            world(self.people, self.events, seed), vlm.language, self.side * vlm.patch, self.side,
            people=self.forget_people, events=self.forget_events, views=self.views, seed=seed,
        )))  # fmt: skip

    def _learn(self, run: RunContext, vlm: JoinedVLM, bench: Benchmark, seed: int, forgotten: bool) -> None:
        pool = run.kept(("pool", self), lambda: pooled(vlm, bench)) if self.pool else None
        learn(vlm, bench, forgotten=forgotten, steps=self.learn_steps, batch=self.learn_batch, lr=self.learn_lr,
              slower=self.slower, seed=seed, pool=pool)  # fmt: skip

    def _chosen(self, run: RunContext, bench: Benchmark) -> Chosen:
        """The questions that all arms are asked."""
        made: Chosen = {}
        for pictures, parts in (("seen", bench.trained), ("new", bench.new)):
            for part, items in parts.items():
                for concept in ("person", "event", "thing"):
                    mine = [item for item in items if item.concept == concept]
                    order = run.rng(asked=part, pictures=pictures, concept=concept).permutation(len(mine))
                    if mine:
                        made[part, pictures, concept] = [mine[i] for i in order[: self.judged]]
        return made

    def _changed(
        self, run: RunContext, arm: Arm, seed: int, vlm: JoinedVLM, bench: Benchmark, moved: Mapping[str, State],
        heads: HeadTable,
    ) -> tuple[JoinedVLM, int | None]:  # fmt: skip
        """The model under an arm, and steps of unlearning that count, where there are any."""
        how = arm.options.get("how", "")
        if how == "retrain":
            mine = self.fresh(run, seed)
            self._learn(run, mine, bench, seed, False)
            return mine, None
        if how == "noise":
            generator = run.torch_rng(noise="direction", seed=seed)
            with torch.no_grad():
                for name, p in vlm.model.named_parameters():
                    if p.requires_grad:
                        drawn = torch.randn(p.shape, generator=generator).to(p.device)
                        p += drawn * moved[str(arm.options["like"])][name].norm() / drawn.norm()
            return vlm, None
        if not arm.spec:
            return vlm, None
        strategy = cast(Unlearning, arm.strategy)
        if which := arm.options.get("heads"):
            best = heads.top(self.top)
            if which == "random":
                draw = seeding.number(run.seed, random="heads", seed=seed)
                best = layer_matched_heads(best, heads.values.shape[2], draw, best)
            strategy = dataclasses.replace(strategy, heads=heads.names(best))
        concepts = (str(arm.options["concepts"]),) if "concepts" in arm.options else CONCEPTS
        done = unlearn(vlm, strategy, bench, concepts=concepts, steps=self.steps, batch=self.batch, lr=self.lr,
                       drop=self.drop, seed=seed)  # fmt: skip
        return vlm, done.steps

    def _judged(
        self, run: RunContext, arm: Arm, seed: int, vlm: JoinedVLM, bench: Benchmark, chosen: Chosen
    ) -> Iterator[Row]:
        for (part, pictures, concept), items in chosen.items():
            gone = part.startswith("forget")
            metric = part.split()[0] if not gone else "efficacy" if pictures == "seen" else "generality"
            at = {"concept": concept} | ({} if gone else {"pictures": pictures})
            for item, known in zip(items, right(vlm, bench, items), strict=True):
                yield self.row(metric, arm, known != gone, _sample(item), context=_context(item), seed=seed, at=at)

    def _moves(self, arm: Arm, seed: int, change: State) -> Iterator[Row]:
        """Where the weights are that were changed."""
        found = dict.fromkeys([*_PLACES.values(), "elsewhere"], 0.0)
        for name, part in change.items():
            found[next((place for key, place in _PLACES.items() if key in name), "elsewhere")] += float(
                part.square().sum()
            )
        total = sum(found.values())
        for place, squares in found.items():
            yield self.row("moved", arm, squares / total if total else 0.0, "all", seed=seed, at={"where": place})

    @torch.no_grad()
    def _text(self, run: RunContext, arm: Arm, seed: int, vlm: JoinedVLM) -> Iterator[Row]:
        """Loss of the decoder on text without pictures, in windows of 128 tokens."""
        windows = run.kept(("text", self), lambda: _windows(vlm, self.text_tokens)).to(run.device)
        losses: list[float] = []
        for ids in windows.split(8):
            logits = vlm.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            losses += cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1).tolist()
        yield from self.each("text_nll", arm, losses, seed=seed)

    def _attacked(self, arm: Arm, seed: int, vlm: JoinedVLM, bench: Benchmark, chosen: Chosen) -> Iterator[Row]:
        """Whether one picture of each brings back what was forgotten."""
        shown: dict[tuple[str, int], Item] = {}
        taught: list[Item] = []
        for concept in CONCEPTS:
            for item in bench.trained[f"forget {concept}"]:
                key = concept, item.person if concept == "person" else item.event
                first = shown.setdefault(key, item)
                if (item.person, item.event, item.view) == (first.person, first.event, first.view):
                    taught.append(item)
        drawn = batches(taught, self.batch, seed)
        train_answers(vlm.model, lambda step: read(vlm, bench, drawn(step)), self.attack_steps, lr=self.lr)
        for concept in CONCEPTS:
            items = chosen[f"forget {concept}", "new", concept]
            for item, known in zip(items, right(vlm, bench, items), strict=True):
                yield self.row("relearned", arm, known, _sample(item), context=_context(item), seed=seed,
                               at={"concept": concept})  # fmt: skip


def _cost(run: RunContext, arm: Arm) -> float:
    return _TRAINING if arm == run.baseline or arm.options.get("how") == "retrain" else 1.0


def _state(vlm: JoinedVLM) -> State:
    return {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _restore(vlm: JoinedVLM, state: State) -> None:
    for name, p in vlm.model.named_parameters():
        if name in state:
            p.copy_(state[name])


@torch.no_grad()
def _answers(vlm: JoinedVLM, bench: Benchmark, items: Sequence[Item]) -> list[Answers]:
    """What a model says to each question."""
    made = []
    for start in range(0, len(items), 32):
        batch = read(vlm, bench, items[start : start + 32])
        logits = answer_logits(vlm.model, batch)
        made += [Answers(x[None], tokens[None]) for x, tokens in zip(logits, batch["answers"], strict=True)]
    return made


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """Shares by metric and conditions."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{row.metric} {sorted(row.at.items())}", []).append(row.value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _windows(vlm: JoinedVLM, count: int, length: int = 129) -> Tensor:
    from ...data.texts import corpus

    ids: list[int] = []
    for text in corpus("code"):
        ids += vlm.language.encode(text.content[:4000])
        if len(ids) >= count:
            break
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _sample(item: Item) -> str:
    return f"{item.person}.{item.event}.{item.view} {item.kind} {item.said}"


def _context(item: Item) -> str:
    """Questions about one person at one event share it."""
    return f"{item.person}.{item.event}"
