# SPDX-License-Identifier: Apache-2.0
"""Pyramid Attention Broadcast: what it saves and costs here and in diffusers, on the same model and schedule.

    python benchmarks/pab.py [--device cuda] [--quick] [--json benchmarks/pab.json]

A Latte with random weights (time does not ask for trained ones), one video, guidance, 30 steps of flow matching, the
paper's settings for Latte: spatial, temporal and cross-attention at every 2nd, 3rd and 6th step between timesteps 800
and 100. Both branches stand in one batch, or are calls of their own. The ways, all in one run, in turns:

- ``none``: no cache.
- ``ours``: ``manyheads.use(pipe, "pab:...")``.
- ``diffusers``: its PyramidAttentionBroadcast, told which blocks are spatial (by default it takes temporal ones for
  such), and given the timestep as a number (as a tensor on a GPU every module would wait for the device).
- ``by hand``: modules' forwards replaced by closures that know the schedule beforehand and ask nothing: the least that
  skipping these modules at these steps can take, and an independent way to what comes out.
- ``free``: every attention module at every step returns a tensor made before: what is left if attention costs nothing.

``overhead`` is the same on a model so small that asking is all the work: microseconds of processor time for each module
call, above ``by hand``.
"""

import argparse
import datetime
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import manyheads
from manyheads.environment import environment
from manyheads.models.scenes import ScenePipeline, build
from manyheads.tasks.diffusion.denoising_cost import KINDS, computed, kind_of
from manyheads.tasks.diffusion.fidelity import psnr
from pab_peers import apart, diffusers_pab, flops

