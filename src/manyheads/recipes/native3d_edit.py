# SPDX-License-Identifier: Apache-2.0
"""An editor of voxel objects by instruction, from scratch: a small Wan of diffusers that is shown the source.

    python -m manyheads.recipes.native3d_edit --out FOLDER [--strategy native3d_edit] [--budget "2000 steps"]

Edits are drawn as they are needed (:mod:`manyheads.data.voxels`), so that none is seen twice. ``--strategy`` is any way
to show a denoiser a source, empty for none. At the end edits of objects that were never trained on are judged. Then

    editor = VoxelEditor.load("FOLDER")                      # manyheads.models.voxels
    after = editor.edit(voxels, "hollow")                    # bool [side, side, side]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator

from manyheads.data.voxels import draw
from manyheads.models.voxels import EditorConfig, VoxelEditor, noisy
from manyheads.tasks.training._voxel_scores import judge
from manyheads.training import TrainState, train_flow

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
    figures = list(judge(torch.cat(found), edits))
    return {name: round(sum(each[name] for each in figures) / count, 4) for name in figures[0]}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Train an editor of voxel objects.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", default="native3d_edit", help="how the source is shown; empty for not at all")
    parser.add_argument("--budget", default="2000 steps", help="steps, or time as 5m")
    parser.add_argument("--side", type=int, default=8, help="voxels along an axis")
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="three steps, to see that it runs")
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    config = EditorConfig(given.side, 2, given.dim, given.heads, given.layers, strategy=given.strategy)
    editor = VoxelEditor(config).to(given.device)
    generator = Generator().manual_seed(given.seed)
    drawn = Generator(given.device).manual_seed(given.seed)

    def told(state: TrainState) -> None:
        if state.step % 100 == 0 or state.progress >= 1:
            state.look()
            last = state.losses[-100:]
            print(f"{state.step:6d} steps  loss {sum(last) / len(last):.4f}  {state.seconds:5.0f} s", flush=True)

    state = train_flow(
        editor, lambda _: noisy(draw(given.batch, given.side, generator, device=given.device), drawn),
        3 if given.smoke else given.budget, given.rate, told,
    )  # fmt: skip
    editor.save(given.out)
    results: dict[str, Any] = {
        "steps": state.step, "batch": given.batch, "rate": given.rate, "seed": given.seed,
        "parameters": editor.parameters_held, "seconds": round(state.seconds),
        "judged": judged(editor, 8 if given.smoke else 256, given.seed, 2 if given.smoke else 20),
    }  # fmt: skip
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"on objects never seen: {results['judged']}\nwritten to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
