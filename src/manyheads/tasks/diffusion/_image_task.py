# SPDX-License-Identifier: Apache-2.0
"""What tasks on generated images share: the same prompts and noise for every arm, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import Pipeline, Row, RunContext, Task, WorkUnit

if TYPE_CHECKING:
    from ...experiment import Arm
    from ...models.judge import Judge

__all__ = ["ImageTask", "drawn", "judge_of", "pipe_of"]

Acting = Sequence[Any] | None  # strategies, or None for those of the arm


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """Base of the tasks on images: unit ``seed/first`` makes some of a seed's images under every arm.

    Attributes:
        samples: images of each seed.
        steps: of denoising.
        guidance: of classifier-free guidance, 1 for none.
        batch: images at once; on a GPU eight times as many.
        conditioned: whether the captions are said to the model; without, it makes what it likes.
    """

    subject: ClassVar[str] = "pipeline"
    known_contents: ClassVar[bool] = False  # whether it judges what images show: only of scenes that is known

    samples: int = 16
    steps: int = 12
    guidance: float = 3.0
    batch: int = 16
    conditioned: bool = True

    def units(self, run: RunContext) -> list[WorkUnit]:
        size = self.batch * (8 if run.device.type == "cuda" else 1)
        return [
            WorkUnit(
                self.key, f"{seed}/{first}", (last - first) * len(run.arms), f"{self.name}, seed {seed}",
                {"seed": seed, "first": first, "last": last},
            )
            for seed in run.seeds
            for first in range(0, self.samples, size)
            for last in (min(first + size, self.samples),)
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> list[Row]:
        with torch.no_grad():
            return list(self.rows(run, unit))

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterable[Row]:
        """Rows of a unit."""
        raise NotImplementedError

    def unsupported_reason(self, run: RunContext) -> str | None:
        if not self.known_contents or (is_scenes(pipe_of(run)) and pipe_of(run).config.kind == "scenes"):
            return None
        return "the contents of the images have to be known: give the pipelines scenes or unet"

    def judged(self, arm: Arm, seed: int, found: Mapping[str, Tensor], first: int = 0) -> Iterator[Row]:
        """Rows of the values by metric of an arm's images, from number ``first`` of the seed on."""
        for metric, values in found.items():
            for i, value in enumerate(values.tolist(), first):
                yield self.row(metric, arm, value, f"{i}", seed=seed, context=f"{seed}.{i}")

    def images(
        self, run: RunContext, arm: Arm, seed: int, first: int, last: int, *, acting: Acting = None,
        labels: Tensor | None = None, prepare: Callable[[Tensor], Tensor] | None = None, draw: str = "judged",
    ) -> Tensor:  # fmt: skip
        """Images ``[N, 3, H, W]`` or videos ``[N, 3, F, H, W]``, float32 in 0..1 on the CPU.

        Args:
            run: whose pipeline makes them.
            arm: which strategies act.
            seed, first, last: which of the noise and captions of the seed.
            acting: strategies in place of the arm's.
            labels: what is asked for, in place of the drawn captions.
            prepare: changes the noise (pairs that share theirs).
            draw: names the noise and captions: those to judge by, or to choose by.
        """
        import manyheads

        pipe = pipe_of(run)
        strategies = arm.strategies if acting is None else acting
        with manyheads.use(pipe, *strategies) if strategies else nullcontext():
            if is_scenes(pipe):
                said = drawn(run, self.samples, seed, draw)[first:last] if labels is None else labels
                return self._scenes(run, pipe, said, seed, first, prepare, draw)
            if labels is not None or prepare is not None:
                raise UserError(f"{self.name} needs captions with known contents: give scenes, unet or moving")
            return self._any(run, pipe, seed, first, last)

    def _scenes(
        self, run: RunContext, pipe: Any, labels: Tensor, seed: int, first: int,
        prepare: Callable[[Tensor], Tensor] | None, draw: str,
    ) -> Tensor:  # fmt: skip
        from ...data import scenes

        noise = torch.cat([
            pipe.noise(1, run.torch_rng(noise=draw, seed=seed, image=first + i))
            for i in range(len(labels))
        ])  # fmt: skip
        tokens = scenes.tokens(labels, pipe.config.kind) if self.conditioned else torch.zeros_like(labels)
        made = pipe(
            tokens, latents=noise if prepare is None else prepare(noise), num_inference_steps=self.steps,
            guidance_scale=self.guidance, output_type="pt",
        )  # fmt: skip
        found: Tensor = made.frames if made.images is None else made.images
        return found.float().cpu()

    def _any(self, run: RunContext, pipe: Any, seed: int, first: int, last: int) -> Tensor:
        """By a pipeline of diffusers: prompts of the user, or classes, each image from a generator of its own."""
        from ...models.pipeline import parameters

        takes = parameters(pipe)
        generators = [run.torch_rng(noise="judged", seed=seed, image=i) for i in range(first, last)]
        given: dict[str, Any] = {"generator": generators, "output_type": "pt"}
        if "num_inference_steps" in takes:
            given["num_inference_steps"] = self.steps
        if "class_labels" in takes:
            given["class_labels"] = [i % 1000 for i in range(first, last)]
        else:
            prompts = run.data.get("prompts") or _PROMPTS
            given["prompt"] = [prompts[i % len(prompts)] for i in range(first, last)]
        made = pipe(**given)
        found = made.frames if hasattr(made, "frames") else made.images
        images = found if isinstance(found, Tensor) else torch.as_tensor(found)
        if images.ndim == 5:  # frames first, as diffusers has videos
            images = images.transpose(1, 2)
        return images.float().cpu()


_PROMPTS = (
    "a red apple on a wooden table", "a small boat on a lake at dawn", "a city street in the rain at night",
    "a portrait of an old man with a beard", "a cat asleep on a green sofa", "mountains under a cloudy sky",
)  # fmt: skip


def pipe_of(run: RunContext) -> Any:
    """The pipeline that the run is about."""
    return cast(Pipeline, run.subject).pipe


def is_scenes(pipe: Any) -> bool:
    """Whether it is a pipeline of ours, whose captions say exactly what has to be there."""
    from ...models.scenes import ScenePipeline

    return isinstance(pipe, ScenePipeline)


def drawn(run: RunContext, count: int, seed: int, draw: str = "judged") -> Tensor:
    """Labels of captions, int64 ``[count, 3]``, all words equally likely."""
    from ...data import scenes

    words = scenes.VOCABULARY[pipe_of(run).config.kind].values()
    generator = run.torch_rng(captions=draw, seed=seed)
    return torch.stack([torch.randint(len(each), (count,), generator=generator) for each in words], 1)


def judge_of(run: RunContext) -> Judge:
    """The network that says what it sees in images of the run's pipeline."""
    from ...models.judge import load_judge

    made = run.kept("judge", lambda: load_judge(pipe_of(run).config.kind, str(run.device))[0])
    return cast("Judge", made)
