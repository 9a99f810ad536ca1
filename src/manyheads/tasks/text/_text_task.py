# SPDX-License-Identifier: Apache-2.0
"""What tasks on text share: contexts that all arms see, batches that fit, and the guard of the keep-everything arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...experiment.rows import Row, WorkUnit
from ...experiment.subjects import CausalLM
from ...experiment.task import RunContext, Task
from ...integrations import use
from ...strategy import Cache
from ._contexts import Contexts
from ._corpus import Corpus, Ids
from ._needles import CODE, PROSE
from ._prefill import Prefix, bytes_per_token, forward_chunked, sequences_at_once, token_nll

if TYPE_CHECKING:
    from ...experiment import Arm

__all__ = ["TARGET", "TextTask", "answers"]

TARGET = 64  # tokens that the loss of a context is judged on
_SHORTEST = 32  # tokens of a context
_ARMS = 4  # arms of a unit on a GPU: what a run that is cut off loses
_GUARD = (96, 16)  # tokens read and fed by the guard
_PATHS = {4: 5e-3, 2: 0.1}  # of the spread of the logits, by bytes of a number: of one path against another
_SAME = 5e-3  # of it: of two runs of one path; one token lost in 96 is 0.015 and more in published models


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Base of the tasks on text.

    Attributes:
        lengths: tokens of a context, ascending.
        samples: contexts of each length.
        text: what to read when the user gives nothing: ``code`` (the standard library's source) or a corpus of
            :mod:`manyheads.data.texts`.
        repeat: part of a context, in [0, 1), that is one passage of it over and over: text that says things twice.
        label: name in rows, where a run has the task twice.
    """

    subject: ClassVar[str] = "causal_lm"
    has_system: ClassVar[bool] = False  # contexts begin with a system message

    lengths: tuple[int, ...] = (1024, 2048)
    samples: int = 6
    text: str = "code"
    repeat: float = 0.0
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        if not self.lengths or self.lengths[0] < _SHORTEST:
            raise UserError(f"a context has at least {_SHORTEST} tokens; give longer --lengths")
        if self.samples < 1:
            raise UserError("samples count contexts: give 1 or more")
        if not 0 <= self.repeat < 1:
            raise UserError(f"repeat is a part of the context, at least 0 and below 1, not {self.repeat}")

    def contexts(self, run: RunContext) -> Contexts:
        """The contexts of this run; the same ones in every process."""

        def make() -> Contexts:
            from ...data.texts import corpus, is_code

            texts, tokenizer = run.data.get("texts") or corpus(self.text), _lm(run).tokenizer
            # The shipped model was trained to recall constants of code, and nothing else, whatever it reads.
            wording = CODE if _lm(run).name == "default" or is_code(texts) else PROSE
            return Contexts(Corpus(texts, tokenizer), tokenizer, self.samples, run.seed, self.repeat, wording)

        return cast(Contexts, run.kept((self.text, self.samples, self.repeat), make))

    def unsupported_reason(self, run: RunContext) -> str | None:
        if _lm(run).tokenizer is None:
            return f"{_lm(run).name} has no tokenizer, so that it reads no text"
        caches = [strategy for arm in run.arms for strategy in arm.strategies if isinstance(strategy, Cache)]
        if not self.has_system and (names := [strategy.spec for strategy in caches if strategy.protects_system]):
            return f"{self.name} has no system message that {names[0]} could protect; chat.system_prompt has one"
        most = _lm(run).max_context
        if self.lengths[-1] > most - 2 * TARGET:
            return (
                f"{type(_lm(run).model).__name__} reads {most} tokens, which leaves {most - 2 * TARGET} for a context; "
                f"{self.lengths[-1]} is too long"
            )
        return None

    def guard(self, run: RunContext) -> None:
        """Every cache that keeps everything, at a budget of 1, must predict what the model predicts alone."""
        run.kept("keep-everything guard", lambda: _guarded(run, self.contexts(run)))

    def batches(
        self, run: RunContext, length: int, cost: float, sequences: int = 1, shares: str = ""
    ) -> Iterator[WorkUnit]:
        """Units over the contexts, ``sequences`` to a context, in batches whose dense caches fit, and over the arms.

        On a GPU a prefill is cheap beside the Python of the forwards after it: a few arms are a unit there.
        """
        size = max(1, sequences_at_once(run.device, length, per_token(run)) // sequences)
        count, arms = ceil(self.samples / size), len(run.arms)
        groups = ceil(arms / _ARMS) if run.device.type == "cuda" else 1
        for i in range(count):
            first, last = i * self.samples // count, (i + 1) * self.samples // count
            for group in range(groups):
                start, stop = group * arms // groups, (group + 1) * arms // groups
                yield WorkUnit(
                    self.key, f"{length}/{first}/{start}", (last - first) * cost / groups,
                    f"{self.name}, {length} tokens",
                    {"length": length, "first": first, "last": last, "arms": [start, stop]},
                    f"{shares}/{length}/{first}/{start}" if shares else "",
                )  # fmt: skip

    @staticmethod
    def arms_of(run: RunContext, unit: WorkUnit) -> tuple[Arm, ...]:
        """The arms that a unit is about."""
        start, stop = unit.params["arms"]
        return run.arms[start:stop]

    def model(self, run: RunContext) -> Any:
        """What this task measures on: the subject's model, or a changed copy of it."""
        return model_of(run)

    def measure(self, run: RunContext, unit: WorkUnit) -> list[Row]:
        model = self.model(run)
        with torch.inference_mode(), use(model):
            return list(self.rows(run, unit))

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        """Rows of a unit; the port of the model is open."""
        raise NotImplementedError


def _lm(run: RunContext) -> CausalLM:
    return cast(CausalLM, run.subject)


def model_of(run: RunContext) -> Any:
    """The model that the run is about."""
    return _lm(run).model


def per_token(run: RunContext) -> float:
    """Bytes of dense cache that a token takes; raises UserError for a model that cannot be compared."""

    def find() -> float:
        with torch.inference_mode(), use(model_of(run)):
            return bytes_per_token(model_of(run))

    return cast(float, run.kept("bytes per token", find))


def tensor(run: RunContext, rows: Sequence[Sequence[int] | Ids]) -> Tensor:
    """Token ids ``[B, L]`` on the run's device."""
    return torch.from_numpy(np.stack([np.asarray(row, np.int64) for row in rows])).to(run.device)


def answers(
    run: RunContext, cache: Any, fed: Tensor, wanted: Tensor, size: int | None
) -> tuple[list[bool], list[float]]:  # fmt: skip
    """For each row whether its whole answer ``wanted [B, A]`` is the likeliest, and the nats of a token of it."""
    fed = torch.cat([fed, wanted[:, :-1]], 1)
    logits = forward_chunked(model_of(run), cache, fed, wanted.shape[1], size)
    return (logits.argmax(-1) == wanted).all(1).tolist(), token_nll(logits, wanted).mean(1).tolist()


def _guarded(run: RunContext, contexts: Contexts) -> bool:
    """Compare each lossless cache strategy of the run, at a budget of 1, with the plain model and with the baseline.

    The plain model is another path, which rounds otherwise; the baseline, forked and fed alike, is the same one.
    """
    read, fed = _GUARD
    model = model_of(run)
    ids = tensor(run, [contexts.plain("guard", read, 1, fed)[0][0]])
    whole = {arm: [_whole(strategy) for strategy in arm.strategies] for arm in run.arms}
    specs = {" + ".join(x.spec for x in kept): arm for arm, kept in whole.items() if kept and None not in kept}
    if not specs:
        return True
    with torch.inference_mode():
        plain = model(input_ids=ids).logits[:, -fed:].float()
        spread = plain.std() * plain.numel() ** 0.5
        with use(model):
            prefix = Prefix(model, ids[:, :read], run.arms)

            def fed_to(arm: Arm) -> Tensor:
                with prefix.open(arm) as cache:
                    return forward_chunked(model, cache, ids[:, read:], fed)

            same = fed_to(run.baseline)
            for spec, arm in specs.items():
                found = fed_to(dataclasses.replace(arm, spec=spec, budget=None))
                near = (found - plain).norm() <= _PATHS[next(model.parameters()).element_size()] * spread
                if not (near and (found - same).norm() <= _SAME * spread):
                    raise UserError(
                        f"{arm.key} with a budget of 1 keeps every token and yet predicts otherwise than "
                        f"{run.baseline.name} does, so that no figure of it would mean anything: report this, or leave "
                        "it out"
                    )
    return True


def _whole(strategy: Any) -> Any:
    """The strategy keeping everything, None where it never does."""
    able = isinstance(strategy, Cache) and strategy.has_budget and strategy.lossless
    return dataclasses.replace(strategy, budget=1.0).with_system((0, 1)) if able else None
