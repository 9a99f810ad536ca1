# SPDX-License-Identifier: Apache-2.0
"""Few-step students of the shipped video model, trained with Video-BLADE's sparse attention in the loop and without.

    python -m manyheads.recipes.video_blade --out DIR [--steps 8] [--budget "300 steps"] [--device cuda]

Two LoRA students of K steps are distilled by matching distributions (``training/step_distillation.py``), no data but
captions: ``joint`` computes its attention sparsely while it is trained, ``dense`` does not. The teacher, frozen and
dense, guides; the model of what a student makes is a second LoRA of the same weights. Then the judge reads captions off
videos of the teacher, of each student, and of the dense student to which sparse attention is given afterwards
(``post hoc``), and measures their distance to real ones (FD-small). The paper's claim is that ``joint`` is better than
``post hoc``. What is written is the joint student, for

    manyheads generate --model DIR --strategy video_blade:block=16,samples=4 --steps 8 --guidance 1 --prompt "ghost up"

with the strategy that it was trained with. As in the paper: AdamW with beta1 0, 1e-4 for the student and 5e-4 for the
other at a rank of 64 (here these rates are options, and the rank is 16 for a model of 96 channels), eta 0.9.
"""

import argparse
import copy
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

import manyheads
from manyheads.calls.low_rank import LowRank
from manyheads.data import scenes as data
from manyheads.models.judge import frechet, load_judge
from manyheads.models.scenes import ScenePipeline, load_scenes, predict, save
from manyheads.recipes import _card
from manyheads.training import TrainState, fit
from manyheads.training.step_distillation import Distillation

_LAYERS = re.compile(r"\.(to_q|to_k|to_v|to_out\.0)$")
Line = Callable[[TrainState], None]


