# SPDX-License-Identifier: Apache-2.0
"""Captions and answers of a vision-language model that learned which objects keep company, where they do not.

For each seed one model is trained on texts of a world where pairs of objects stand together
(:mod:`manyheads.data.captions`); then every arm writes about the same pictures with the same weights. A gate's
threshold is set for each model on pictures of the world it was trained in, before anything is judged. An arm with the
option ``rate_of`` opens a random gate as often as the arm of that name did.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from ...data.captions import KINDS, PAIRS, WORDS, Kind, absent, ask, describe, draw_there, mentioned, texts
from ...data.object_scenes import draw_pictures
from ...decoding.conscious_gaze import ConsciousGaze, calibrated
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations.decoding import write
from ...models.image_pool import ImagePool, orders
from ...models.joined_vlm import JoinedVLM
from ...training import TrainState
from ...training.answers import train_answers
from ...writing import Decoding, Request, Written
from ._models import VLMTask

__all__ = ["ObjectCaptions"]

_OWN, _APART = "of its world", "decorrelated"
_DRAWN = 128  # texts of a pool that are drawn at once
_TAIL = "training_nll"  # what stands beside the weights of a training


@dataclass(frozen=True, kw_only=True)
class ObjectCaptions(VLMTask):
    """A unit for each arm and seed, those of a seed on one training, which is kept in the run's folder.

    Attributes:
        grid: cells of a picture's side.
        cell: patches of a cell's side.
        sharp: pixels of a cell's side as it is drawn, before it is scaled to its patches: with few, what is seen is
            uncertain, and what usually stands together counts.
        together: how often the second of a pair is there in training when the first is.
        batch: texts of a step, half captions and half questions.
        steps: of training.
        lr: highest learning rate, of the projector.
        slower: factor of that of all else.
        calibration: pictures on which a gate's threshold is set.
        samples: decorrelated pictures that are judged.
        own: pictures of the world of the training that are judged, by captions alone.
        most: tokens of a caption at most.
    """

    words: ClassVar[Sequence[str]] = WORDS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("hallucinated", "absent objects that are named", kind="share", floor=0.5),
        Metric("recall", "objects that are named, of those there", higher=True, kind="share", floor=0.5),
        Metric("chair", "share of the named that is absent", what="mean over captions, as CHAIR of instances"),
        Metric("exact", "captions without any error", higher=True, kind="share"),
        Metric("right", "questions answered rightly", higher=True, kind="share", floor=0.5,
               what="half about absent objects, drawn at random, often there, or often with what is there"),
        Metric("said_yes", "questions answered with yes", kind="share"),
        Metric("f1", "F1 of yes", higher=True),
        Metric("intervened", "tokens of captions at which the gate opens"),
        Metric("forwards", "forwards for a token of a caption"),
        Metric("token_seconds", "seconds for a token of a caption", "s", kind="time"),
        Metric("training_nll", "loss in the last tenth of training, nats/token", "nats/token"),
    )  # fmt: skip

    layers: int = 4
    patch: int = 4
    grid: int = 4
    cell: int = 1
    sharp: int = 4
    together: float = 0.9
    batch: int = 32
    steps: int = 500
    lr: float = 5e-3
    slower: float = 1.0
    calibration: int = 32
    samples: int = 72
    own: int = 32
    most: int = 40

    @property
    def patches(self) -> int:
        return self.grid * self.cell

    def units(self, run: RunContext) -> list[WorkUnit]:
        groups: dict[str, list[Arm]] = {}  # an arm with those that follow its rate
        for arm in run.arms:
            groups.setdefault(str(arm.options.get("rate_of", arm.name)), []).append(arm)
        return [
            WorkUnit(
                self.key, f"{arms[0].key}/{seed}", float(len(arms)), f"{arms[0].key}: captions, seed {seed}",
                {"arms": [arm.key for arm in arms], "seed": seed}, f"{seed}",
            )
            for seed in run.seeds
            for arms in groups.values()
        ]  # fmt: skip

    def guard(self, run: RunContext) -> None:
        """Refuse arms that do not choose what is written, and a random gate like an arm that comes later."""
        done: set[str] = set()
        for arm in run.arms:
            if not isinstance(arm.strategy, Decoding):
                raise UserError(f"{self.name} judges what is written, which {arm.spec} does not choose")
            if (like := arm.options.get("rate_of")) is not None and like not in done:
                raise UserError(f"{arm.key} opens as often as {like}, which has to stand before it")
            done.add(arm.name)

    def prepare(self, run: RunContext) -> None:
        for seed in run.seeds if run.folder is not None else ():
            _learned(run, self, seed)

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = int(unit.params["seed"])
        state, tail = _learned(run, self, seed)
        vlm = self.fresh(run, seed)
        vlm.model.load_state_dict(state, strict=False)
        vlm.model.eval()
        rates: dict[str, float] = {}
        for arm in (arm for arm in run.arms if arm.key in unit.params["arms"]):
            if arm == run.baseline:
                yield self.row("training_nll", arm, tail, "training", seed=seed)
            strategy = self._set(run, arm, vlm, seed, rates)
            rows = list(self._judged(run, arm, strategy, vlm, seed))
            yield from rows
            opened = [row.value for row in rows if row.metric == "intervened"]
            rates[arm.name] = sum(opened) / len(opened)
            run.advance(1.0)

    def _train(self, run: RunContext, seed: int) -> tuple[dict[str, Tensor], float]:
        vlm = self.fresh(run, seed)

        def drawn(count: int, **axes: int) -> dict[str, Tensor]:
            said = texts(
                vlm.language, count, run.torch_rng(task=self.key, training=seed, **axes), grid=self.grid,
                size=self.sharp, patches=self.patches, together=self.together,
            )  # fmt: skip
            said = replace(said, images=_scaled(vlm, self.patches, said.images))
            return vlm.read(said, said.at, said.answers)

        def train(get_batch: Callable[[int], dict[str, Tensor]], replayed: bool = False) -> TrainState:
            return train_answers(vlm.model, get_batch, self.steps, lr=self.lr, slower=self.slower, replayed=replayed)

        if self.pool:
            parts = [min(_DRAWN, self.pool - start) for start in range(0, self.pool, _DRAWN)]
            pool = ImagePool.of(vlm, (drawn(count, pool=i) for i, count in enumerate(parts)))
            order = run.torch_rng(task=self.key, training=seed, part="order")
            rows = orders(len(pool), self.steps, self.batch, order, run.device)
            trained = train(lambda step: pool.batch(rows[step]), run.device.type == "cuda")
        else:
            trained = train(lambda step: drawn(self.batch, step=step))
        tail = trained.losses[-max(1, len(trained.losses) // 10) :]
        state = {name: p.detach().clone() for name, p in vlm.model.named_parameters() if p.requires_grad}
        return state, sum(tail) / len(tail)

    def pictures(self, vlm: JoinedVLM, count: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
        drawn = draw_pictures(count, generator, grid=self.grid, size=self.sharp)
        return _scaled(vlm, self.patches, drawn.images), drawn.cells, self.grid, self.cell

    def _set(self, run: RunContext, arm: Arm, vlm: JoinedVLM, seed: int, rates: dict[str, float]) -> Decoding:
        """The arm's strategy, with a gate that is set for this model."""
        strategy = cast(Decoding, arm.strategy)
        if (like := arm.options.get("rate_of")) is not None:
            return replace(cast(ConsciousGaze, strategy), rate=rates[str(like)])
        if not isinstance(strategy, ConsciousGaze) or strategy.gate not in ("interaction", "entropy"):
            return strategy
        there, images = self._pictures(run, vlm, self.calibration, "train", seed, own=True)
        requests = []
        for i, image in enumerate(images.split(1)):
            question = _request(vlm, self.most, ask(vlm.language, self.patches, i % there.shape[1]), image, 0)
            requests.append(_request(vlm, self.most, describe(vlm.language, self.patches), image, 0))
            requests.append(replace(question, most=1))  # what is behind an answer is no text of this world
        return calibrated(strategy, requests, write)

    def _pictures(
        self, run: RunContext, vlm: JoinedVLM, count: int, part: str, seed: int, own: bool
    ) -> tuple[Tensor, Tensor]:
        """What pictures show, and their pixels as the model reads them; those that are judged are the same for all."""
        axes = {"training": seed} if part == "train" else {}
        generator = run.torch_rng(task=self.key, pictures=f"{part} {own}", **axes)
        there = draw_there(count, generator, self.together if own else None)
        images = draw_pictures(
            count, generator, grid=self.grid, size=self.sharp, there=there,
            split="train" if part == "train" else "test",
        ).images  # fmt: skip
        return there, vlm.pixels(_scaled(vlm, self.patches, images))

    def _judged(self, run: RunContext, arm: Arm, strategy: Decoding, vlm: JoinedVLM, seed: int) -> Iterator[Row]:
        for kind, count in ((_APART, self.samples), (_OWN, self.own)):
            there, images = self._pictures(run, vlm, count, "test", seed, own=kind == _OWN)
            for i, (shown, image) in enumerate(zip(there, images.split(1), strict=True)):
                request = _request(vlm, self.most, describe(vlm.language, self.patches), image, i)
                run.synchronise()
                started = time.perf_counter()
                made = write(strategy, request)
                run.synchronise()
                seconds = time.perf_counter() - started
                yield from self._caption(arm, vlm, shown, made, seconds, seed, i, kind)
            if kind == _APART:
                yield from self._asked(run, arm, strategy, vlm, seed, there, images)

    def _caption(
        self, arm: Arm, vlm: JoinedVLM, shown: Tensor, made: Written, seconds: float, seed: int, i: int, kind: str
    ) -> Iterator[Row]:
        """Rows of a caption."""
        named = mentioned(vlm.language, made.tokens)
        friends = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
        about = {"context": f"{kind} {i}", "seed": seed}
        for thing, real in enumerate(shown.tolist()):
            at: dict[str, str | bool] = {"pictures": kind}
            if not real:
                at["friend"] = thing in friends and bool(shown[friends[thing]])
            name = "recall" if real else "hallucinated"
            yield self.row(name, arm, thing in named, f"{kind} {i}.{thing}", at=at, **about)
        false = sum(not bool(shown[thing]) for thing in named)
        right = sorted(named) == shown.nonzero()[:, 0].tolist()
        steps = min(len(made.tokens) + 1, self.most)
        for name, value in (
            ("chair", false / max(1, len(named))), ("exact", right), ("forwards", made.forwards / steps),
            ("intervened", made.notes.get("intervened", 0.0)), ("token_seconds", seconds / steps),
        ):  # fmt: skip
            yield self.row(name, arm, value, f"{kind} {i}", at={"pictures": kind}, **about)

    def _asked(
        self, run: RunContext, arm: Arm, strategy: Decoding, vlm: JoinedVLM, seed: int, there: Tensor, images: Tensor
    ) -> Iterator[Row]:
        """Rows of questions: of each kind one about what is there, and one about what is not."""
        _, yes = vlm.language.answers
        generator = run.torch_rng(task=self.key, asked="test")
        for kind in KINDS:
            hits = said = real = 0
            for i, (shown, image) in enumerate(zip(there, images.split(1), strict=True)):
                gone = absent(shown, cast(Kind, kind), generator)
                seen = shown.nonzero()[:, 0].tolist()
                if gone is None or not seen:
                    continue
                for thing in (gone, seen[int(torch.randint(len(seen), (), generator=generator))]):
                    request = replace(
                        _request(vlm, self.most, ask(vlm.language, self.patches, thing), image, i), most=1
                    )
                    told = write(strategy, request).tokens == [yes]
                    truth = bool(shown[thing])
                    hits, said, real = hits + (told and truth), said + told, real + truth
                    more = {"context": f"{i}", "seed": seed, "at": {"kind": kind}}
                    yield self.row("right", arm, told == truth, f"{i}.{thing}", **more)
                    yield self.row("said_yes", arm, told, f"{i}.{thing}", **more)
            yield self.row("f1", arm, 2 * hits / max(1, said + real), "all", seed=seed, at={"kind": kind})


