# SPDX-License-Identifier: Apache-2.0
"""A schedule of ``spatial_gating`` for a model, from what flows in it over a few scenes; nothing is trained.

    python -m manyheads.recipes.spatial_gating --model FOLDER [--eta 0.95] [--scenes 16]

``--model`` is a folder of ``python -m manyheads.recipes.joined_vlm``; scenes are drawn. For another model and inputs
``schedule_of(flows(model, inputs))`` gives the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.data.visual_questions import sides
from manyheads.errors import UserError
from manyheads.integrations import use
from manyheads.models import joined_vlm
from manyheads.tokens.spatial_gating import Flow, idle, schedule_of

__all__ = ["flows"]


@torch.no_grad()
def flows(model: Any, inputs: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """What the tokens of images are given by the questions behind them, ``[inputs, N]`` for each block.

    Args:
        model: of transformers, which reads images among text.
        inputs: as it takes them, of equally many tokens of images each.
    """
    strategy = Flow()
    with use(model, strategy) as port:
        for given in inputs:
            model(**given)
    return [torch.cat(state["flows"]) for _, state in port.kept(strategy)]


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.spatial_gating", description="Find a schedule.")
    parser.add_argument("--model", required=True, help="folder of a joined model")
    parser.add_argument("--eta", type=float, default=0.95, help="part of the attention to a scene that stays")
    parser.add_argument("--start", type=int, default=2, help="first block that may have fewer tokens")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--planes", type=int, default=4, help="distances of a scene")
    parser.add_argument("--grid", type=int, default=6, help="patches of a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    try:
        vlm = joined_vlm.load(given.model, given.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    drawn = sides(
        vlm.language, given.scenes, torch.Generator().manual_seed(given.seed), planes=given.planes, grid=given.grid,
        size=vlm.patch, patches=given.grid, apart=True,
    )  # fmt: skip
    batch = vlm.batch(drawn)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    found = flows(vlm.model, [inputs])
    parts = "+".join(f"{part:g}" for part in schedule_of(found, given.eta, given.start))
    nothing = ", ".join(f"{float(idle(flow).mean()):.0%}" for flow in found)
    print(f"tokens with 5 % of the attention to the scene, by block: {nothing}\nspatial_gating:schedule={parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