class Adapted(nn.Module):
    """A frozen denoiser with two LoRA, ``student`` and ``fake``; the one at work is named by ``active``, or none."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        super().__init__()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and _LAYERS.search(n)}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        self.parts = nn.ModuleDict({part: LowRank(shapes, rank, alpha=1.0) for part in ("student", "fake")})
        self.active = ""
        self._handles = [layer.register_forward_hook(partial(self._add, name)) for name, layer in layers.items()]
        self._layers = dict(layers)

    def _add(self, name: str, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if not self.active:
            return None
        lora: Any = self.parts[self.active]
        down, up = lora.matrices(name, layer.weight, True)
        changed: Tensor = out + lora.change(given[0], down, up)
        return changed

    @torch.no_grad()
    def merge(self) -> None:
        """Write the student into the weights, and take both LoRA off."""
        lora: Any = self.parts["student"]
        for name, layer in self._layers.items():
            weight: Any = layer.weight
            down, up = lora.matrices(name, weight, True)
            weight += lora.alpha * up @ down
        for handle in self._handles:
            handle.remove()


def distil(
    teacher: ScenePipeline, strategies: Sequence[str], options: argparse.Namespace, tell: Line
) -> tuple[ScenePipeline, TrainState]:
    """A student of ``options.steps`` steps of a pipeline, whose attention ``strategies`` compute.

    Args:
        teacher: stays as it is.
        strategies: specs; none for a dense student.
        options: of the command line.
        tell: told how far the training is.
    """
    pipe = copy.deepcopy(teacher)
    pipe.denoiser.requires_grad_(False)
    pipe.captions.requires_grad_(False)
    torch.manual_seed(options.seed)
    adapted = Adapted(pipe.denoiser, options.rank).to(options.device)
    kind, source = pipe.config.kind, torch.Generator().manual_seed(options.seed)
    pipe.scheduler.set_timesteps(options.steps)

    def velocity(part: str, x: Tensor, level: Tensor, tokens: Tensor) -> Tensor:
        adapted.active = part
        sparse = part == "student" and bool(strategies)
        with manyheads.use(pipe.denoiser, *strategies) if sparse else nullcontext():
            return predict(pipe.denoiser, x, level * 1000, pipe.captions(tokens)).float()

    def real(x: Tensor, level: Tensor, tokens: Tensor) -> Tensor:
        both = torch.cat([torch.zeros_like(tokens), tokens])
        uncond, cond = velocity("", torch.cat([x, x]), torch.cat([level, level]), both).chunk(2)
        guided: Tensor = uncond + options.guidance * (cond - uncond)
        return guided

    plan = Distillation(
        student=partial(velocity, "student"), fake=partial(velocity, "fake"), real=real,
        levels=pipe.scheduler.sigmas.tolist(), eta=options.eta,
    )  # fmt: skip

    def get_batch(_: int) -> tuple[Tensor, Tensor]:
        tokens = data.tokens(_labels(kind, options.batch, source), kind)
        return pipe.noise(options.batch, source), tokens.to(options.device)

    parts: Any = adapted.parts
    optimizers = [
        torch.optim.AdamW(parts[part].parameters(), lr=rate, betas=(0.0, 0.999), weight_decay=0.01)
        for part, rate in (("student", options.rate), ("fake", options.fake_rate))
    ]
    state = fit(
        adapted, get_batch, lambda _, batch: plan.losses(*batch, source), budget=options.budget, optimizers=optimizers,
        bf16=False, on_step=tell,
    )  # fmt: skip
    adapted.active = ""
    adapted.merge()
    return pipe, state


def _labels(kind: data.Kind, count: int, source: Generator) -> Tensor:
    return torch.stack([torch.randint(len(w), (count,), generator=source) for w in data.VOCABULARY[kind].values()], 1)


@torch.no_grad()
def judged(
    pipe: ScenePipeline, strategies: Sequence[str], count: int, steps: int, guidance: float, device: str
) -> dict[str, float]:
    """What the judge says of ``count`` videos: captions met by kind of word, FD-small to real ones, seconds a video."""
    kind = pipe.config.kind
    judge = load_judge(kind, device)[0]
    source = torch.Generator().manual_seed(2**31 + 1)
    labels, made = _labels(kind, count, source), []
    begun = time.perf_counter()
    with manyheads.use(pipe, *strategies) if strategies else nullcontext():
        for rows in labels.split(64):
            out = pipe(
                data.tokens(rows, kind), num_inference_steps=steps, guidance_scale=guidance,
                latents=pipe.noise(len(rows), source), output_type="pt",
            )  # fmt: skip
            made.append(out.frames.cpu())
    seconds = time.perf_counter() - begun
    seen = judge.see(torch.cat(made))
    truth = judge.see(data.draw(kind, max(count, 256), torch.Generator().manual_seed(2**30), "test").images / 2 + 0.5)
    found = {word: seen.right(labels, word).mean().item() for word in data.VOCABULARY[kind]}
    return {**found, "fd_small": frechet(seen.features, truth.features), "seconds": seconds / count}


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Distil few-step students with sparse attention and without.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="moving3d", help="the teacher: a shipped video model, or a folder of one")
    parser.add_argument("--strategy", default="video_blade:block=16,samples=4,from_tokens=0", help="of the student")
    parser.add_argument("--steps", type=int, default=8, help="of a student")
    parser.add_argument("--teacher-steps", type=int, default=50)
    parser.add_argument("--budget", default="300 steps", help="of each student: steps, or time as 5m")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of the student")
    parser.add_argument("--fake-rate", type=float, default=5e-4, help="and of the model of what it makes")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher")
    parser.add_argument("--eta", type=float, default=0.9, help="share of old noise in what is put back; 1 for no new")
    parser.add_argument("--judged", type=int, default=2048, help="videos that are judged of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="two steps, to see that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.budget, options.batch, options.judged, options.steps, options.teacher_steps = "2 steps", 2, 4, 2, 2
    teacher = load_scenes(options.model, options.device)
    students, trainings = {}, {}
    for name, strategies in (("joint", [options.strategy]), ("dense", [])):

        def tell(state: TrainState, name: str = name) -> None:
            if state.step % 50 == 0 or state.progress >= 1:
                state.look()
                last = state.losses[-50:]
                print(
                    f"{name:6} {state.step:5d} steps  loss {sum(last) / len(last):.4f}  {state.seconds:5.0f} s",
                    flush=True,
                )

        students[name], state = distil(teacher, strategies, options, tell)
        trainings[name] = {"steps": state.step, "seconds": round(state.seconds), "losses": state.losses}
    few, asa = options.steps, [options.strategy]
    arms: dict[str, tuple[ScenePipeline, list[str], int, float]] = {
        "teacher": (teacher, [], options.teacher_steps, options.guidance),
        "teacher, few steps": (teacher, [], few, options.guidance),
        "student, dense": (students["dense"], [], few, 1.0),
        "student, joint": (students["joint"], asa, few, 1.0),
        "student, post hoc": (students["dense"], asa, few, 1.0),
    }
    rows = {name: judged(pipe, acting, options.judged, steps, scale, options.device)
            for name, (pipe, acting, steps, scale) in arms.items()}  # fmt: skip
    results = {
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "judged": rows, "trainings": trainings, "environment": _card.environment(options.device),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    save(students["joint"].to(dtype=torch.float16), options.out)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name:20}" + "".join(f"  {metric} {value:.4f}" for metric, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
