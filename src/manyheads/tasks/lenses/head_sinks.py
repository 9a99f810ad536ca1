# SPDX-License-Identifier: Apache-2.0
"""Sinks of a language model's heads on text, the values that they rest on, and what the loss of such a head costs.

Which heads are dormant and which are active is found on texts of their own (``calibration``); what they cost is
measured on others. Active heads are those of the least sink in the same layers, as many of each: a layer's place does
not decide. Heads that switch are those whose sink differs most between two corpora.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...experiment import Metric, Row, RunContext, WorkUnit
from ..text._text_task import model_of
from ._windows import WindowTask, nll

__all__ = ["HeadSinks"]

DORMANT = 0.5  # attention on the first token above which a head is called dormant
GREATEST = 0.1  # share of the heads that are looked at as the greatest sinks
SECOND = "second token"  # the control: nearly every row sees it, and nothing else tells it from the first
_SWITCHING = 0.03  # share of the heads that are taken as switching from one corpus to the other
Head = tuple[int, int]  # row of the table, head


@dataclass(frozen=True, kw_only=True)
class HeadSinks(WindowTask):
    """A value for each text; the baseline's alone.

    ``head_worth`` is the loss that a text gains when one dormant (or active) head is zeroed, the mean over ``heads`` of
    them; ``joint_worth`` when a tenth of the model's heads is changed at once, zeroed or turned wholly to the first
    token. ``switch_worth`` of a text of ``text`` and one of ``other``: by how much more the zeroing of the heads that
    are active on ``other`` costs there than on ``text``, less the same of those that are active on ``text``.

    Attributes:
        heads: how many of either kind are zeroed one by one.
        other: corpus between which and ``text`` heads may switch.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("head_sink", "attention on a token, mean of heads"),
        Metric("dormant", f"heads whose attention on the first token is above {DORMANT}", kind="share"),
        Metric("head_drain", "norm of the first value over the others', median head"),
        Metric("residual_peak", "norm of the first token's residual stream over the others', worst block"),
        Metric("head_worth", "loss added without one head", "nats/token"),
        Metric("joint_worth", "loss added by a tenth of the heads changed at once", "nats/token"),
        Metric(
            "switch_worth", "loss added without heads where they are active, above that where dormant", "nats/token"
        ),
    )

    heads: int = 12
    other: str = "code"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "heads", 2.0 * self.heads + 12, f"taking out {2 * self.heads} heads")]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        elsewhere = replace(self, text=self.other)
        sinks, layers, _ = self._seen(run, self.windows(run, "calibration"))
        dormant, active = _kinds(sinks.mean(0), GREATEST)
        yield from self._statics(run)
        part = unit.cost / (2 * self.heads + 12)
        changes = len(dormant[: self.heads]) + len(active[: self.heads]) + 8  # one by one, jointly, and switching
        run.advance(unit.cost - part * changes)
        for kind, heads in (("dormant", dormant), ("active", active)):
            alone = [self._added(run, self.windows(run), [head], layers, part) for head in heads[: self.heads]]
            for i, value in enumerate(np.mean(alone, 0)):
                yield self.row("head_worth", run.baseline, value, f"{i}", at={"heads": kind})
            for by in ("zero", "bos"):
                joint = self._added(run, self.windows(run), heads, layers, part, by)
                for i, value in enumerate(joint):
                    yield self.row("joint_worth", run.baseline, value, f"{i}", at={"heads": kind, "by": by})
        yield from self._switching(run, elsewhere, sinks.mean(0), layers, part)

    def _seen(self, run: RunContext, ids: Tensor, sink: str = "") -> tuple[Any, list[int], dict[str, Any]]:
        """Attention on the sink ``[N, L, H]``, the layers of its rows, and all tables of the lens."""
        import manyheads

        roles = manyheads.TokenSpans({"second": [[(1, 2)]]})
        spec = "active_dormant" + (f":sink={sink}" if sink else "")
        with manyheads.watch(model_of(run), spec, roles=roles) as seen, torch.no_grad():
            for rows in ids[:, :-1].split(8):
                model_of(run)(rows, use_cache=False, logits_to_keep=1)
        tables = seen.compute().tables
        return tables["sink"].values, list(tables["sink"].layers), tables

    def _statics(self, run: RunContext) -> Iterator[Row]:
        ids = self.windows(run)
        sink, _, tables = self._seen(run, ids)
        second = self._seen(run, ids, "second")[0]
        drain, peak = (tables[name].values for name in ("drain", "peak"))
        for i in range(len(ids)):
            greatest = sink[i] >= np.quantile(sink[i], 1 - GREATEST)
            for name, at, value in (
                ("head_sink", {"token": "first"}, sink[i].mean()), ("head_sink", {"token": SECOND}, second[i].mean()),
                ("dormant", {}, (sink[i] > DORMANT).mean()),
                ("head_drain", {"heads": "greatest sinks"}, np.median(drain[i][greatest])),
                ("head_drain", {"heads": "others"}, np.median(drain[i][~greatest])),
                ("residual_peak", {}, np.nanmax(peak[i])),
            ):  # fmt: skip
                yield self.row(name, run.baseline, value, f"{i}", at=at)

    def _switching(
        self, run: RunContext, elsewhere: HeadSinks, here: Any, layers: list[int], part: float
    ) -> Iterator[Row]:
        """Of each text and one of the other corpus, what the heads that switch cost where they are active."""
        there = self._seen(run, elsewhere.windows(run, "calibration"))[0].mean(0)
        count = max(1, round(_SWITCHING * here.size))
        order = np.argsort((here - there).ravel(), kind="stable")
        sets = {"text": order[:count], "other": order[::-1][:count]}  # where their sink is less: where they are active
        cost: dict[tuple[str, str], Any] = {}
        for active, flat in sets.items():
            heads = [(int(i) // here.shape[1], int(i) % here.shape[1]) for i in flat]
            for on, task in (("text", self), ("other", elsewhere)):
                cost[active, on] = self._added(run, task.windows(run), heads, layers, part)
        switched = cost["other", "other"] - cost["other", "text"] + cost["text", "text"] - cost["text", "other"]
        for i, value in enumerate(switched / 2):
            yield self.row("switch_worth", run.baseline, value, f"{i}", about={"heads": count})

    def _added(
        self, run: RunContext, ids: Tensor, heads: Sequence[Head], layers: Sequence[int], part: float, by: str = "zero"
    ) -> Any:
        """Loss that each text gains when ``heads`` are changed, ``[N]``."""
        import manyheads

        model = model_of(run)
        plain = run.kept(("loss", ids.sum().item(), ids.shape), lambda: nll(model, ids))
        named = "+".join(f"{layers[row]}.{head}" for row, head in heads)
        with manyheads.use(model, f"ablate:heads={named},by={by}"):
            without = nll(model, ids)
        run.advance(part)
        return (without - plain).double().mean(1).cpu().numpy()


def _kinds(sink: Any, share: float) -> tuple[list[Head], list[Head]]:
    """``share`` of the heads with the greatest ``sink [L, H]``, and as many of each layer with the least.

    Heads of a layer more than half of which are among the greatest are not all taken, so that the two share none.
    """
    order = np.argsort(-sink.ravel(), kind="stable")
    wanted, taken = max(1, round(share * sink.size)), [0] * len(sink)
    dormant: list[Head] = []
    for i in order:
        row, head = int(i) // sink.shape[1], int(i) % sink.shape[1]
        if len(dormant) < wanted and taken[row] < sink.shape[1] // 2:
            dormant.append((row, head))
            taken[row] += 1
    active = [(row, int(head)) for row, count in enumerate(taken) for head in np.argsort(sink[row])[:count]]
    return dormant, active
