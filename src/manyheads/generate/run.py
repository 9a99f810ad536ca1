# SPDX-License-Identifier: Apache-2.0
"""The same images without a strategy and with each of several: same prompts, same noise, and what it cost."""

import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch

from ..editing import PromptEditor
from ..environment import environment
from ..errors import UserError
from ..inpainting import Inpainter
from ..integrations import use
from ..integrations.diffusers import denoisers
from ..integrations.module_calls import Restore, wrap_call
from ..integrations.pipeline_state import patch_attr
from ..models.pipeline import parameters
from ..progress import Progress
from ..spec import parse, split_together
from ..strategy import Strategy
from .rows import Row

__all__ = [
    "Arm",
    "Made",
    "Settings",
    "arm",
    "check",
    "check_caption",
    "facts",
    "generate",
    "on_image",
    "on_path",
    "run",
]

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Settings:
    """Of every call; the pipeline's own where None."""

    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """Strategies that are used together; none is the baseline."""

    name: str
    strategies: tuple[Strategy, ...] = ()


@dataclass(slots=True)
class Made:
    """What an arm made.

    Attributes:
        arm: which.
        images: one for each row, float32 0..1, ``[F, H, W, 3]``; one frame is a still.
        sources: of pairs, the images of the sources.
        seconds: of all rows.
        calls, passed: calls of the denoiser, and rows of the batch in them.
        peak: bytes of device memory at most, None on a CPU.
        kept: bytes that strategies report to keep at most, None if they report none.
    """

    arm: Arm
    images: list[Array] = field(default_factory=list)
    sources: list[Array] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0
    passed: int = 0
    peak: int | None = None
    kept: int | None = None

    def difference(self, base: "Made") -> float:
        """Mean absolute difference from ``base``, 0 to 1."""
        pairs = zip(self.images, base.images, strict=True)
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))

    def psnr(self, base: "Made") -> float | None:
        """Peak signal-to-noise ratio in dB of the mean squared error over all rows; None for the same images."""
        error = float(np.mean([np.square(a - b).mean() for a, b in zip(self.images, base.images, strict=True)]))
        return None if error == 0 else -10 * math.log10(error)


def arm(text: str) -> Arm:
    """Strategies from their specs, joined by `` + ``."""
    return Arm(text.strip(), tuple(parse(spec) for spec in split_together(text)))


def on_image(arms: Sequence[Arm], path: Path) -> tuple[list[Arm], bool]:
    """The arms, those that fill a hole at the image ``path`` where they name none; and whether that is what it is for.

    Raises:
        UserError: some fill a hole, and some do something else with an image.
    """
    fills = [any(isinstance(s, Inpainter) for s in each.strategies) for each in arms]
    if any(fills) and not all(fills):
        raise UserError("--source is filled by some strategies and a pair's source for others; make two calls of this")

    def on(strategy: Any) -> Strategy:
        fills = isinstance(strategy, Inpainter) and not strategy.source
        return cast("Strategy", replace(strategy, source=str(path)) if fills else strategy)

    return [replace(each, strategies=tuple(map(on, each.strategies))) for each in arms], any(fills)


def check_caption(arms: Sequence[Arm], caption: str | None) -> None:
    """Refuse strategies that edit a source by its prompt where it has none."""
    for each in arms:
        if caption is None and (edits := [s.slug for s in each.strategies if isinstance(s, PromptEditor)]):
            raise UserError(f"{edits[0]} edits by what differs from the source's prompt; say it, as --caption TEXT")


def on_path(given: Arm, path: torch.Tensor) -> Arm:
    """An arm whose strategies that edit by prompts know by which latents the source comes out."""
    acting = (s.on_path(path) if isinstance(s, PromptEditor) else s for s in given.strategies)
    return replace(given, strategies=tuple(acting))


class _Checked(Exception):
    """Leaves a port that nothing was to run in."""


