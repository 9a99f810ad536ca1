# SPDX-License-Identifier: Apache-2.0
"""Broadcast sequence parallelism: seconds and bytes of a video's denoising on one and several processes, with PAB.

    python benchmarks/pab_parallel.py [--json benchmarks/pab_parallel.json] [--processes 2] [--runs 3]

A Latte denoiser with random weights, attention within a frame and over time in turn: with NCCL and as many GPUs as
processes that of the paper's Latte (28 pairs of blocks of 1,152 channels, 16 frames of 64 x 64 latents, bfloat16),
otherwise a small one over gloo, each process with one thread of the CPU. Runs without and with ``pab`` alternate, the
first of each is not counted. ``seconds`` are those of the slowest process on a GPU; on a CPU they are the time that
the busiest process computes, without its waiting, which tells work from work and not how fast a run is. Bytes are those
that one process sends. ``error`` is the relative difference of the latents from one process's, of the same strategy,
``change`` that from one process's without. The settings of ``pab`` are the released ones for Latte.
"""

import argparse
import datetime
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import manyheads
from decode import commit  # benchmarks/decode.py
from manyheads.environment import environment
from manyheads.integrations.frames import split_frames
from manyheads.parallel import FrameParallel, Traffic

PAB = "pab:spatial=2,temporal=3,cross=6,upper=800,lower=100"
STEPS = 50
SHAPES: dict[str, dict[str, Any]] = {
    "cuda": {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "video_length": 16, "size": 64},
    "cpu": {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2, "video_length": 8, "size": 16},
}


def build(device: torch.device) -> Any:
    """A pipeline without text encoder and decoder, the same weights in every process."""
    import diffusers

    shape = dict(SHAPES[device.type])
    size = shape.pop("size")
    torch.manual_seed(0)
    with device:
        model = diffusers.LatteTransformer3DModel(
            **shape, in_channels=4, out_channels=8, sample_size=size, patch_size=2, caption_channels=64,
            cross_attention_dim=shape["num_attention_heads"] * shape["attention_head_dim"],
            norm_type="ada_norm_single", norm_elementwise_affine=False,
        ).eval()  # fmt: skip
    model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    pipe = diffusers.LattePipeline(None, None, None, model, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, device: torch.device) -> Tensor:
    """Denoise one video with classifier-free guidance."""
    shape = SHAPES[device.type]
    source = torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, 16, 64, generator=source).to(device, pipe.transformer.dtype)
    noise = torch.randn(1, 4, shape["video_length"], shape["size"], shape["size"], generator=source)
    return pipe(
        prompt_embeds=text[0], negative_prompt=None, negative_prompt_embeds=text[1], mask_feature=False,
        video_length=shape["video_length"], height=8 * shape["size"], width=8 * shape["size"], guidance_scale=7.5,
        latents=noise.to(device, pipe.transformer.dtype), num_inference_steps=STEPS, output_type="latent",
    ).frames  # fmt: skip


def timed(pipe: Any, device: torch.device, spec: str) -> tuple[Tensor, float, Traffic]:
    """A run with all processes, its seconds, and what this process sent."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    dist.barrier()
    start = clock()
    with split_frames(pipe, FrameParallel()) as frames, manyheads.use(pipe, *([spec] if spec else [])):
        made = run(pipe, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = torch.tensor([clock() - start], device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return made, float(seconds), frames.traffic


def work(rank: int, ranks: int, folder: str, kind: str, runs: int) -> None:
    """One process; the first leaves what was measured in the folder, and one process's latents for the others."""
    torch.set_num_threads(1 if kind == "cpu" else torch.get_num_threads())
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    pipe = build(device)
    rows: dict[str, dict[str, Any]] = {spec: {"seconds": []} for spec in ("", PAB)}
    for turn in range(runs + 1):
        for at, (spec, row) in enumerate(rows.items()):
            made, seconds, traffic = timed(pipe, device, spec)
            row |= {"processes": ranks, "strategy": spec, **asdict(traffic)}
            if turn:
                row["seconds"].append(round(seconds, 3))
            alone = Path(folder, f"{at}.json")  # as numbers, written by the one process of the first group
            if ranks == 1:
                alone.write_text(json.dumps(made.flatten().tolist()))
            for name, of in (("error", at), ("change", 0)):
                want = torch.tensor(json.loads(Path(folder, f"{of}.json").read_text())).double()
                row[name] = float((made.flatten().cpu().double() - want).norm() / want.norm())
    for row in rows.values():
        row["median_s"] = round(median(row["seconds"]), 3)
    if rank == 0:
        Path(folder, f"rows{ranks}.json").write_text(json.dumps(list(rows.values())))
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where results go")
    parser.add_argument("--processes", type=int, default=2, help="beside one")
    parser.add_argument("--runs", type=int, default=3, help="of each strategy that count")
    given = parser.parse_args()
    kind = "cuda" if dist.is_nccl_available() and torch.cuda.device_count() >= given.processes else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, given.processes):
            mp.spawn(work, args=(ranks, folder, kind, given.runs), nprocs=ranks)
            rows += json.loads(Path(folder, f"rows{ranks}.json").read_text())
    made = {
        "figures": f"{kind.upper()}, {'NCCL' if kind == 'cuda' else 'gloo, one thread a process'}",
        "shape": SHAPES[kind], "steps": STEPS, "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "environment": environment(),
        "seconds_of": "the slowest process" if kind == "cuda" else "CPU time of the busiest process", "rows": rows,
    }  # fmt: skip
    given.json.write_text(json.dumps(made, indent=1) + "\n")
    for row in rows:
        print(*(f"{name} {row[name]}" for name in row if name != "seconds"), sep=", ")


if __name__ == "__main__":
    main()
