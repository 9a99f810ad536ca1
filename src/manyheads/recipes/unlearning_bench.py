# SPDX-License-Identifier: Apache-2.0
"""Make a vision-language model know fictitious people and events, make it forget some, and say what else was lost.

    python -m manyheads.recipes.unlearning_bench --method unlearning_bench --out FOLDER
    python -m manyheads.recipes.unlearning_bench --joined --method unlearning_bench.negative_preference:beta=0.1

Without ``--joined`` the model is small and from scratch, and a minute is enough on a CPU. A joined model before and
after is saved where ``--out`` names a folder. In Python :func:`unlearn` takes any ``JoinedVLM``:

    done = unlearn(vlm, "unlearning_bench", benchmark, steps=60)
    right(vlm, benchmark, benchmark.new["forget person"])  # which questions are answered rightly
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manyheads
from manyheads.data.fictitious import REFUSAL, WORDS, Benchmark, Item, world
from manyheads.errors import UserError
from manyheads.heads import HeadTable
from manyheads.integrations.head_weights import head_parts
from manyheads.lenses.unlearning_bench.attribution import importance, more_important
from manyheads.models import joined_vlm
from manyheads.models.image_pool import ImagePool, fit_projector
from manyheads.models.joined_vlm import JoinedVLM
from manyheads.spec import parse
from manyheads.training import TrainState, fit
from manyheads.training.answers import answer_logits, answer_loss, train_answers
from manyheads.training.slices import Slice, train_slices
from manyheads.unlearning import Answers, Unlearning

__all__ = ["CONCEPTS", "Unlearned", "batches", "important_heads", "learn", "pooled", "read", "right", "unlearn"]

CONCEPTS = ("person", "event")
_KNOWN = ("scope person", "scope event", "retain", "real")  # what a model that never learned the rest is trained on
_AT_ONCE, _LOOK, _HALVINGS = 64, 5, 4
Batch = dict[str, Tensor]
OnStep = Callable[[TrainState], Any]


@dataclass(frozen=True)
class Unlearned:
    """How unlearning went.

    Attributes:
        steps: that the weights which are left have taken.
        share: of the way of :meth:`manyheads.unlearning.Unlearning.merged` that was gone.
        trained: numbers that were.
    """

    steps: int
    share: float
    trained: int


def read(vlm: JoinedVLM, bench: Benchmark, items: Sequence[Item], refuse: bool = False) -> Batch:
    """Questions as the model takes them, on its device; answered by a refusal where asked for."""
    asked = bench.asked(items, [REFUSAL] * len(items) if refuse else None)
    return vlm.read(asked, asked.at, asked.answers)


def batches(items: Sequence[Item], count: int, seed: int) -> Callable[[int], list[Item]]:
    """``count`` of ``items`` by the number of a step: in a new order each time that all have come."""

    def drawn(step: int) -> list[Item]:
        chosen = []
        for place in range(step * count, (step + 1) * count):
            epoch, at = divmod(place, len(items))
            chosen.append(items[_order(len(items), seed, epoch)[at]])
        return chosen

    return drawn


@lru_cache(maxsize=16)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def pooled(vlm: JoinedVLM, bench: Benchmark) -> ImagePool:
    """All that a model is trained on, each picture read once; for a model whose tower is frozen."""
    items, seen = [item for found in bench.trained.values() for item in found], dict[tuple[int, int, int], int]()
    shown = torch.tensor([seen.setdefault((item.person, item.event, item.view), len(seen)) for item in items])
    before = torch.cat([shown.new_tensor([-1]), shown.cummax(0).values[:-1]])

    def parts() -> Iterator[Batch]:
        for start in range(0, len(items), _AT_ONCE):
            batch, first = read(vlm, bench, items[start : start + _AT_ONCE]), (shown > before)[start : start + _AT_ONCE]
            yield {**batch, "pixel_values": batch["pixel_values"][first.to(batch["at"].device)]}

    return ImagePool.of(vlm, parts(), shown[:, None])


def learn(
    vlm: JoinedVLM, bench: Benchmark, *, forgotten: bool = True, steps: int = 1000, batch: int = 32, lr: float = 5e-3,
    slower: float = 1.0, seed: int = 0, pool: ImagePool | None = None, on_step: OnStep | None = None,
) -> TrainState:  # fmt: skip
    """Train a model on a benchmark.

    Args:
        vlm: what requires gradients is trained.
        bench: its facts in seen words and pictures.
        forgotten: also those that are to be forgotten; without, the model is what unlearning ideally leads to.
        steps, batch, lr, slower: of the training, as for :func:`manyheads.training.answers.train_answers`.
        seed: of the order.
        pool: from :func:`pooled`; steps read it, recorded on a GPU, and the projector is fitted to its features.
        on_step: see :func:`manyheads.training.fit`.
    """
    items = [item for part, found in bench.trained.items() if forgotten or part in _KNOWN for item in found]
    get = batches(items, batch, seed)
    if pool is not None:
        fit_projector(vlm, pool.features)
        number = {item: i for i, item in enumerate(item for found in bench.trained.values() for item in found)}
        rows = torch.tensor([[number[item] for item in get(step)] for step in range(steps)]).to(pool.ids.device)
        return train_answers(vlm.model, lambda step: pool.batch(rows[step]), steps, lr=lr, slower=slower,
                             replayed=rows.is_cuda, on_step=on_step)  # fmt: skip
    return train_answers(vlm.model, lambda step: read(vlm, bench, get(step)), steps, lr=lr, slower=slower,
                         on_step=on_step)  # fmt: skip


@torch.no_grad()
def right(vlm: JoinedVLM, bench: Benchmark, items: Sequence[Item]) -> list[bool]:
    """Which questions are answered rightly: every token is the likeliest, so that greedy decoding says the answer."""
    found: list[bool] = []
    for start in range(0, len(items), _AT_ONCE):
        batch = read(vlm, bench, items[start : start + _AT_ONCE])
        said = answer_logits(vlm.model, batch).argmax(-1)
        found += ((said == batch["answers"]) | (batch["answers"] < 0)).all(1).tolist()
    return found


@dataclass(frozen=True)
class _Step:
    """The questions of a step, as :class:`manyheads.unlearning.Readings` has them; ``model`` is that before."""

    vlm: JoinedVLM
    bench: Benchmark
    model: nn.Module | None
    given: Mapping[str, Sequence[Item]]

    @property
    def concepts(self) -> list[str]:
        return [name for name in self.given if name != "retain"]

    def forget(self, concept: str) -> Answers:
        return self._read(self.vlm.model, concept)

    def refused(self, concept: str) -> Answers:
        return self._read(self.vlm.model, concept, refuse=True)

    def retain(self) -> Answers:
        return self._read(self.vlm.model, "retain")

    @torch.no_grad()
    def before(self, concept: str) -> Answers:
        if self.model is None:
            raise ValueError("a strategy that reads the model before says so: refers = True")
        return self._read(self.model, concept)

    def _read(self, model: nn.Module, name: str, refuse: bool = False) -> Answers:
        batch = read(self.vlm, self.bench, self.given[name], refuse)
        return Answers(answer_logits(model, batch), batch["answers"])


def unlearn(
    vlm: JoinedVLM, strategy: str | Unlearning, bench: Benchmark, *, concepts: Sequence[str] = CONCEPTS,
    steps: int = 60, batch: int = 16, lr: float = 5e-4, drop: float = 0.1, seed: int = 0,
    on_step: OnStep | None = None,
) -> Unlearned:  # fmt: skip
    """Make a model forget in place what a benchmark says, by AdamW at one rate.

    Every few steps questions to be kept are asked; where fewer by ``drop`` are answered than before, training ends with
    the weights of the last time that they were. A strategy that merges weights goes half the way instead, and half of
    that.

    Args:
        vlm: has learned the benchmark; what requires gradients is trained, of the layers or heads of the strategy.
        strategy: an unlearning strategy, or its spec.
        bench: the benchmark.
        concepts: of which facts are forgotten.
        steps, batch, lr: of the training; a batch for each concept and one of what is kept.
        drop: largest loss of answers that are kept, as a share; 1 for none at all.
        seed: of the order.
        on_step: see :func:`manyheads.training.fit`.

    Raises:
        UserError: the strategy does not unlearn, or nothing that it names is trained.
    """
    chosen = parse(strategy) if isinstance(strategy, str) else strategy
    if not isinstance(chosen, Unlearning):
        raise UserError(f"{chosen.slug} makes no model forget; `manyheads find unlearning` shows what does")
    before = copy.deepcopy(vlm.model).requires_grad_(False) if chosen.refers else None
    drawn = {name: batches(bench.trained[f"forget {name}"], batch, seed) for name in concepts}
    drawn["retain"] = batches(bench.trained["retain"], batch, seed)
    asked = batches(bench.trained["retain"], 2 * _AT_ONCE, seed + 1)(0)

    def get_batch(step: int) -> _Step:
        return _Step(vlm, bench, before, {name: items(step) for name, items in drawn.items()})

    known = sum(right(vlm, bench, asked))
    with _trained(vlm, chosen) as (parameters, held, optimizer):

        def holds() -> bool:
            return sum(right(vlm, bench, asked)) >= known - drop * len(asked)

        first = [p.detach().clone() for p in held]
        last, taken = first, 0
        whole = type(chosen).merged is Unlearning.merged  # else the weights that are trained are not those that count

        def look(state: TrainState) -> bool:
            nonlocal last, taken
            stops = False
            if whole and (state.step % _LOOK == 0 or state.step == steps):
                if stops := not holds():
                    _put(held, last)
                else:
                    last, taken = [p.detach().clone() for p in held], state.step
            return bool(on_step and on_step(state)) or stops

        fit(
            vlm.model, get_batch, _loss(chosen, parameters), budget=steps, optimizers=[optimizer(lr)], on_step=look,
        )  # fmt: skip
        if whole:
            return Unlearned(taken, 1.0, sum(p.numel() for p in parameters))
        after = [p.detach().clone() for p in held]
        for share in (*(0.5**i for i in range(_HALVINGS)), 0.0):
            _put(held, [chosen.merged(a, b, share) for a, b in zip(first, after, strict=True)])
            if holds():
                break
        return Unlearned(steps, share, sum(p.numel() for p in parameters))


def _loss(strategy: Unlearning, parameters: Sequence[Tensor]) -> Any:
    """The loss of a step as :func:`manyheads.training.fit` takes it: its terms, gradients put together at the end."""

    def loss(model: nn.Module, step: _Step) -> Iterator[Tensor]:
        terms = strategy.terms(step)
        if not strategy.apart:
            yield from terms
            return
        apart = []
        for term in terms:
            yield term
            apart.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        with torch.autocast(parameters[0].device.type, enabled=False), torch.no_grad():
            for p, gradient in zip(parameters, strategy.combined(apart), strict=True):
                p.grad = gradient

    return loss


@contextmanager
def _trained(
    vlm: JoinedVLM, strategy: Unlearning
) -> Iterator[tuple[list[nn.Parameter], list[nn.Parameter], Callable[[float], torch.optim.Optimizer]]]:
    """What an optimiser trains, the model's parameters that change by it, and how one is made."""
    decoder = vlm.model.model.language_model
    if strategy.heads:
        slices = [Slice(*part) for part in head_parts(decoder, strategy.heads, strategy.parts)]
        with train_slices(vlm.model, slices) as own:
            held = [each.parameter for each in slices]
            yield own.parameters, held, lambda lr: own.follow(_adamw(own.parameters, lr))
        return
    layers = None if strategy.layers is None else {f"layers.{i}." for i in strategy.layers}
    inside = {id(p): name for name, p in decoder.named_parameters()}
    chosen = [
        p for p in vlm.model.parameters()
        if p.requires_grad and (layers is None or any(inside.get(id(p), "").startswith(x) for x in layers))
    ]  # fmt: skip
    if not chosen:
        raise UserError(f"{strategy.spec}: nothing in these layers is trained; the decoder has {len(decoder.layers)}")
    others = [p for p in vlm.model.parameters() if p.requires_grad and not any(p is own for own in chosen)]
    for p in others:
        p.requires_grad_(False)
    try:
        yield chosen, chosen, lambda lr: _adamw(chosen, lr)
    finally:
        for p in others:
            p.requires_grad_(True)


