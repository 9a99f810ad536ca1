# SPDX-License-Identifier: Apache-2.0
"""How much of the model's own attention falls on the keys that a sparse strategy would read, at how many pairs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...attention.reference import block_size, repeat_kv
from ...call import AttentionCall, Site
from ...experiment.arms import Arm
from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext
from ...integrations import use
from ...mixers._sparse import SparseAttention
from ...strategy import AttentionWatch
from ._text_task import TextTask, model_of, tensor

__all__ = ["AttentionRecall"]

Found = dict[int, dict[str, float]]  # by number of the strategy: sums over layers


@dataclass(frozen=True, kw_only=True)
class AttentionRecall(TextTask):
    """Mean over layers, heads and queries of the dense attention that lies on what is read; the model itself is dense.

    The baseline reads everything. Judged are queries that lie behind what any arm reads anyway (first, chosen and local
    tokens, and a block), and not in its dense tail. ``pairs`` is the share of their pairs that an arm reads: equal
    where budgets are.

    An arm with the option ``fit`` has its boundaries fitted in this run, on other texts of the corpus, once for each
    seed; elsewhere such an arm has none, so leave it out there.

    Attributes:
        fit_texts: texts that boundaries are fitted on, one of them to measure on.
        fit_tokens: of such a text.
        fit_steps: of the fit.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("recall", "attention on keys that are read", higher=True, kind="share"),
        Metric("pairs", "share of the pairs that is read"),
    )

    fit_texts: int = 9
    fit_tokens: int = 512
    fit_steps: int = 300

    def unsupported_reason(self, run: RunContext) -> str | None:
        sparse = [cast(SparseAttention, arm.strategy) for arm in run.arms if _sparse(arm)]
        if not sparse:
            return "no arm chooses what a prompt reads, as dhsa does"
        first, last = _judged(sparse, self.lengths[0])
        if first >= last:
            return f"a prompt of {self.lengths[0]} tokens is read whole at these budgets; give longer ones"
        return super().unsupported_reason(run)

    def units(self, run: RunContext) -> list[WorkUnit]:
        self._drawn(run, self.lengths[-1])  # too short a text is found now
        plain = [
            WorkUnit(self.key, f"{length}/{i}", 2.0 * length, f"attention recall, {length} tokens",
                     {"length": length, "sample": i, "seed": -1})
            for length in self.lengths for i in range(self.samples)
        ]  # fmt: skip
        if not any(arm.options.get("fit") for arm in run.arms):
            return plain
        cost = float(self.fit_texts * self.fit_tokens * 2 + self.samples * sum(self.lengths))
        return plain + [
            WorkUnit(self.key, f"fit/{seed}", cost, "fitting boundaries", {"seed": seed}) for seed in run.seeds
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = unit.params["seed"]
        arms = [arm for arm in run.arms if _sparse(arm) and bool(arm.options.get("fit")) == (seed >= 0)]
        strategies = [cast(SparseAttention, arm.strategy) for arm in arms]
        if seed < 0:
            length, i = unit.params["length"], unit.params["sample"]
            for arm in (arm for arm in run.arms if not arm.strategies):
                for metric in ("recall", "pairs"):
                    yield self.row(metric, arm, 1.0, f"{length}-{i}", at={"length": length})
            yield from self._measured(run, arms, strategies, length, i, None)
            return
        with tempfile.TemporaryDirectory() as folder:
            self._fit(run, seed, Path(folder))
            fitted = [replace(strategy, boundaries=folder) for strategy in strategies]  # type: ignore[call-arg]
            for length in self.lengths:
                for i in range(self.samples):
                    yield from self._measured(run, arms, fitted, length, i, seed)

    def _measured(
        self, run: RunContext, arms: Sequence[Arm], strategies: Sequence[SparseAttention], length: int, i: int,
        seed: int | None,
    ) -> Iterator[Row]:  # fmt: skip
        everyone = [cast(SparseAttention, arm.strategy) for arm in run.arms if _sparse(arm)]
        judged = _judged(everyone, length)
        ids, text, overlaps = self._drawn(run, length)[i]
        watcher = _Watcher(strategies=tuple(strategies), judged=judged)
        with use(model_of(run), watcher):
            model_of(run)(input_ids=tensor(run, [ids]), use_cache=False, logits_to_keep=1)
        more: dict[str, Any] = {"at": {"length": length}, "about": {"text": text, "overlaps": overlaps}, "seed": seed}
        for number, arm in enumerate(arms):
            sums = watcher.found[number]
            for metric in ("recall", "pairs"):
                yield self.row(metric, arm, sums[metric] / sums["layers"], f"{length}-{i}", **more)

    def _drawn(self, run: RunContext, length: int) -> Any:
        fit = self.fit_texts if any(arm.options.get("fit") for arm in run.arms) else 0
        return self.contexts(run).plain("recall", length, self.samples + fit, 0)

    def _fit(self, run: RunContext, seed: int, folder: Path) -> None:
        from ...mixers.dhsa import fit_boundaries

        drawn = self._drawn(run, self.lengths[-1])[self.samples :]
        ids = tensor(run, [text[: self.fit_tokens] for text, _, _ in drawn])
        with torch.inference_mode(False):
            fit_boundaries(model_of(run), ids, port=use, steps=self.fit_steps, seed=seed).save(folder)


def _judged(strategies: Sequence[SparseAttention], length: int) -> tuple[int, int]:
    """From and up to which query something is left out by all, and none is in a dense tail."""
    return max(strategy.most for strategy in strategies), length - max(strategy.last for strategy in strategies)


def _sparse(arm: Arm) -> bool:
    return any(isinstance(strategy, SparseAttention) for strategy in arm.strategies)


@dataclass(frozen=True, kw_only=True)
class _Watcher(AttentionWatch):
    """Sums for each strategy the attention that lies on what it would read."""

    strategies: tuple[SparseAttention, ...]
    judged: tuple[int, int]
    found: Found = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return site.causal and site.window is None and super().selects(site)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        call.require_softmax()
        first, last = self.judged
        held: list[tuple[int, Tensor]] = []
        for number, strategy in enumerate(self.strategies):
            ((_, _, _, row),) = strategy.rows(call)
            held.append((number, strategy.pattern(row).to_mask(row.rule)[0, :, first:last]))
        q, k, size = call.q[0].float(), repeat_kv(call.k, call.q.shape[1])[0].float(), call.k.shape[2]
        columns = torch.arange(size, device=q.device)
        mass = {number: 0.0 for number, _ in held}
        step = block_size(q, len(q) * size)
        for start in range(first, last, step):
            rows = slice(start, min(last, start + step))
            x = (q[:, rows] @ k.mT * call.scale).masked_fill(columns > columns[rows][:, None], -torch.inf)
            weights = x.softmax(-1)
            for number, mask in held:
                seen = mask[:, start - first : rows.stop - first]
                mass[number] += float(torch.where(seen, weights[..., : mask.shape[2]], 0.0).sum(dtype=torch.float64))
        pairs = sum(range(first + 1, last + 1))
        for number, mask in held:
            sums = self.found.setdefault(number, {"recall": 0.0, "pairs": 0.0, "layers": 0.0})
            sums["recall"] += mass[number] / (len(q) * (last - first))
            sums["pairs"] += float(mask.sum()) / (len(mask) * pairs)
            sums["layers"] += 1