def _scaled(vlm: JoinedVLM, patches: int, images: Tensor) -> Tensor:
    """Pictures as large as the model's patches."""
    side = patches * vlm.patch
    return images if images.shape[-1] == side else interpolate(images, size=(side, side), mode="bilinear")


def _request(vlm: JoinedVLM, most: int, ids: list[int], image: Tensor, seed: int) -> Request:
    end, given = vlm.language.encode(".")[-1], {"pixel_values": image}
    return Request(
        vlm.model, None, torch.tensor([ids], device=image.device), most, frozenset({end}), seed, given=given
    )  # fmt: skip


def _learned(run: RunContext, task: ObjectCaptions, seed: int) -> tuple[dict[str, Tensor], float]:
    """What a seed's training made of what is trained, and its loss in the last tenth."""
    if run.folder is None:
        made = run.kept_last("learned", (task, seed), lambda: task._train(run, seed))
        return cast(tuple[dict[str, Tensor], float], made)
    digest = hashlib.sha256(repr((task, run.seed, seed)).encode()).hexdigest()[:16]
    place = Path(run.folder) / "models" / f"{task.key}-{seed}-{digest}.safetensors"
    if not place.is_file():
        state, tail = task._train(run, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        save_file({_TAIL: torch.tensor(tail, dtype=torch.float64), **state}, draft)
        draft.replace(place)
    state = load_file(place, device=str(run.device))
    return state, float(state.pop(_TAIL))