Row = dict[str, Any]
EVERY, UPPER, LOWER, STEPS = (2, 3, 6), 800.0, 100.0, 30
SPEC = f"pab:spatial={EVERY[0]},temporal={EVERY[1]},cross={EVERY[2]},upper={UPPER},lower={LOWER}"
WORDS = 120  # tokens of the text, as Latte's
SHAPES: dict[str, tuple[Row, int]] = {  # of the denoiser, and rounds
    "cpu": ({"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64, "sample_size": 24}, 3),
    "cuda": (
        {
            "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32,
            "video_length": 16, "in_channels": 4, "out_channels": 4,
        },
        5,
    ),
    "quick": ({"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "sample_size": 16}, 2),
    "overhead": ({"num_layers": 8, "num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 4}, 15),
}  # fmt: skip


class Bed:
    """A pipeline with random weights, its text and its noise, with the branches in one batch or in two calls."""

    def __init__(self, shape: Row, device: str, calls: str) -> None:
        torch.manual_seed(0)
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        pipe = build("moving", **{**shape, "cross_attention_dim": width})
        pipe.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        pipe.set_progress_bar_config(disable=True)
        self.model: Any = pipe.transformer
        self.pipe: ScenePipeline = pipe if calls == "one batch" else apart(pipe)
        self.branches = 1 if calls == "one batch" else 2
        config, source = self.model.config, torch.Generator().manual_seed(1)
        size = (1, config.in_channels, config.video_length, config.sample_size, config.sample_size)
        self.latents = torch.randn(size, generator=source).to(device, self.model.dtype)
        self.text = torch.randint(1, 10, (1, WORDS), generator=source)

    def video(self) -> Tensor:
        """One video, float32 in 0..1."""
        made = self.pipe(self.text, num_inference_steps=STEPS, latents=self.latents, output_type="pt")
        video: Tensor = made.frames
        return video

    def modules(self) -> list[tuple[str, Any]]:
        """Attention modules with their kinds."""
        return [(kind_of(name), module) for name, module in self.model.named_modules() if hasattr(module, "to_q")]


@contextmanager
def replaced(bed: Bed, forward: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """``forward(kind, original)`` in place of the forward of every attention module."""
    for kind, module in bed.modules():
        module.forward = forward(kind, module.forward)
    try:
        yield
    finally:
        for _, module in bed.modules():
            del module.forward


def by_hand(bed: Bed) -> AbstractContextManager[None]:
    """Modules that know beforehand at which calls they run."""
    bed.pipe.scheduler.set_timesteps(STEPS)
    inside = [i for i, t in enumerate(bed.pipe.scheduler.timesteps.tolist()) if LOWER < t < UPPER]

    def forward(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        n = EVERY[KINDS.index(kind)]
        runs = [step not in inside or step == inside[0] or step % n == 0 for step in range(STEPS)]
        plan, kept = iter([(runs[step], b) for step in range(STEPS) for b in range(bed.branches)]), {}

        def call(*args: Any, **kwargs: Any) -> Any:
            run, branch = next(plan)
            if run:
                kept[branch] = original(*args, **kwargs)
            return kept[branch]

        return call

    return replaced(bed, forward)


def free(bed: Bed) -> AbstractContextManager[None]:
    """Modules that return zeros, made once."""

    def forward(_: str, __: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Tensor] = []

        def call(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            if not kept:
                kept.append(torch.zeros_like(hidden))
            return kept[0]

        return call

    return replaced(bed, forward)


def ways(bed: Bed) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """What is compared, each as a context in which one video is made."""
    return {
        "none": nullcontext,
        "ours": lambda: manyheads.use(bed.pipe, SPEC),
        "diffusers": lambda: diffusers_pab(bed.pipe, EVERY, UPPER, LOWER),
        "by hand": lambda: by_hand(bed),
        "free": lambda: free(bed),
    }


def kept_bytes(bed: Bed, name: str, port: Any) -> int | None:
    """What the cache holds at most: of ours by its own account, of diffusers' by what it holds after the run."""
    if name == "ours":
        found = [
            state["counts"]["bytes"] for kept in port.state(port.strategies[0]).values() for state in kept.values()
        ]
        return sum(found)
    if name != "diffusers":
        return None
    hooks = [module._diffusers_hook.get_hook("pyramid_attention_broadcast") for _, module in bed.modules()]
    return sum(hook.state.cache.nbytes for hook in hooks)


def once(bed: Bed, name: str) -> tuple[tuple[float, float], Tensor, Row]:
    """Seconds of one video, by the clock and of processor time; the video; and what memory it took."""
    cuda = bed.latents.is_cuda
    with ways(bed)[name]() as port:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter(), time.process_time()
        video = bed.video()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        row: Row = {"kept_mib": kept_bytes(bed, name, port)}
    if row["kept_mib"] is not None:
        row["kept_mib"] = round(row["kept_mib"] / 2**20, 2)
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return seconds, video, row


def measure(bed: Bed, calls: str, rounds: int) -> list[Row]:
    """Every way, in turns: forwards in even rounds and backwards in odd ones."""
    names = list(ways(bed))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    videos: dict[str, Tensor] = {}
    rows: dict[str, Row] = {}
    counts: dict[str, Counter[str]] = {}
    for name in names:  # warms up, and counts
        with computed(bed.model) as counts[name]:
            _, videos[name], rows[name] = once(bed, name)
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            (took, busy), video, _ = once(bed, name)
            seconds[name].append(took)
            processor[name].append(busy)
            assert torch.equal(video, videos[name]), f"{name}: another run, another video"
            print(f"{calls:10} round {i + 1} of {rounds}  {name:10} {took:8.3f} s", flush=True)
    found = []
    for name in names:
        row: Row = {"calls": calls, "way": name, "seconds": round(statistics.median(seconds[name]), 4)}
        row["seconds_least_most"] = [round(min(seconds[name]), 4), round(max(seconds[name]), 4)]
        row["processor_seconds"] = round(statistics.median(processor[name]), 4)
        for other in ("none", "diffusers"):
            ratios = [a / b for a, b in zip(seconds[other], seconds[name], strict=True)]
            row[f"times_as_fast_as_{other}"] = round(statistics.median(ratios), 3)
        row["attention_computed"] = {k: round(counts[name][k] / counts["none"][k], 4) for k in KINDS}
        near = psnr(videos[name], videos["none"]).item()
        row["psnr_to_none"] = None if near == float("inf") else round(near, 2)
        row["largest_difference_from_by_hand"] = float((videos[name] - videos["by hand"]).abs().max())
        found.append(row | rows[name])
    assert found[1]["largest_difference_from_by_hand"] == 0, "ours is not what the schedule says"
    if calls == "one batch":
        assert torch.equal(videos["ours"], videos["diffusers"]), "with one batch diffusers' own should be the same"
    return found


def overhead(device: str) -> Row:
    """Microseconds of processor time for each call of a module, answered from the cache or not, above ``by hand``."""
    shape, rounds = SHAPES["overhead"]
    rows = {row["way"]: row for row in measure(Bed(shape, device, "one batch"), "overhead", rounds)}
    calls = STEPS * len(KINDS) * shape["num_layers"]
    least = rows["by hand"]["processor_seconds"]
    found = {way: 1e6 * (rows[way]["processor_seconds"] - least) / calls for way in ("ours", "diffusers")}
    return {"microseconds_a_module_call": {way: round(value, 1) for way, value in found.items()}, "calls": calls}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it runs")
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--json", type=Path, default=None, help="where results go; pab.json here unless --quick")
    options = parser.parse_args()
    shape, rounds = SHAPES["quick" if options.quick else options.device]
    rows: list[Row] = []
    for calls in ("one batch", "two calls"):
        bed = Bed(shape, options.device, calls)
        rows += measure(bed, calls, rounds)
    costs = flops(bed.pipe, bed.latents)
    result = {
        "what": f"one video, {STEPS} steps, guidance, {SPEC}; random weights",
        "shape": {**shape, "tokens": bed.model.config.video_length * (shape["sample_size"] // 2) ** 2, "text": WORDS},
        "share_of_flops": {kind: round(costs[kind] / costs["model"], 4) for kind in KINDS},
        "rows": rows,
        "overhead": overhead(options.device),
        "threads": torch.get_num_threads(),
        "diffusers": version("diffusers"),
        "environment": environment(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for row in rows:
        print(
            f"{row['calls']:10} {row['way']:10} {row['seconds']:8.3f} s  {row['times_as_fast_as_none']:.3f}x none  "
            f"{row['times_as_fast_as_diffusers']:.3f}x diffusers  PSNR {row['psnr_to_none']}  {row['kept_mib']} MiB"
        )
    print(result["overhead"])
    path = options.json or (None if options.quick else Path(__file__).with_suffix(".json"))
    if path is not None:
        sections: Row = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        sections[options.device] = result
        path.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
