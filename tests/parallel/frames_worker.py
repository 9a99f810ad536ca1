# SPDX-License-Identifier: Apache-2.0
"""Three processes that share a video's frames, all or the first two: ``frames_worker.py folder``.

What each scenario made is left in the folder as ``scenario-rank.safetensors`` and ``.json``.
"""

import datetime
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

import manyheads
from manyheads.errors import UserError
from manyheads.integrations import frames as hook
from manyheads.integrations.frames import split_frames
from manyheads.parallel import FrameParallel, Traffic
from manyheads.strategy import AttentionWatch
from oracles import diffusion as tiny

RANKS, STEPS = 3, 10
PATIENCE = 5.0  # seconds, where one process fails
PAB = "pab:spatial=2,temporal=4,cross=3,upper=930,lower=150"
SHAPES = {  # frames, rows and columns of latents; a token is 2 x 2
    "even": (6, 8, 8),
    "uneven": (6, 6, 10),  # 15 places
    "one_frame_each": (2, 8, 8),
    "confusing": (6, 6, 8),  # 12 places, as many on each of two processes as there are frames
}


class Note(AttentionWatch):
    """The facts that a strategy is told at every call, and the shape of its queries."""

    def watch(self, call, out):
        step = call.diffusion
        fact = [call.site.kind, step.axis, step.layout.frames, step.layout.height, step.layout.width, *call.q.shape]
        call.state.setdefault("seen", []).append(fact)


