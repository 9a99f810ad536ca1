# SPDX-License-Identifier: Apache-2.0
"""The comparison of ``manyheads compare``: any mix of strategies that fits the subject, on equal budgets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .experiment.arms import BASELINE, Arm
from .experiment.journal import FOLDER, Results
from .strategy import Cache

if TYPE_CHECKING:
    from .data.texts import Text
    from .experiment.design import Experiment
    from .experiment.executors import Executor
    from .experiment.subjects import CausalLM, Subject
    from .progress import Progress

__all__ = ["BUDGETS", "LENGTHS", "SAMPLES", "STRATEGIES", "TASKS", "compare", "make_arms", "plan"]

# hedge at one budget, and asking a quarter of its queries again: on a CPU they are what it costs.
STRATEGIES = ("random", "streaming_llm", "snapkv", "keydiff", "hedge:window_size=128,budget=0.1")
BUDGETS: tuple[float, ...] = (0.5, 0.25, 0.1)
LENGTHS = (1024, 2048)
SAMPLES = 6
ROUNDS = 2
TASKS: Mapping[str, tuple[str, ...]] = {
    "causal_lm": ("perplexity", "niah_single", "niah_multikey", "variable_tracking", "speed", "memory"),
    "pipeline": ("fidelity", "denoising_cost"),
    "vision": ("saliency", "encoder_cost"),
}


def compare(
    model: Any = None, tokenizer: Any = None, texts: Sequence[Text] | None = None,
    strategies: Iterable[str] = STRATEGIES, budgets: Sequence[int | float | str] = BUDGETS,
    tasks: Sequence[str] | None = None, *, subject: Subject | None = None, lengths: Sequence[int] | None = None,
    samples: int | None = None, rounds: int = ROUNDS, seed: int = 0, out: str | Path = FOLDER,
    origin: str | None = None, command: Sequence[str] = (), progress: Progress | None = None,
    options: Mapping[str, Any] | None = None, executor: Executor | None = None, device: str = "cpu",
) -> Results:  # fmt: skip
    """Compare strategies on a model and data, and keep the rows in ``out``.

        model, tokenizer = manyheads.models.load_default()
        results = manyheads.compare(model, tokenizer, strategies=["snapkv", "keydiff"], budgets=[0.25])

    Every arm (a strategy at a budget) sees the same contexts. A run that was cut off goes on when it is called again
    with the same settings and folder; quality figures are the same on the same machine, however often it is cut off.

    Args:
        model, tokenizer: a causal language model of transformers, in evaluation mode, on the device to use; or give
            ``subject``.
        texts: what to read, see :mod:`manyheads.data.texts`; when None, prose for a model with a chat template whose
            name does not speak of code, and the standard library's source for any other.
        strategies: specs, several that act together joined by `` + ``; the plain subject is always among the arms.
        budgets: fractions in (0, 1] of the tokens of a context, or whole numbers of slots.
        tasks: names of tasks, see :func:`manyheads.tasks.names`, with fields as in ``ruler.vt:query_aware=true`` where
            one is not to have its default; those of :data:`TASKS` for the subject when None.
        subject: what to compare on, see :mod:`manyheads.experiment.subjects`.
        lengths: tokens of a context; when None, 1024 and 2048 as far as the model reads so many.
        samples: contexts, or images, per task and length.
        rounds: repetitions of the timing.
        seed: of all draws.
        out: folder of the results.
        origin: what the model is called in the report; its class when None.
        command: what was typed, for the report.
        progress: is told how far the run is.
        options: settings to keep in ``run.json``.
        executor: where units run; this process when None.
        device: where a subject that is not loaded yet is loaded to.

    Raises:
        UserError: anything that the caller can mend, before any work is done.
    """
    from .experiment.runner import run
    from .experiment.subjects import CausalLM

    if subject is None:
        subject = CausalLM(origin or type(model).__name__, model, tokenizer) if model is not None else CausalLM()
    if model is not None:
        from .lens import device_of

        device = str(device_of(model))
    text = "code" if texts is not None or not isinstance(subject, CausalLM) else _fitting(subject)
    experiment = plan(subject, strategies, budgets, tasks, lengths, samples, rounds, text)
    data = {"texts": list(texts)} if texts is not None else {}
    about = {"command": list(command), "options": dict(options or {}), "kind": "compare"}
    return run(
        experiment.at("cpu"), out, seed=seed, device=device, data=data, executor=executor, progress=progress,
        about=about,
    )  # fmt: skip


def plan(
    subject: Subject, strategies: Iterable[str] = STRATEGIES, budgets: Sequence[int | float | str] = BUDGETS,
    tasks: Sequence[str] | None = None, lengths: Sequence[int] | None = None, samples: int | None = None,
    rounds: int = ROUNDS, text: str = "code",
) -> Experiment:  # fmt: skip
    """The experiment of a comparison; loads nothing.

    Raises:
        UserError: unknown strategy, field or task, a strategy that does not act on the subject, a budget that is none
            or cannot hold the protected tokens.
    """
    from .experiment.design import Experiment, Sizes
    from .experiment.subjects import CausalLM
    from .tasks import given

    names = tuple(dict.fromkeys(TASKS[subject.kind] if tasks is None else tasks))
    if not names:
        raise UserError(f"no task is given; there are {', '.join(TASKS[subject.kind])}")
    read = [given(name) for name in names]
    made: list[Any] = [task for task, _ in read]
    if wrong := [task.name for task in made if task.subject != subject.kind]:
        fit = ", ".join(TASKS[subject.kind])
        raise UserError(f"{wrong[0]} does not measure on a {subject.kind.replace('_', ' ')}; there are {fit}")
    sizes: dict[str, Any] = {"rounds": rounds}
    if isinstance(subject, CausalLM):
        sizes |= {"lengths": _lengths(subject, lengths), "text": text}
    if samples is not None or isinstance(subject, CausalLM):
        sizes["samples"] = SAMPLES if samples is None else samples
    own = {f"{task.key}.{name}": value for task, fields in read for name, value in fields.items()}
    known = {f.name for task in made for f in dataclasses.fields(task)} | set(own)
    sizes |= own
    for task in made:
        task.sized(sizes)  # a size that a task refuses is said before a budget that does not fit it
    shortest = min(sizes.get("lengths", (2**31,)))
    return Experiment(
        subject=subject, arms=tuple(make_arms(strategies, budgets, subject, shortest)), tasks=tuple(made), seeds=1,
        sizes=Sizes(cpu={name: value for name, value in sizes.items() if name in known}),
    )  # fmt: skip


def make_arms(
    specs: Iterable[str], budgets: Sequence[int | float | str], subject: Subject, shortest: int = 2**31
) -> list[Arm]:  # fmt: skip
    """Arms of every spec at every budget, each once; a spec that names its budget is one arm.

    Args:
        specs: specs of strategies; the baseline may be among them.
        budgets: fractions in (0, 1] or whole numbers of slots.
        subject: what they have to act on.
        shortest: tokens of the shortest context, which every budget has to fit.

    Raises:
        UserError: as for :func:`plan`.
    """
    from .attention.budget import as_budget, keep_limit
    from .spec import parse, read, split_together

    values = [as_budget(budget) for budget in budgets]
    arms: list[Arm] = []
    for spec in specs:
        parts = [parse(part) for part in split_together(spec)]
        for strategy in parts:
            if reason := subject.unsupported_reason(strategy):
                raise UserError(reason)
        if spec.strip() == BASELINE:
            continue
        sized = [strategy for strategy in parts if isinstance(strategy, Cache) and strategy.has_budget]
        own = any("budget" in read(part).fields for part in split_together(spec))
        if not sized or own:
            arms.append(_arm(spec, sized[0].budget if sized and len(parts) == 1 else None, own))
        elif len(parts) > 1:
            raise UserError(
                f"{spec!r}: write the budget of {sized[0].slug} in the spec, as {sized[0].slug}:budget=0.25"
            )
        elif not values:
            raise UserError("no budget is given; write for instance --budgets 0.5,0.25")
        else:
            arms += [Arm(spec.strip(), spec.strip(), value) for value in values]
    unique = list({arm.key: arm for arm in arms}.values())
    for arm in unique:
        for strategy in arm.strategies:
            if isinstance(strategy, Cache) and strategy.has_budget and strategy.budget != 1.0:
                strategy.check(keep_limit(strategy.budget, shortest))
    return unique


def _arm(spec: str, budget: int | float | None, own: bool) -> Arm:
    """One arm of a spec that names its budget, or has none; the budget is taken out, so that tables can sort by it."""
    from .spec import Spec, read

    spec = spec.strip()
    if not own or budget is None:
        return Arm(spec, spec)
    given = read(spec)
    fields = {name: value for name, value in given.fields.items() if name != "budget"}
    plain = Spec(given.name, fields).text
    return Arm(plain, plain, budget)


def _fitting(subject: CausalLM) -> str:
    """The text that a model is most at home in, by its chat template and its name."""
    if not subject.chats or re.search(r"(?<![a-z])cod(e|ing)|(star|santa)coder", subject.name.lower()):
        return "code"
    return "prose"


def _lengths(subject: CausalLM, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """Lengths of contexts, sorted; by default as far as the model reads, which its loaded config says."""
    if lengths is not None:
        return tuple(sorted(set(lengths)))
    from .tasks.text._text_task import TARGET

    most = subject.max_context - 2 * TARGET
    return tuple(length for length in LENGTHS if length <= most) or (1 << (max(most, 32).bit_length() - 1),)
