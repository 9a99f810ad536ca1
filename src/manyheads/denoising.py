# SPDX-License-Identifier: Apache-2.0
"""Where a denoiser stands in its run, how its tokens lie, and one call of it: what :mod:`.call` has for diffusion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from .call import Site

__all__ = ["Axis", "DenoiserCall", "DiffusionStep", "Layout", "ModuleKind", "Prompt"]

Axis = Literal["space", "time", "all", "text"]
ModuleKind = Literal["spatial", "temporal", "cross", "text"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tokens of a generated image or video lie, and where the text stands beside them.

    Attributes:
        frames, height, width: tokens along each axis; frames is 1 for an image.
        text: text tokens in a joint sequence, 0 where there are none.
        text_first: whether they stand before the image tokens.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False

    @property
    def tokens(self) -> int:
        """Image or video tokens."""
        return self.frames * self.height * self.width

    def grid(self, length: int) -> tuple[int, int] | None:
        """Rows and columns of ``length`` tokens of a frame: at this resolution or, in a UNet, halved some times."""
        height, width = self.height, self.width
        while height * width > length and max(height, width) > 1:
            height, width = -(-height // 2), -(-width // 2)
        return (height, width) if height * width == length else None

    def image(self, length: int) -> slice:
        """Where the image tokens stand among ``length`` tokens of a joint sequence."""
        if length == self.tokens:
            return slice(0, length)
        return slice(length - self.tokens, length) if self.text_first else slice(0, self.tokens)


@dataclass(frozen=True, slots=True)
class DiffusionStep:
    """Where a denoiser stands in its run.

    Attributes:
        run: number of the run. One begins where the pipeline is called, and where the scheduler is given timesteps; in
            a loop outside of a call also where a timestep comes back that the loop had left.
        index, total: evaluations of the denoiser in this run before this one, and in all; None where no scheduler is
            known. An evaluation is a prediction for the same latents at the same timestep, all its branches together;
            a solver of second order makes two for a timestep.
        timestep: as the scheduler has it.
        branches: what the equal groups of rows are, in order: ``uncond``, ``cond``, ``perturbed``; one name where the
            whole batch is one, ``all`` without guidance and for a denoiser that is called outside of its pipeline,
            ``unknown`` where the pipeline guides and nothing tells.
        layout: of the tokens, None for an architecture whose layout is not known.
        axis: which tokens attend to each other here: those of a frame, of a place over ``time``, ``all``, or only text.
        run_state: scratch of the run that all sites and strategies share; use a key of your own.
        call: calls of this denoiser with the same branches in this evaluation before this one.
    """

    run: int
    index: int | None
    total: int | None
    timestep: float
    branches: tuple[str, ...]
    layout: Layout | None
    axis: Axis = "all"
    run_state: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    call: int = 0

    @property
    def key(self) -> str:
        """Names what is kept for the branches at hand: ``uncond+cond``, ``all``; ``all 2`` for a second such call."""
        return "+".join(self.branches) + (f" {self.call + 1}" if self.call else "")

    @property
    def progress(self) -> float | None:
        """Share of the steps done, 0 at the first; None where no scheduler is known."""
        return None if self.index is None or not self.total else self.index / self.total

    def module_kind(self, site: Site) -> ModuleKind:
        """What the attention module of ``site`` does at this step.

        ``spatial`` within a frame, or over all tokens; ``temporal`` over the frames; ``cross`` to the text; ``text``
        among tokens of the text only, as in a refiner of the prompt.
        """
        if self.axis == "text":
            return "text"
        if site.kind == "cross":
            return "cross"
        return "temporal" if self.axis == "time" else "spatial"

    def rows(self, branch: str, batch: int) -> slice:
        """Rows of a batch that belong to ``branch``; an empty slice where none do."""
        if branch not in self.branches:
            return slice(0, 0)
        size, at = batch // len(self.branches), self.branches.index(branch)
        return slice(at * size, (at + 1) * size)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt by one tokenizer, without padding.

    Attributes:
        tokens: their ids.
        word_of: of each token the place of its word among ``words``; -1 where it is of none (a special token).
        words: as they were written.
        start: the first token's place among all text tokens of the denoiser.
        room: places for tokens there, padding included; None for all that are left.
    """

    tokens: tuple[int, ...]
    word_of: tuple[int, ...]
    words: tuple[str, ...]
    start: int = 0
    room: int | None = None


@dataclass(frozen=True, slots=True)
class DenoiserCall:
    """One call of a denoiser, for strategies that call it more than once (guidance).

    Attributes:
        step: index, branches and layout.
        given: the arguments of the denoiser by name; latents are the first.
        scheduler: of the pipeline, None for a bare denoiser.
        guidance_scale: of classifier-free guidance, None where the pipeline does not say or does none.
        rescales: whether the pipeline brings what it guided to the size of the conditional prediction afterwards.
        run: ``run(branch, **changes)`` is the prediction for the given arguments with some changed, its attention seen
            under the name ``branch``; under an empty name it is the branches as they are.
        encode: ``encode(images, height, width)`` are the latents of that size of images ``[B, 3, H, W]`` in 0..1; None
            for a bare denoiser.
        prompts: ``prompts()`` are those of the pipeline's call, a row of the conditional branch each, by every
            tokenizer whose tokens the denoiser reads; it raises UserError where they are not known. None for a bare
            denoiser.
    """

    step: DiffusionStep
    given: dict[str, Any]
    scheduler: Any
    guidance_scale: float | None
    run: Callable[..., Tensor]
    rescales: bool = False
    encode: Callable[[Tensor, int, int], Tensor] | None = None
    prompts: Callable[[], tuple[tuple[Prompt, ...], ...]] | None = None

    @property
    def latents(self) -> Tensor:
        """The noisy sample, the first argument of every denoiser."""
        sample: Tensor = next(iter(self.given.values()))
        return sample

    def predict(self, branch: str = "", **changes: Any) -> Tensor:
        """See ``run``."""
        return self.run(branch, **changes)