def check(pipe: Any, arms: Sequence[Arm], settings: Settings) -> None:
    """Refuse, before anything is made, strategies that find nothing to act on and settings the pipeline has not."""
    for each in arms:
        with suppress(_Checked), use(pipe, *each.strategies):
            raise _Checked
    takes, name = parameters(pipe), type(pipe).__name__
    for option, value, wanted in (
        ("--steps", settings.steps, ("num_inference_steps",)),
        ("--guidance", settings.guidance, ("guidance_scale",)),
        ("--size", settings.size, ("height", "width")),
    ):
        if value is not None and not set(wanted) <= set(takes):
            raise UserError(f"{name} takes no {' and '.join(wanted)}; leave {option} away")


def run(
    pipe: Any, arms: Sequence[Arm], rows: Sequence[Row], settings: Settings, progress: Progress
) -> list[Made]:  # fmt: skip
    """Make every row by every arm, the baseline first.

    A call of few steps that is not counted goes before, so that the baseline does not pay for what is done once; on a
    GPU the first row of every strategy too, for which kernels are loaded and compiled.

    Raises:
        UserError: the pipeline or a strategy refuses what it was given, or what was made is not finite.
    """
    takes = parameters(pipe)
    default = takes["num_inference_steps"].default if "num_inference_steps" in takes else 1
    steps = settings.steps or (default if isinstance(default, int) else 1)
    every = [Arm("baseline"), *arms]
    total, done = len(every) * len(rows) * steps, 0
    progress(0, total, "warming up")
    with _counted(pipe) as counts:
        generate(pipe, takes, rows[0], settings, steps=min(2, steps))
        made = []
        for each in every:
            counts.report = functools.partial(_report, progress, done, total, each.name)
            made.append(_made(pipe, takes, each, rows, settings, counts))
            done += len(rows) * steps
            progress(done, total, each.name)
    return made


def _report(progress: Progress, before: int, total: int, name: str, steps: int) -> None:
    progress(min(before + steps, total), total, name)


@dataclass(slots=True)
class _Counts:
    """Counts of one arm."""

    calls: int = 0
    passed: int = 0
    steps: int = 0
    report: Callable[[int], None] = lambda steps: None


@contextmanager
def _counted(pipe: Any) -> Iterator[_Counts]:
    """Count calls of the denoisers, strategies' own too, and steps of the scheduler."""
    counts, restorers = _Counts(), list[Restore]()

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts.calls += 1
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim > 1)
        counts.passed += next((len(x) for x in given), 1)
        return inner(*args, **kwargs)

    try:
        restorers.extend(wrap_call(model, around)[1] for _, model in denoisers(pipe))
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is not None:
            step = scheduler.step

            @functools.wraps(step)  # pipelines look at what it takes
            def counted(*args: Any, **kwargs: Any) -> Any:
                counts.steps += 1
                counts.report(counts.steps)
                return step(*args, **kwargs)

            restorers.append(patch_attr(scheduler, "step", counted))
        yield counts
    finally:
        while restorers:
            restorers.pop()()


def _made(
    pipe: Any, takes: Collection[str], each: Arm, rows: Sequence[Row], settings: Settings, counts: _Counts
) -> Made:  # fmt: skip
    """All rows by one arm."""
    made = Made(each)
    device = next(denoisers(pipe)[0][1].parameters()).device
    cuda = device.type == "cuda"

    def fill() -> None:
        if cuda and each.strategies:
            counts.report, report = (lambda _: None), counts.report
            generate(pipe, takes, rows[0], settings)
            counts.report = report
        counts.calls = counts.passed = counts.steps = 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        for row in rows:
            start = time.perf_counter()
            *source, image = generate(pipe, takes, row, settings)
            if cuda:
                torch.cuda.synchronize(device)
            made.seconds += time.perf_counter() - start
            if not np.isfinite(image).all():
                raise UserError(f"{each.name} made values that are not finite; give --dtype float32")
            made.images.append(image)
            made.sources.extend(source)

    if each.strategies:
        with use(pipe, *each.strategies) as port:
            fill()
            made.kept = _kept([port.state(strategy) for strategy in each.strategies])
    else:
        fill()
    made.calls, made.passed = counts.calls, counts.passed
    made.peak = torch.cuda.max_memory_allocated(device) if cuda else None
    return made