def build(frames: int = 6, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return tiny.build("latte", video_length=frames, **changes).to(dtype)


def forward(model: Any, shape: str = "even", mask: bool = False, **changes: Any) -> Tensor:
    """The denoiser once, on two rows."""
    frames, height, width = SHAPES[shape]
    source = torch.Generator().manual_seed(3)
    dtype = model.proj_out.weight.dtype
    given = {
        "hidden_states": torch.randn(2, 4, frames, height, width, generator=source).to(dtype),
        "encoder_hidden_states": torch.randn(2, 6, 12, generator=source).to(dtype),
        "timestep": torch.tensor([500, 500]),
    }
    if mask:
        given["encoder_attention_mask"] = torch.randn(2 * frames, 1, 6, generator=source).to(dtype)
    with torch.no_grad():
        return model(**{**given, **changes}, return_dict=False)[0]


def pipeline(dtype: torch.dtype = torch.float64) -> Any:
    import diffusers

    pipe = diffusers.LattePipeline(
        None, None, None, build(dtype=dtype, out_channels=8), diffusers.DDIMScheduler()
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, guidance: float = 4.0, seed: int = 1, steps: int = STEPS) -> Tensor:
    source = torch.Generator().manual_seed(0)
    dtype = pipe.transformer.dtype
    text = torch.randn(2, 1, 6, 12, generator=source).to(dtype)
    noise = torch.randn(1, 4, 6, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return pipe(
        negative_prompt=None if guidance > 1 else "", prompt_embeds=text[0],
        negative_prompt_embeds=text[1] if guidance > 1 else None, video_length=6, height=64, width=64, latents=noise,
        num_inference_steps=steps, guidance_scale=guidance, output_type="latent", mask_feature=False,
    ).frames  # fmt: skip


def used(pipe: Any, *strategies: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """A run under strategies, with what PAB counted and what was told, by site and branch."""
    pab, note = manyheads.parse(PAB), Note()
    with manyheads.use(pipe, *((pab,) if PAB in strategies else ()), note) as port:
        made = run(pipe, **options)
    facts = {"note": {s: {b: m["seen"] for b, m in kept.items()} for s, kept in port.state(note).items()}}
    if PAB in strategies:
        facts["pab"] = {s: {b: m["counts"] for b, m in kept.items()} for s, kept in port.state(pab).items()}
    return made, facts


@contextmanager
def frame_parallel(target: Any, group: Any = None) -> Iterator[Traffic]:
    """Frames of a denoiser shared among a group; what this process sends."""
    with split_frames(target, FrameParallel(group)) as split:
        yield split.traffic


def counts(traffic: Traffic) -> dict[str, int]:
    return {name: getattr(traffic, name) for name in traffic.__slots__}


def refused(action: Any) -> str:
    """The line of a UserError."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def snapshot(model: Any) -> list[dict[str, Any]]:
    """What hangs on every module: attributes, hooks, buffers."""
    ours = [{k: v for k, v in vars(module).items() if k != "_diffusers_hook"} for module in model.modules()]
    return [{k: dict(v) if isinstance(v, dict) else v for k, v in module.items()} for module in ours]


def shared(group: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Single calls of the denoiser: shapes, masks, and what a mistake would do."""
    made: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, (frames, _, _) in SHAPES.items():
        if frames % dist.get_world_size(group):
            continue
        model = build(frames)
        with frame_parallel(model, group) as traffic:
            made[name] = forward(model, name)
        facts[name] = counts(traffic)
        made[f"{name}_after"] = forward(model, name)
    model = build()
    note = Note()
    with frame_parallel(model, group), manyheads.use(model, note) as port:
        forward(model, "confusing")
    facts["axes"] = {site: kept["all"]["seen"][0][1] for site, kept in port.state(note).items()}
    with frame_parallel(model, group):
        made["mask"] = forward(model, mask=True)
        made["frames_alone"] = forward(model, enable_temporal_attentions=False)
    half = build(dtype=torch.bfloat16)
    with frame_parallel(half, group):
        made["half"] = forward(half)
    mistakes = {
        "without_exchange": (FrameParallel, "over_time", lambda this, attention, x: attention(x)),
        "wrong_positions": (hook, "_positioned", _first(hook._positioned)),
        "wrong_order": (FrameParallel, "gather", _reversed(FrameParallel.gather)),
    }
    for name, change in mistakes.items():
        with mock.patch.object(*change), frame_parallel(model, group):
            made[name] = forward(model)
    return made, facts


def _first(positioned: Any) -> Any:
    """The positions of the first frames, whichever frames a process has."""
    return lambda model, frames, mine: positioned(model, frames, slice(0, mine.stop - mine.start))


def _reversed(gather: Any) -> Any:
    """The parts of the processes gathered the wrong way round."""
    return lambda this, sample: torch.cat(gather(this, sample).chunk(this.ranks, 2)[::-1], 2)


def pipelines(group: Any, own: Any, other: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole runs, with guidance in one batch and without, plain and with PAB; and what is refused."""
    made: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, dtype in (("64", torch.float64), ("32", torch.float32)):
        pipe = pipeline(dtype)
        before = snapshot(pipe.transformer)
        with frame_parallel(pipe, group) as traffic:
            facts[f"there{name}"] = snapshot(pipe.transformer) != before
            made[f"plain{name}"], told = used(pipe)
        facts[f"plain{name}"] = {**counts(traffic), **told}
        with frame_parallel(pipe, group) as traffic:
            made[f"pab{name}"], told = used(pipe, PAB)
        facts[f"pab{name}"] = {**counts(traffic), **told}
        facts[f"removed{name}"] = snapshot(pipe.transformer) == before
    pipe = pipeline()
    with frame_parallel(pipe, group):
        made["unguided"], facts["unguided"] = used(pipe, PAB, guidance=1.0)
    with frame_parallel(pipe, own) as traffic:
        made["alone"] = run(pipe)
    made["single"] = run(pipe)
    facts["alone"] = counts(traffic)
    facts["refused"] = refusals(pipe, group, other)
    made["after"] = run(pipe)
    return made, facts


def refusals(pipe: Any, group: Any, other: Any) -> dict[str, str]:
    """The lines of what is refused; every process has to get there."""

    def opened(target: Any, group: Any = group) -> None:
        with frame_parallel(target, group):
            run(pipe, steps=2, seed=dist.get_rank())

    def inside() -> None:
        with manyheads.use(pipe, PAB):
            opened(pipe)

    def twice() -> None:
        with frame_parallel(pipe, group):
            opened(pipe.transformer)

    def odd() -> None:
        model = build(3)
        with frame_parallel(model, group):
            forward(model, hidden_states=torch.randn(2, 4, 3, 8, 8, dtype=torch.float64))

    def gradients() -> None:
        model = build().requires_grad_()
        given = tiny.inputs("latte")
        with frame_parallel(model, group):
            model(**{**given, "hidden_states": torch.randn(2, 4, 6, 8, 8)})

    def long() -> None:
        model = build(8)
        with frame_parallel(model, group):
            forward(model)

    def small() -> None:
        model = build()
        with frame_parallel(model, group):
            forward(model, hidden_states=torch.randn(2, 4, 6, 2, 2, dtype=torch.float64))

    return {
        "other_noise": refused(lambda: opened(pipe)),
        "inside": refused(inside),
        "twice": refused(twice),
        "odd": refused(odd),
        "long": refused(long),
        "small": refused(small),
        "gradients": refused(gradients),
        "elsewhere": refused(lambda: opened(pipe, other)),
    }


def failing(group: Any, store: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The second process fails in its second block and lives on; the first must not wait for ever."""
    model = build()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    fails = dist.get_rank(group) == 1
    if fails:
        model.transformer_blocks[1].register_forward_pre_hook(fail)
    dist.barrier(group)
    started = time.monotonic()
    message = ""
    try:
        with frame_parallel(model, group):
            forward(model)
    except RuntimeError as error:
        message = str(error)
    seconds = time.monotonic() - started
    if fails:  # alive, so that no closed connection ends the wait of the other
        store.wait(["waited"], datetime.timedelta(seconds=60))
    else:
        store.set("waited", "")
    return {}, {"error": message, "seconds": seconds}


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    limit = datetime.timedelta(seconds=180)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    two = dist.new_group([0, 1])
    hasty = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=PATIENCE))
    single = [dist.new_group([r]) for r in range(RANKS)]
    scenarios: dict[str, Any] = {"shared3": lambda: shared(None)}
    if rank < 2:
        scenarios["shared2"] = lambda: shared(two)
        scenarios["pipelines"] = lambda: pipelines(two, single[rank], single[2])
        scenarios["failing"] = lambda: failing(hasty, store)
    for name, scenario in scenarios.items():
        made, facts = scenario()
        save_file({key: x.contiguous() for key, x in made.items()}, folder / f"{name}-{rank}.safetensors")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(facts))


def main() -> int:
    """All of them, forked from one that has imported everything. The number of those that failed."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context, folder = multiprocessing.get_context(method), Path(sys.argv[1])
    started = [context.Process(target=process, args=(rank, folder)) for rank in range(RANKS)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    return sum(one.exitcode != 0 for one in started)


if __name__ == "__main__":
    sys.exit(main())