def _adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def important_heads(
    vlm: JoinedVLM, bench: Benchmark, *, concepts: Sequence[str] = CONCEPTS, count: int = 8, batch: int = 16,
    seed: int = 0,
) -> HeadTable:  # fmt: skip
    """Heads of the decoder that answers to be forgotten hang on more than answers to be kept do, ``[1, L, H]``.

    Args:
        vlm, bench, concepts: as for :func:`unlearn`.
        count, batch: of the batches that are read, and questions of each.
        seed: of the questions.
    """
    tables = []
    gone = [item for name in concepts for item in bench.trained[f"forget {name}"]]
    asks = [p.requires_grad for p in vlm.model.parameters()]
    vlm.model.requires_grad_(False)
    for name, items in (("what is forgotten", gone), ("what is kept", bench.trained["retain"])):
        drawn = batches(items, batch, seed)
        losses = [
            lambda step=step, drawn=drawn: answer_loss(vlm.model, read(vlm, bench, drawn(step)))
            for step in range(count)
        ]  # fmt: skip
        tables.append(importance(vlm.model.model.language_model, manyheads.use, losses, f"importance to {name}"))
    for p, needed in zip(vlm.model.parameters(), asks, strict=True):
        p.requires_grad_(needed)
    return more_important(*tables)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.unlearning_bench", description="Learn fictitious people and events, forget some."
    )
    parser.add_argument("--method", default="unlearning_bench", help="spec of an unlearning strategy")
    parser.add_argument("--joined", action="store_true", help="DINOv2 and SmolLM2 in place of a small model")
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--events", type=int, default=6)
    parser.add_argument("--forget", default="3+2", help="how many people and events, as 3+2")
    parser.add_argument("--views", type=int, default=10, help="pictures of each person at each event")
    parser.add_argument("--learn", type=int, default=0, help="steps of the training; 1000, or 400 with --joined")
    parser.add_argument("--steps", type=int, default=60, help="of unlearning, at most")
    parser.add_argument("--lr", type=float, default=0.0, help="of unlearning; 5e-4, or 1e-4 with --joined")
    parser.add_argument("--out", type=Path, help="folder for the joined models: before/ and after/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.out and (args.out.exists() or not args.joined):
        parser.error("--out is for --joined, and names a new folder")
    people, _, events = args.forget.partition("+")
    try:
        torch.manual_seed(args.seed)
        if args.joined:
            vlm, side, patches = joined_vlm.join(attention=True, device=args.device), 12, 12
        else:
            vlm, side, patches = joined_vlm.small(words=WORDS, device=args.device), 6, 6
        bench = Benchmark(
            world(args.people, args.events, args.seed), vlm.language, side * vlm.patch, patches,
            people=int(people), events=int(events or 0), views=args.views, seed=args.seed,
        )  # fmt: skip
        rates: dict[str, Any] = {"lr": 2e-3, "slower": 0.1} if args.joined else {}
        learn(vlm, bench, steps=args.learn or (400 if args.joined else 1000), seed=args.seed, on_step=_told, **rates)
        before = _figures(vlm, bench)
        if args.out:
            joined_vlm.save(vlm, args.out / "before")
        lr = args.lr or (1e-4 if args.joined else 5e-4)
        done = unlearn(vlm, args.method, bench, steps=args.steps, lr=lr, seed=args.seed)
        if args.out:
            joined_vlm.save(vlm, args.out / "after", {"method": args.method, "steps": done.steps})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.method}: {done.steps} steps kept, {done.trained:,} numbers trained; right answers before and after:")
    for name, after in _figures(vlm, bench).items():
        print(f"  {name:24} {before[name]:6.1%} {after:6.1%}")
    return 0


def _figures(vlm: JoinedVLM, bench: Benchmark) -> dict[str, float]:
    """Shares answered rightly, of each part of what was trained on and of what is new."""
    made = {}
    for kind, parts in (("seen", bench.trained), ("new", bench.new)):
        for part, items in parts.items():
            chosen = items[:: max(1, len(items) // 128)]
            made[f"{part}, {kind}"] = sum(right(vlm, bench, chosen)) / max(1, len(chosen))
    return made


def _told(state: TrainState) -> None:
    if state.step % 50 == 0:
        print(f"step {state.step}: loss {float(state.loss):.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
