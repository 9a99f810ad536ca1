# SPDX-License-Identifier: Apache-2.0
"""Video-BLADE's sparse attention in seconds: attention alone from 2k to 32k tokens, and whole videos beside rivals.

    python benchmarks/video_blade.py [--device cuda] [--quick] [--json benchmarks/video_blade.json]

``attention``: one call on random tensors of 12 heads of 128 channels, all of it counted: putting tokens in order,
drawing, scoring, choosing, computing, and putting them back; beside SDPA. ``from_tokens`` of the strategy, below which
a GPU computes densely, is where the first of these wins; rows say what a shorter call would cost.

``videos``: the shipped Wan on videos larger than it was trained on (frames and rows of tokens up to 32 x 32 x 32), 20
steps of flow matching with guidance, so that attention is a real one and most of the time. ``video_blade`` and its
variant with pooled windows; the plain pipeline with as many steps as fit into the seconds of ``video_blade``; and
diffusers' FirstBlockCache, TaylorSeer, FasterCache and MagCache, each at its most careful knob that is no slower than
``video_blade`` (or at its most daring one, if none is). Seconds are medians of rounds in turns; PSNR is to the plain
video of the same noise. A way whose seconds are above the plain ones is marked ``slower``.
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import manyheads
from manyheads.call import AttentionCall, DiffusionStep, Layout, Site
from manyheads.diffusion.video_blade import VideoBlade
from manyheads.environment import environment
from manyheads.integrations.diffusers_caches import KNOBS, diffusers_cache, magnitude_ratios
from manyheads.models.scenes import load_scenes
from manyheads.tasks.diffusion.fidelity import psnr

Row = dict[str, Any]
HEADS, WIDTH, PROMPT = 12, 128, "ghost down frog"
GRIDS = {
    "cuda": ((8, 16, 16), (16, 16, 16), (32, 16, 16), (16, 32, 32), (32, 32, 32), (21, 30, 52)), "cpu": ((8, 16, 16),),
}  # fmt: skip
VIDEOS = {"cuda": ((16, 16, 16), (32, 16, 16), (32, 32, 32)), "cpu": ((8, 16, 16),)}
SHARES = (0.1, 0.17)


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Median of some calls, after two that are not counted."""
    for _ in range(2):
        run()
    found = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def attention(grid: tuple[int, int, int], device: str, rounds: int) -> list[Row]:
    """One call over a video of these tokens, densely and by blocks."""
    layout = Layout(*grid)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, layout.tokens, WIDTH, generator=source).to(device, kind) for _ in range(3))
    step = DiffusionStep(1, 0, 20, 500.0, ("all",), layout)
    call = AttentionCall(Site("attn1", 0, 0, "self", False), q, k, v, WIDTH**-0.5, diffusion=step)
    dense = seconds(lambda: sdpa(q, k, v), device, rounds)
    rows: list[Row] = [{"tokens": layout.tokens, "way": "sdpa", "milliseconds": round(1e3 * dense, 4)}]
    for share in SHARES:
        for pool in (0, 30):
            strategy = VideoBlade(mass=1, most=share, pool=pool, from_tokens=0)
            took = seconds(lambda s=strategy: s.attend(call), device, rounds)
            chosen = seconds(lambda s=strategy: s.plan(call), device, rounds)
            rows.append(
                {
                    "tokens": layout.tokens, "way": f"{share:g} of the blocks" + (", windows of 30" if pool else ""),
                    "milliseconds": round(1e3 * took, 4), "of_which_choosing": round(1e3 * chosen, 4),
                    "times_as_fast": round(dense / took, 3),
                }
            )  # fmt: skip
    return rows


class Videos:
    """Videos of one size by the shipped Wan, and what they take."""

    def __init__(self, model: str, grid: tuple[int, int, int], device: str, steps: int, rounds: int) -> None:
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        self.pipe = load_scenes(model, device, kind)
        self.device, self.steps, self.rounds = device, steps, rounds
        frames, height, width = grid
        source = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 3, frames, 2 * height, 2 * width, generator=source).to(kind)
        self.tokens = frames * height * width
        self.plain = self.made()
        self.ratios = magnitude_ratios(self.pipe, self.made)

    def made(self, steps: int | None = None) -> Tensor:
        out = self.pipe(PROMPT, num_inference_steps=steps or self.steps, latents=self.latents, output_type="pt")
        video: Tensor = out.frames
        return video.cpu()

    def timed(self, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
        """Median seconds, and the video."""
        video = run()
        found = []
        for _ in range(self.rounds):
            synchronise(self.device)
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return statistics.median(found), video

    def acting(self, spec: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with manyheads.use(self.pipe, spec) if spec else nullcontext():
                return self.made()

        return run

    def cached(self, name: str, knob: float) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with diffusers_cache(self.pipe, name, knob, self.steps, self.ratios):
                return self.made()

        return run

    def row(self, way: str, took: float, video: Tensor, whole: float, **more: Any) -> Row:
        near = psnr(video, self.plain).item()
        row = {"tokens": self.tokens, "way": way, "seconds": round(took, 4), "times_as_fast": round(whole / took, 3)}
        row |= {"psnr": round(near, 2), "slower": took > 1.02 * whole, **more}
        print(json.dumps(row), flush=True)
        return row

    def measure(self, small: str) -> list[Row]:
        """All ways; ``small`` is what a strategy's spec ends in."""
        whole, video = self.timed(self.acting(""))
        rows = [self.row("plain", whole, video, whole)]
        ours, video = self.timed(self.acting(f"video_blade:{small}"))
        rows.append(self.row("video_blade", ours, video, whole, dense=bool(torch.equal(video, self.plain))))
        for name, more in (("video_blade, windows of 30", "pool=30"), ("video_blade, raster", "order=raster")):
            rows.append(self.row(name, *self.timed(self.acting(f"video_blade:{small},{more}")), whole))
        rows.append(self.row("random", *self.timed(self.acting(f"video_blade.rival:{small},mass=1,by=random")), whole))
        most = min(ours, whole)
        fewer = max(1, int(self.steps * most / whole))
        rows.append(self.row("fewer steps", *self.timed(lambda: self.made(fewer)), whole, steps=fewer))
        for name, knobs in KNOBS.items():
            for knob in knobs:
                took, video = self.timed(self.cached(name, knob))
                if took <= most or knob == knobs[-1]:
                    rows.append(self.row(name, took, video, whole, knob=knob))
                    break
        return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it runs")
    parser.add_argument("--model", default="moving3d", help="the shipped Wan, or a folder of one")
    parser.add_argument("--quick", action="store_true", help="few steps and rounds, to see that it runs")
    parser.add_argument(
        "--json", type=Path, default=None, help="where results go; video_blade.json here unless --quick"
    )
    options = parser.parse_args()
    steps, rounds = (2, 1) if options.quick else (20, 3)
    calls: list[Row] = []
    for grid in GRIDS[options.device]:
        calls += attention(grid, options.device, 1 if options.quick else 20)
    for row in calls:
        print(json.dumps(row), flush=True)
    videos: list[Row] = []
    for grid in VIDEOS[options.device]:
        videos += Videos(options.model, grid, options.device, steps, rounds).measure("block=128")
    result = {
        "what": "attention of 12 heads of 128 channels; videos of the shipped Wan, 20 steps with guidance",
        "attention": calls, "videos": videos, "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    path = options.json or (None if options.quick else Path(__file__).with_suffix(".json"))
    if path is not None:
        sections: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        sections[options.device] = result
        path.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
