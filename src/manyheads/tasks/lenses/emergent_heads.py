# SPDX-License-Identifier: Apache-2.0
"""Does what a model learned by fine-tuning hang on the heads that came into its circuit, and is the circuit right?

A copy of a chat model is tuned on worked arithmetic (:mod:`manyheads.recipes.thinking_sparks`), once for each seed. On
problems of the half that it was not tuned on both begin to answer, and their circuits are compared; the most important
emergent heads are taken out of either model, beside as many random heads of the same layers, and what right worked
answers lose is measured on other problems of that half. Scores of heads are held against exact patching of one head
after the other, the circuit against random edges.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...heads import HeadTable, layer_matched_heads
from ...training import TrainState
from ..text._text_task import model_of
from ._chat import base_model

if TYPE_CHECKING:
    from ...lenses.thinking_sparks import Circuit, HeadChange, Pair, PairRuns
    from ...recipes.reasoning_rhythm import Problem

__all__ = ["EmergentHeads"]

_ROWS = 8  # worked answers at once
_SCALE = 1.3  # the paper's, in the base model
_TUNING = 0.5  # of a unit's cost
Heads = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EmergentHeads(Task):
    """A unit for each seed of the tuning.

    ``options`` of an arm: ``steps`` of the integrated gradients, 0 for EAP. One without it chooses, in place of the
    emergent heads, as many whose slice of the output projection the tuning changed most.

    Attributes:
        steps, batch, lr, longest: of the tuning; tokens of a problem with its answer.
        source: of the problems: ``sums``, ``gsm8k`` or ``both``.
        looks: checkpoints before the last whose circuits are found too.
        prompts, tokens: that circuits are found on, and tokens of an answer's beginning.
        edges: of the circuits that heads are compared in.
        patched_edges, patched: edges of the circuit that is run alone, and on how many prompts.
        exact: heads, drawn at random, that are patched one by one.
        heads: taken out.
        draws: of random heads of the same layers, whose mean counts.
        problems: worked answers whose loss is measured.
        solved: of them also answered, and judged by the last number; 0 for none.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("answer_nll", "loss of right worked answers", "nats/token"),
        Metric("heads_cost", "loss of right worked answers that a change of heads adds", "nats/token"),
        Metric("solved", "problems answered rightly", higher=True, kind="share"),
        Metric("agreement", "rank correlation of heads' scores with exact patching", higher=True),
        Metric("left", "part of the corruption's loss that is left", what="with some edges alone"),
        Metric("heads_of", "heads of a kind"),
    )

    steps: int = 200
    batch: int = 16
    lr: float = 5e-5
    longest: int = 256
    source: str = "both"
    looks: int = 0
    prompts: int = 8
    tokens: int = 16
    edges: int = 1000
    patched_edges: int = 5000
    patched: int = 8
    exact: int = 24
    heads: int = 8
    draws: int = 3
    problems: int = 32
    solved: int = 0

    def unsupported_reason(self, run: RunContext) -> str | None:
        return base_model(cast(CausalLM, run.subject), "no turn of its own to answer in")

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{s}", 2.0 * self.steps, f"tuning, seed {s}", {"seed": s}) for s in run.seeds]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        from ...lenses.thinking_sparks import Circuit, PairRuns, compared, opening_pairs

        seed, first = int(unit.params["seed"]), run.baseline
        base = run.kept(("base", self), lambda: copy.deepcopy(model_of(run)).float().requires_grad_(False))
        tuned, earlier = self._tuned(run, unit, seed)
        rest = unit.cost * (1 - _TUNING) / 4
        asked = self._drawn(run, test=False)
        pairs = opening_pairs(tuned, base, _tokenizer(run), [p.question for p in asked], self.tokens)
        if not pairs:
            raise UserError("the tuned model begins every answer as before: tune for more steps, or at a higher rate")
        found: dict[str, list[Tensor]] = {arm.key: [] for arm in run.arms if "steps" in arm.options}
        losses = []
        for i, pair in enumerate(pairs):
            runs = PairRuns(tuned, manyheads.use, pair)
            losses.append(runs.loss)
            for arm in run.arms:
                if arm.key in found:
                    found[arm.key].append(runs.scores(int(arm.options["steps"])).float().cpu())
                    yield from self._judged(run, arm, seed, i, runs, found[arm.key][-1])
            run.advance(rest / len(pairs))
        after = Circuit(runs.graph, torch.stack(found[first.key]), tuple(losses), self.edges)
        before = self._circuit(base, [type(p)(p.corrupted, p.clean, p.start) for p in pairs], first)
        run.advance(rest)
        change = compared(before, after)
        for kind in ("emergent", "retained", "lost"):
            yield self.row("heads_of", first, len(getattr(change, kind)), "model", seed=seed, at={"kind": kind})
        yield from self._cohorts(run, seed, before, after, [self._circuit(m, pairs, first) for m in earlier])
        del earlier
        run.advance(rest)
        yield from self._changed(run, seed, base, tuned, change, after.importance())
        run.advance(rest)

    def _judged(
        self, run: RunContext, arm: Arm, seed: int, i: int, runs: PairRuns, scores: Tensor
    ) -> Iterator[Row]:  # fmt: skip
        """How scores of a prompt agree with exact patching, and what the circuit alone loses."""
        from ...lenses.thinking_sparks import Circuit, strongest

        one = Circuit(runs.graph, scores[None], (runs.loss,), self.patched_edges)
        drawn = run.rng(exact="heads", prompt=i, seed=seed)
        names = [f"{layer.number}.{head}" for layer in runs.graph.layers for head in range(layer.heads)]
        chosen = sorted(drawn.permutation(len(names))[: self.exact].tolist())
        exact = run.kept_last("exact", (self, seed, i), lambda: runs.patched_heads([names[h] for h in chosen]))
        for score, table in (("magnitude", one.magnitude()), ("worth", one.worth())):
            mine = table.values[0][np.isfinite(table.values[0])][chosen]
            value = _ranked(mine).correlation(_ranked(exact.double().cpu().numpy()))
            if np.isfinite(value):
                yield self.row("agreement", arm, value, f"{i}", seed=seed, at={"score": score})
        if i >= self.patched:
            return
        kept = strongest(runs.graph, scores, self.patched_edges)
        yield self.row("left", arm, runs.patched(kept) / runs.loss, f"{i}", seed=seed, at={"edges": "circuit"})
        if arm == run.baseline:
            every = runs.graph.edges.flatten().nonzero()[:, 0]
            other = torch.zeros(kept.numel(), dtype=torch.bool)
            other[every[torch.from_numpy(drawn.permutation(len(every))[: int(kept.sum())])]] = True
            value = runs.patched(other.view_as(kept)) / runs.loss
            yield self.row("left", arm, value, f"{i}", seed=seed, at={"edges": "random"})

    def _circuit(self, model: Any, pairs: Sequence[Pair], arm: Arm) -> Circuit:
        import manyheads

        from ...lenses.thinking_sparks import attribute

        return attribute(model, manyheads.use, pairs, edges=self.edges, steps=int(arm.options["steps"]))

    def _cohorts(
        self, run: RunContext, seed: int, before: Circuit, after: Circuit, earlier: Sequence[Circuit]
    ) -> Iterator[Row]:  # fmt: skip
        """Heads of each checkpoint's circuit by the checkpoint since which they are there; 0 is the base."""
        from ...lenses.thinking_sparks import cohorts

        every = [circuit.heads for circuit in (*earlier, after)] if earlier else []
        for number, row in enumerate(cohorts(before.heads, every)):
            for since, value in enumerate(row[: number + 2]):
                at = {"kind": "in the circuit", "checkpoint": number + 1, "since": since}
                yield self.row("heads_of", run.baseline, value, "model", seed=seed, at=at)

    def _changed(
        self, run: RunContext, seed: int, base: Any, tuned: Any, change: HeadChange, importance: HeadTable
    ) -> Iterator[Row]:  # fmt: skip
        """What worked answers lose without heads, and how the base does with them scaled."""
        first, size = run.baseline, change.effect.mean.shape[1]
        emergent = change.emergent[: self.heads]
        if not emergent:  # of a tiny model every head is in both circuits
            emergent = change.effect.names(change.effect.top(self.heads))
        count = len(emergent)
        random = [_others(change.effect, emergent, size, seed + 1000 * draw) for draw in range(self.draws)]
        important = importance.names(importance.top(count))
        by_weight = [arm for arm in run.arms if "steps" not in arm.options]
        test = self._drawn(run, test=True)
        for name, model in (("tuned", tuned), ("base", base)):
            whole = self._nll(run, model, test)
            yield from self.each("answer_nll", first, whole.tolist(), seed=seed, at={"model": name})
            ways: list[tuple[Arm, str, str, list[Heads]]] = [
                (first, "chosen", "zero", [emergent]), (first, "most important", "zero", [important]),
                *((arm, "chosen", "zero", [_most_changed(base, tuned, change.effect, count)]) for arm in by_weight),
            ]  # fmt: skip
            by = "mean" if name == "tuned" else "scale"
            ways += [(first, "chosen", by, [emergent]), (first, "random", by, random)]
            if name == "tuned":
                ways.append((first, "random", "zero", random))
            for arm, chosen, by, sets in ways:
                found = [self._nll(run, model, test, _spec(heads, by)) - whole for heads in sets]
                at = {"model": name, "heads": chosen, "by": by}
                yield from self.each("heads_cost", arm, torch.stack(found).mean(0).tolist(), seed=seed, at=at)
            yield from self._solved(run, seed, name, model, test[: self.solved], {"all": (), "chosen": emergent,
                                    "random": random[0]})  # fmt: skip

    def _solved(
        self, run: RunContext, seed: int, name: str, model: Any, test: Sequence[Problem], sets: dict[str, Heads]
    ) -> Iterator[Row]:  # fmt: skip
        import manyheads

        from ...recipes.reasoning_rhythm import prompts_of, right

        for kind, heads in sets.items() if test else ():
            with manyheads.use(model, *([_spec(heads, "zero")] if heads else [])):
                prompts = prompts_of(_tokenizer(run), test)
                shares = right(model, prompts, 2 * self.longest // 3, draws=1, temperature=0.0)
            yield from self.each("solved", run.baseline, shares.tolist(), seed=seed, at={"model": name, "heads": kind})

    def _drawn(self, run: RunContext, test: bool) -> list[Problem]:
        """Problems of the half that is not trained on: those of the test, or those that circuits are found on."""
        from ...recipes.thinking_sparks import draw_problems

        made = draw_problems(self.prompts, run.rng(problems="circuits"), True, self.source)
        if not test:
            return made
        known = {problem.question for problem in made}
        every = draw_problems(self.problems + self.prompts, run.rng(problems="test"), True, self.source)
        order = run.rng(problems="order").permutation(len(every))
        return [every[i] for i in order if every[i].question not in known][: self.problems]

    def _tuned(self, run: RunContext, unit: WorkUnit, seed: int) -> tuple[Any, list[Any]]:
        """The tuned model, and copies of it on the way there."""
        from ...recipes.thinking_sparks import draw_problems, tune

        model = copy.deepcopy(model_of(run)).float()
        model.requires_grad_(True)
        torch.manual_seed(seeding.number(run.seed, tune="worked answers", seed=seed))
        earlier: list[Any] = []
        at = {self.steps * (i + 1) // (self.looks + 1) for i in range(self.looks)}

        def on_step(state: TrainState) -> None:
            run.advance(_TUNING * unit.cost / self.steps)
            if state.step in at:
                earlier.append(copy.deepcopy(model).requires_grad_(False).eval())

        tune(
            model, _tokenizer(run),
            lambda n: draw_problems(self.batch, run.rng(tune="worked", seed=seed, step=n), False, self.source),
            steps=self.steps, lr=self.lr, longest=self.longest, on_step=on_step,
            bf16=next(model_of(run).parameters()).dtype == torch.bfloat16 and run.device.type == "cuda",
        )  # fmt: skip
        return model.requires_grad_(False).eval(), earlier

    @torch.no_grad()
    def _nll(self, run: RunContext, model: Any, test: Sequence[Problem], *specs: str) -> Tensor:
        """Loss of the answer of each problem, nats/token ``[P]`` on the CPU."""
        import manyheads

        from ...recipes.reasoning_rhythm import imitation

        found = []
        with manyheads.use(model, *specs):
            for start in range(0, len(test), _ROWS):
                ids, counts = imitation(model, _tokenizer(run), test[start : start + _ROWS])
                ids, counts = (x[:, : self.longest - i].to(run.device) for i, x in enumerate((ids, counts)))
                logits = model(ids[:, :-1], use_cache=False).logits.transpose(1, 2)
                losses = cross_entropy(logits, ids[:, 1:], reduction="none")  # in float32 everywhere, unlike token_nll
                found.append(((losses * counts).sum(1) / counts.sum(1).clamp(min=1)).cpu())
        return torch.cat(found)


def _tokenizer(run: RunContext) -> Any:
    return cast(CausalLM, run.subject).tokenizer


def _spec(heads: Heads, by: str) -> str:
    return f"ablate:heads={'+'.join(heads)},by={by}" + (f",factor={_SCALE}" if by == "scale" else "")


def _ranked(values: Any) -> HeadTable:
    return HeadTable("", ("",), np.asarray(values, float)[None])


def _others(table: HeadTable, heads: Heads, size: int, seed: int) -> Heads:
    """As many random heads of the same layers."""
    places = [(table.layers.index(int(layer)), int(head)) for layer, _, head in (h.partition(".") for h in heads)]
    return table.names(layer_matched_heads(places, size, seed, places))


def _most_changed(base: Any, tuned: Any, table: HeadTable, count: int) -> Heads:
    """Heads whose slice of the output projection the tuning changed most, as a share of its size."""
    from ...integrations.transformers import find_sites

    rows = []
    for (site, _), (other, _) in zip(find_sites(base), find_sites(tuned), strict=True):
        assert site.output is not None and other.output is not None  # or no circuit had been found
        heads = table.mean.shape[1]
        before, after = (w().detach().float().unflatten(1, (heads, -1)) for w in (site.output, other.output))
        rows.append(((after - before).norm(dim=(0, 2)) / before.norm(dim=(0, 2))).cpu().numpy())
    changed = HeadTable("change of the output projection", table.sites, np.stack(rows), {}, table.layers)
    return changed.names(changed.top(count))
