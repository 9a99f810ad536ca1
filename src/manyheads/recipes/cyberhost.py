# SPDX-License-Identifier: Apache-2.0
"""A denoiser of small speaking avatars, from scratch: a Wan of diffusers with region codebook attention.

    python -m manyheads.recipes.cyberhost --out FOLDER [--strategy SPEC] [--budget "2000 steps"]

Clips are drawn as they are needed (:mod:`manyheads.data.avatars`), so that none is seen twice. ``--strategy`` is what
is inserted behind the denoiser's blocks, empty for nothing; ``--without`` leaves out priors of the paper. At the end
clips of avatars and signals that were never trained on are judged. Then

    model = AvatarModel.load("FOLDER")                        # manyheads.models.avatars
    video = model.animate(draw(2, 8, 16, generator), signal)  # of avatars of manyheads.data.avatars, [2, T, 3, 16, 16]
"""

import sys

import torch
from torch import Generator

from manyheads.data.avatars import draw
from manyheads.models.avatars import AvatarConfig, AvatarModel, Noisy, noisy, shown
from manyheads.tasks.training._avatar_scores import judge
from manyheads.training import train_flow

from ._flows import finish, means, options, told

__all__ = ["PRIORS", "main"]

PRIORS = ("movement", "clarity", "pose", "local")


def judged(model: AvatarModel, count: int, frames: int, seed: int, steps: int = 20) -> dict[str, float]:
    """Means over ``count`` clips that no training sees, see the task ``avatar_video``."""
    generator, device = Generator().manual_seed(2**31 + seed), next(model.parameters()).device
    clips = draw(count, frames, model.config.side, generator, sharp=True, device=device)
    noise = torch.randn(count, 3, frames, *clips.video.shape[3:], generator=generator).to(device)
    video, mask = model.animated(shown(clips), noise, steps)
    return means(list(judge(video, mask, clips)))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = options("Train a denoiser of small speaking avatars.", batch=6, rate=4e-3)
    parser.add_argument(
        "--strategy", default="cyberhost:spatial=32,temporal=16", help="blocks to insert; empty for none"
    )
    parser.add_argument("--without", default="", help="priors to leave out, as movement+clarity+pose+local")
    parser.add_argument("--budget", default="2000 steps", help="steps, or time as 5m")
    parser.add_argument("--side", type=int, default=16, help="pixels of a frame's side")
    parser.add_argument("--frames", type=int, default=4, help="of a clip")
    given = parser.parse_args(arguments)
    without = set(filter(None, given.without.split("+")))
    if unknown := sorted(without - set(PRIORS)):
        parser.error(f"--without: there is no prior {unknown[0]}; there are {', '.join(PRIORS)}")
    torch.manual_seed(given.seed)
    kept = {name: name not in without for name in PRIORS}
    config = AvatarConfig(given.side, 2, given.dim, given.heads, given.layers, strategy=given.strategy, **kept)
    model = AvatarModel(config).to(given.device)
    generator = Generator().manual_seed(given.seed)
    drawn = Generator(given.device).manual_seed(given.seed)

    def get_batch(_: int) -> Noisy:
        return noisy(draw(given.batch, given.frames, given.side, generator, device=given.device), 2, drawn)

    state = train_flow(model, get_batch, 3 if given.smoke else given.budget, given.rate, told)
    found = judged(model, 4 if given.smoke else 64, given.frames, given.seed, 2 if given.smoke else 20)
    finish(model, given, found, state.seconds, "avatars", steps=state.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
