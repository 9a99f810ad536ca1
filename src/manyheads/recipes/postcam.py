# SPDX-License-Identifier: Apache-2.0
"""A small model that films videos again from other cameras, from scratch: a Wan of diffusers on exact scenes.

    python -m manyheads.recipes.postcam --out FOLDER [--strategy postcam] [--steps 2000]

Shots are drawn as they are needed (:mod:`manyheads.data.filmed_scenes`). The first half of the steps tells the model
poses alone, the second shows it the rendering too (``--first 0`` for one stage). At the end scenes that were never
trained on are filmed, and the camera of every frame is found and compared. Then

    model = Refilmer.load("FOLDER")                          # manyheads.models.refilming
    video = model.film(source, cameras, render)              # [N, 3, F, side, side] in -1 to 1
"""

import sys

import torch
from torch import Generator

from manyheads.data.filmed_scenes import draw
from manyheads.models.refilming import Filmed, Refilmer, RefilmerConfig, noisy
from manyheads.tasks.training._camera_scores import judge
from manyheads.training import train_flow

from ._flows import finish, means, options, told

__all__ = ["main"]


def judged(model: Refilmer, count: int, seed: int, steps: int = 10) -> dict[str, float]:
    """Means over ``count`` videos, see the task ``novel_view``."""
    config, device = model.config, next(model.parameters()).device
    scenes, shots = draw(count, config.side, config.frames, config.times, Generator().manual_seed(seed + 1), device)
    found = model.film(shots.source, shots.cameras, shots.proxy, steps=steps, seed=seed)
    return means(list(judge(found, scenes, shots)))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = options("Train a model that films videos again from other cameras.", batch=32, rate=8e-3, smoke="four")
    parser.add_argument("--strategy", default="postcam", help="how it is told cameras")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first", type=float, default=0.5, help="share of the steps in which no rendering is shown")
    parser.add_argument("--side", type=int, default=8, help="pixels of a frame")
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--times", type=int, default=2, help="the rendering is smaller by that")
    parser.add_argument("--patch", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    sizes = (given.side, given.frames, given.times, given.patch, given.dim, given.heads, given.layers)
    model = Refilmer(RefilmerConfig(*sizes, strategy=given.strategy)).to(given.device)
    generator, drawn = Generator().manual_seed(given.seed), Generator(given.device).manual_seed(given.seed)

    steps = 4 if given.smoke else given.steps
    first, seconds = round(steps * given.first), 0.0
    for rendered, count in ((False, first), (True, steps - first)):

        def get_batch(_: int, rendered: bool = rendered) -> Filmed:
            shots = draw(given.batch, given.side, given.frames, given.times, generator, given.device)[1]
            return noisy(shots, drawn, rendered)

        if count:
            print(f"{count} steps, {'poses and rendering' if rendered else 'poses alone'}")
            seconds += train_flow(model, get_batch, count, given.rate, told).seconds
    found = judged(model, 8 if given.smoke else 64, given.seed, 2 if given.smoke else 10)
    finish(model, given, found, seconds, "scenes", steps=steps, first=first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