def _kept(memories: Sequence[dict[str, dict[str, Any]]]) -> int | None:
    """Bytes that are counted in memories of sites and branches."""
    branches = [branch for sites in memories for memory in sites.values() for branch in memory.values()]
    counts = [b["counts"] for b in branches if isinstance(b, dict) and "bytes" in b.get("counts", {})]
    return sum(int(c["bytes"]) for c in counts) if counts else None


def generate(
    pipe: Any, takes: Collection[str], row: Row, settings: Settings, steps: int | None = None
) -> list[Array]:  # fmt: skip
    """One call of a pipeline that ``takes`` such arguments (an open port hides them).

    Returns:
        The row's image ``[F, H, W, 3]``, after its source's if it has one.
    """
    count = 1 if row.source is None else 2
    seeded = [torch.Generator().manual_seed(row.seed) for _ in range(count)]
    given: dict[str, Any] = {"generator": seeded if count > 1 else seeded[0]}
    if row.noise is not None:
        given = {"latents": torch.cat([row.noise] * count)}
    elif count > 1 and hasattr(pipe, "noise"):
        given = {"latents": torch.cat([pipe.noise(1, seed) for seed in seeded])}
    if row.prompt is not None:
        given["prompt"] = row.prompt if row.source is None else [row.source, row.prompt]
    if row.number is not None:
        given["class_labels"] = [row.number]
    if settings.size is not None:
        given["height"], given["width"] = settings.size
    for name, value in (("num_inference_steps", steps or settings.steps), ("guidance_scale", settings.guidance)):
        if value is not None and name in takes:
            given[name] = value
    if "output_type" in takes:
        given["output_type"] = "np"
    try:
        return _images(pipe, pipe(**given))
    except UserError as error:
        if row.source is None and "source" in str(error):  # the strategy asks for pairs
            raise UserError(f"{error}: here, give --source beside --prompt") from None
        raise
    except ValueError as error:
        raise UserError(f"{type(pipe).__name__} refuses: {' '.join(str(error).split())[:300]}") from error


def _images(pipe: Any, out: Any) -> list[Array]:
    """What a pipeline made, ``[F, H, W, 3]`` each."""
    videos = getattr(out, "frames", None)
    made = getattr(out, "images", None) if videos is None else videos
    if made is None:
        raise UserError(f"{type(pipe).__name__} makes neither images nor frames; give a pipeline that does")
    x = made.float().movedim(-3, -1).cpu().numpy() if isinstance(made, torch.Tensor) else np.asarray(made)
    x = x.astype(np.float32) / 255 if x.dtype == np.uint8 else x.astype(np.float32)
    x = x[:, None] if videos is None else x
    if x.ndim != 5 or x.shape[-1] not in (1, 3, 4):
        raise UserError(f"{type(pipe).__name__} made an array {list(x.shape)}, which is no image")
    return list(np.repeat(x, 3, -1) if x.shape[-1] == 1 else x[..., :3])


def facts(made: Sequence[Made], rows: Sequence[Row], settings: Settings, pipe: Any) -> dict[str, Any]:
    """What was asked and what each arm cost and changed, of JSON's types.

    ``mean_difference`` (0 to 1) and ``psnr`` (dB) are to the baseline; ``psnr`` is None for the same images.
    """
    base = made[0]
    return {
        "pipeline": type(pipe).__name__,
        "steps": settings.steps, "guidance": settings.guidance, "size": settings.size,
        "rows": [
            {"seed": r.seed, "prompt": r.prompt, "source": r.image or r.source, "class": r.number} for r in rows
        ],
        "arms": [
            {
                "arm": each.arm.name, "strategies": [s.spec for s in each.arm.strategies],
                "seconds": each.seconds, "ratio": each.seconds / base.seconds,
                "denoiser_calls": each.calls, "denoiser_rows": each.passed,
                "mean_difference": each.difference(base), "psnr": each.psnr(base),
                "peak_bytes": each.peak, "kept_bytes": each.kept,
            }
            for each in made
        ],
        "environment": environment() | {"diffusers": diffusers.__version__},
    }  # fmt: skip
