# SPDX-License-Identifier: Apache-2.0
"""What heads of a published model tell apart among many keys, by the measures of attention_normalization_limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import refusal
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ..text._reader import long_texts, reader, whole
from ..text._text_task import model_of
from ._windows import WindowTask

__all__ = ["NormalizationMeasures"]

SHARE = "L/16"  # near the paper's 0.06 L
_LARGER = 100  # times the cost of a token in training a small model


@dataclass(frozen=True, kw_only=True)
class NormalizationMeasures(WindowTask):
    """A value for each text: the mean over layers and heads of rows that see so many keys.

    Of the model as it is, whatever the arm: an arm's normalizer weighs the model's own logits. The conditions are
    ``keys``: ``most`` (all that a text has), ``fewest``, or a number between them, and ``selected``: N as a number or
    a share of the keys, ``spread`` where N keys are spread evenly. Arms other than the baseline are measured where keys
    are most and a sixteenth is selected.

    Attributes:
        fewest: keys of the shortest row; others see twice as many, and so on.
        encoder: measured in place of the subject, see :func:`manyheads.models.load_reader`.
        label: what it is called where an experiment has it several times.
        every_row: whether the sensitivity is also taken of all rows.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("distance", "norm of what is outside of the selection, over the greatest value's"),
        Metric("bound", "weight outside of the selection, which bounds it"),
        Metric("tightest", "distance over its bound, greatest of all rows of a text"),
        Metric("separability", "selected keys that are told apart from all others", higher=True, kind="share"),
        Metric("sensitivity", "norm of a row's Jacobian"),
        Metric("beyond", "rows whose Jacobian's spectral norm exceeds 1 / (4 T)", kind="share"),
        Metric("sensitivity_of_every_row", "norm of a row's Jacobian, mean of all rows"),
    )

    tokens: int = 8192
    fewest: int = 256
    encoder: str = ""
    label: str = ""
    every_row: bool = False

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not self.encoder:
            return super().unsupported_reason(run)
        return refusal(lambda: self._texts(run))

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(_LARGER * self.windows_of * self.tokens)
        return [WorkUnit(self.key, "measures", cost, f"{self.key.replace('_', ' ')} of {self.windows_of} texts")]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        import manyheads

        from ...mixers.attention_normalization_limits import NormalizationMeasures as Measures
        from ...mixers.attention_normalization_limits import Normalized

        arms = [(arm, one) for arm in run.arms for one in arm.strategies if isinstance(one, Normalized)]
        lenses = [
            Measures(normalizer=one.normalizer, alpha=one.alpha, k=one.k, trained=one.trained, least=self.fewest,
                     every_row=self.every_row and not i)
            for i, (_, one) in enumerate(arms)
        ]  # fmt: skip
        model = reader(run, self.encoder)[0] if self.encoder else model_of(run)
        for i, texts in enumerate(self._texts(run)):
            with manyheads.watch(model, *lenses) as seen:
                for ids in texts:
                    model(input_ids=ids, use_cache=False, **({} if self.encoder else {"logits_to_keep": 1}))
            for number, (arm, _) in enumerate(arms):
                yield from self._rows_of(arm, seen.compute(number), f"{i}", everything=not number)
            run.advance(unit.cost / self.windows_of)

    def _rows_of(self, arm: Arm, found: Any, sample: str, everything: bool) -> Iterator[Row]:
        keys = [round(n) for n in found.curves["distance"]["keys"]]
        places = {keys.index(n): n for n in self._lengths if n in keys}
        for place, n in places.items():
            among = {self.fewest: "fewest", self._lengths[-1]: "most"}.get(n, str(n))
            if not everything and among != "most":
                continue
            for metric in ("distance", "separability"):
                for name, column in found.curves[metric].items():
                    selected = name.removeprefix("N = ").replace(",", "")
                    if name != "keys" and (everything or selected == SHARE):
                        bound = name.startswith("bound")
                        at = {"selected": selected.removeprefix("bound N = "), "keys": among}
                        yield self.row("bound" if bound else metric, arm, column[place], sample, at=at)
            if not everything:
                continue
            for name, column in found.curves["sensitivity"].items():
                if name.startswith("T = "):
                    at = {"temperature": name.removeprefix("T = "), "keys": among}
                    yield self.row("sensitivity", arm, column[place], sample, at=at)
            (beyond,) = (column for name, column in found.curves["beyond"].items() if name != "keys")
            yield self.row("beyond", arm, beyond[place], sample, at={"keys": among})
        if everything:
            tightest = max(value for one in found.records["tightest"] for name, value in one.items() if "over" in name)
            yield self.row("tightest", arm, tightest, sample)
            if (every := found.tables.get("sensitivity of every row")) is not None:
                yield self.row("sensitivity_of_every_row", arm, every.mean.mean(), sample)

    @property
    def _lengths(self) -> list[int]:
        """``fewest``, and twice as many as long as a text has them."""
        made = [self.fewest]
        while 2 * made[-1] <= self.tokens:
            made.append(2 * made[-1])
        return made

    def _texts(self, run: RunContext) -> Sequence[list[Tensor]]:
        """What is read of each text: all at once, or by an encoder its beginning at each length."""
        if not self.encoder:
            return [[row[None, :-1]] for row in self.windows(run)]

        def make() -> Sequence[list[Tensor]]:
            tokenizer, rng = reader(run, self.encoder)[1], run.rng(measures=self.text)
            long = long_texts(run, tokenizer, self.text, self.tokens - 2, self.windows_of, rng)[: self.windows_of]
            return [[whole(tokenizer, [ids[: n - 2]]).to(run.device) for n in self._lengths] for ids in long]

        found: Sequence[list[Tensor]] = run.kept(("measures", self.key), make)
        return found
