# SPDX-License-Identifier: Apache-2.0
"""Loss of a frozen language model on worked answers after a small adapter was trained on other problems.

``kind`` of an arm, see ``manyheads.recipes.graph_gin_attention``, says what is trained; an arm without is the model as
it is. All train on the same batches at as many parameters; each at that of the same learning rates which does best on
problems set aside, after a training of the first seed, which is that seed's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...data.word_problems import word_problems
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ...strategy import Strategy
from ..training._trained import arm_folder, read_json, write_json
from ._prefill import token_nll
from ._text_task import model_of

__all__ = ["AdaptedLoss"]

_PARTS = ("first third", "second third", "last third")  # of the depth
_AT_ONCE = 16  # problems judged in one batch


@dataclass(frozen=True, kw_only=True)
class AdaptedLoss(Task):
    """A value for each held-out problem and seed, over the tokens of its answer.

    Attributes:
        steps, batch, length: of a training: sequences of a step, and their tokens.
        rates: highest learning rates that every arm tries.
        width: channels of Sparse-GIN; LoRA's rank follows from its parameters.
        problems: that are judged.
        tuning: problems that a rate is chosen by.
        source: of :func:`manyheads.data.word_problems.word_problems`.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "token_nll", "loss of worked answers, nats/token", "nats/token",
            what="how unlikely the model finds the worked answers of problems that no training met",
        ),
        Metric("scale", "lambda after training"),
        Metric("tuning_nll", "loss on what is set aside for tuning, nats/token", "nats/token"),
    )  # fmt: skip

    steps: int = 200
    batch: int = 8
    length: int = 256
    rates: tuple[float, ...] = (1e-3, 3e-3)
    width: int = 155
    problems: int = 200
    tuning: int = 50
    source: str = "gsm8k"

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or min(self.steps, self.batch, self.problems, self.tuning) < 1:
            raise UserError("rates are above 0; steps, batch, problems and tuning count, 1 or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        lm = cast(CausalLM, run.subject)
        return None if lm.tokenizer is not None else f"{lm.name} has no tokenizer, so that it reads no problems"

    def units(self, run: RunContext) -> list[WorkUnit]:
        """A unit for each training, those of the first seed, which choose the rates, before all others."""
        found = []
        for seed in run.seeds:
            for arm in run.arms:
                trained = "kind" in arm.options
                if trained or seed == run.seeds[0]:
                    runs = len(self.rates) if seed == run.seeds[0] else 1
                    cost = float(self.steps * runs) if trained else 1.0
                    label = f"training {arm.key}, seed {seed}"
                    found.append(WorkUnit(self.key, f"{arm.key}/{seed}", cost, label, {"arm": arm.key, "seed": seed}))
        return found

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, model, seed = run.arm_of(unit), model_of(run), int(unit.params["seed"])
        test = self._parts(run)[0]
        if "kind" not in arm.options:
            values = losses(model, test)
            for each in run.seeds:
                yield from self.each("token_nll", arm, values, seed=each)
            return
        rate, made = self._chosen(run, arm, seed)
        if seed == run.seeds[0]:
            for tried, found in self._tuned(run, arm).items():
                yield self.row("tuning_nll", arm, found, "tuning", seed=seed, at={"rate": tried})
        about = {"rate": rate, **made.about}
        values = losses(model, test, _acting(made))
        yield from self.each("token_nll", arm, values, [about] * len(values), seed=seed)
        yield from self._scales(arm, made, seed)

    def _chosen(self, run: RunContext, arm: Arm, seed: int) -> tuple[float, Any]:
        """The rate that did best for the first seed, and what a training of ``seed`` makes at it."""
        tuned = self._tuned(run, arm)
        rate = min(tuned, key=lambda x: tuned[x]) if tuned else self.rates[0]
        made = run.kept_last("adapters", (self, arm.key, run.seeds[0]), dict) if seed == run.seeds[0] else {}
        return rate, made[rate] if rate in made else self._trained(run, arm, seed, rate)

    def _tuned(self, run: RunContext, arm: Arm) -> dict[float, float]:
        """Loss on what is set aside by rate, of the first seed; read from the run's folder where a unit wrote it."""
        if len(self.rates) == 1:
            return {}

        def make() -> dict[float, float]:
            settings = {"task": repr(self), "arm": repr(arm.described()), "seed": run.seed, "first": run.seeds[0]}
            place = None if run.folder is None else arm_folder(Path(run.folder), arm.key) / f"{self.key}-tuning.json"
            if place is not None and (kept := read_json(place, settings)) is not None:
                return dict(kept["losses"])
            made = run.kept_last("adapters", (self, arm.key, run.seeds[0]), dict)
            found = {}
            for rate in self.rates:
                made[rate] = self._trained(run, arm, run.seeds[0], rate)
                values = losses(model_of(run), self._parts(run)[1], _acting(made[rate]))
                found[rate] = sum(values) / len(values)
            if place is not None:
                write_json(place, settings, losses=list(found.items()))
            return found

        return cast(dict[float, float], run.kept(("tuned", self, arm.key), make))

    def _trained(self, run: RunContext, arm: Arm, seed: int, rate: float) -> Any:
        """What a training makes."""
        from ...recipes._adapters import id_batches
        from ...recipes.graph_gin_attention import train_adapters

        ids = run.kept((self.source, "ids"), lambda: torch.cat([torch.tensor(x) for _, x in self._parts(run)[2]]))
        return train_adapters(
            model_of(run), id_batches(ids, self.length, self.batch, seed, run.device),
            kind=arm.options["kind"], width=self.width, budget=self.steps, lr=rate, seed=seed,
            replayed=run.device.type == "cuda", on_step=lambda _: run.advance(1.0),
        )  # fmt: skip

    def _scales(self, arm: Arm, made: Any, seed: int) -> Iterator[Row]:
        """Lambda by the depth of its layer."""
        from ...mixers.graph_gin_attention import Adapters

        if not isinstance(made, Adapters):
            return
        for place, (layer, value) in enumerate(made.scales().items()):
            part = _PARTS[place * len(_PARTS) // len(made.kv_heads)]
            yield self.row("scale", arm, value, f"{layer}", seed=seed, at={"depth": part})

    def _parts(self, run: RunContext) -> tuple[list[tuple[int, list[int]]], ...]:
        """Problems as tokens, with where their answers begin: judged, for tuning, and for training."""

        def make() -> tuple[list[tuple[int, list[int]]], ...]:
            encode: Callable[..., list[int]] = cast(CausalLM, run.subject).tokenizer.encode
            given = word_problems(self.source)
            if len(given) < 2 * (self.problems + self.tuning):
                raise UserError(f"{self.source} has {len(given)} problems: judge and tune by half of them at most")
            made = []
            for i in run.rng(problems=self.source).permutation(len(given)):
                question, answer = given[i]
                asked = encode(f"Question: {question}\nAnswer:", add_special_tokens=False)
                made.append((len(asked), asked + encode(f" {answer}\n\n", add_special_tokens=False)))
            last = self.problems + self.tuning
            return made[: self.problems], made[self.problems : last], made[last:]

        return cast(tuple[list[tuple[int, list[int]]], ...], run.kept(("problems", self), make))


def _acting(made: Any) -> Strategy:
    """The strategy that acts with what was trained."""
    from ...mixers.graph_gin_attention import Adapter, Adapters, Lora

    return Adapter(live=made) if isinstance(made, Adapters) else Lora(live=made)


@torch.inference_mode()
def losses(model: Any, problems: list[tuple[int, list[int]]], *acting: Strategy) -> list[float]:
    """Nats per token of each answer, the tokens from a place on, with strategies that act; padded on the right."""
    found = [0.0] * len(problems)
    order = sorted(range(len(problems)), key=lambda i: len(problems[i][1]))  # little padding
    with use(model, *acting) if acting else nullcontext():
        for i in range(0, len(problems), _AT_ONCE):
            part = [problems[place] for place in order[i : i + _AT_ONCE]]
            width = max(len(tokens) for _, tokens in part)
            padded = [tokens + [0] * (width - len(tokens)) for _, tokens in part]
            ids = torch.tensor(padded, device=model.device)
            nats: Tensor = token_nll(model(input_ids=ids[:, :-1], use_cache=False).logits.float(), ids[:, 1:])
            for place, row, (start, tokens) in zip(order[i : i + _AT_ONCE], nats, part, strict=True):
                found[place] = float(row[start - 1 : len(tokens) - 1].mean())
    return found
