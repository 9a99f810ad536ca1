# SPDX-License-Identifier: Apache-2.0
"""An editor of voxel objects by instruction, from scratch: a small Wan of diffusers that is shown the source.

    python -m manyheads.recipes.native3d_edit --out FOLDER [--strategy native3d_edit] [--budget "2000 steps"]

Edits are drawn as they are needed (:mod:`manyheads.data.voxels`), so that none is seen twice. ``--strategy`` is any way
to show a denoiser a source, empty for none. At the end edits of objects that were never trained on are judged. Then

    editor = VoxelEditor.load("FOLDER")                      # manyheads.models.voxels
    after = editor.edit(voxels, "hollow")                    # bool [side, side, side]
"""

import sys

import torch
from torch import Generator

from manyheads.data.voxels import draw
from manyheads.models.voxels import EditorConfig, VoxelEditor, noisy
from manyheads.tasks.training._voxel_scores import judge
from manyheads.training import train_flow

from ._flows import finish, means, options, told

__all__ = ["main"]


def judged(editor: VoxelEditor, count: int, seed: int, steps: int = 20) -> dict[str, float]:
    """Means over ``count`` edits of objects that no training sees, see the task ``voxel_edit``."""
    generator = Generator().manual_seed(seed)
    edits = draw(count, editor.config.side, generator, "test")
    noise, device = torch.randn(edits.source.shape, generator=generator), next(editor.parameters()).device
    found = []
    for rows in torch.arange(count).split(64):
        source, told, start = (x[rows].to(device) for x in (edits.source, edits.instruction, noise))
        found.append(editor.edited(source, told, start, steps).cpu())
    return means(list(judge(torch.cat(found), edits)))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = options("Train an editor of voxel objects.", batch=16, rate=5e-3)
    parser.add_argument("--strategy", default="native3d_edit", help="how the source is shown; empty for not at all")
    parser.add_argument("--budget", default="2000 steps", help="steps, or time as 5m")
    parser.add_argument("--side", type=int, default=8, help="voxels along an axis")
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    config = EditorConfig(given.side, 2, given.dim, given.heads, given.layers, strategy=given.strategy)
    editor = VoxelEditor(config).to(given.device)
    generator = Generator().manual_seed(given.seed)
    drawn = Generator(given.device).manual_seed(given.seed)

    state = train_flow(
        editor, lambda _: noisy(draw(given.batch, given.side, generator, device=given.device), drawn),
        3 if given.smoke else given.budget, given.rate, told,
    )  # fmt: skip
    found = judged(editor, 8 if given.smoke else 256, given.seed, 2 if given.smoke else 20)
    finish(editor, given, found, state.seconds, "objects", steps=state.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
