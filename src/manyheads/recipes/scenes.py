# SPDX-License-Identifier: Apache-2.0
"""The models of scenes and films that ship with the package, and the judge of what they make.

    python -m manyheads.recipes.scenes --kind scenes|unet|moving --out DIR [--steps 4000] [--start DIR] [--device cuda]

Denoisers are diffusers' own classes. Samples are put together as they are needed (``data/scenes.py``), so none is seen
twice. MMDiT and Latte predict the velocity of a flow at noise levels drawn from a logit-normal (arXiv 2403.03206), the
UNet predicts the noise at uniform timesteps of a cosine schedule. A tenth of the captions is empty, and each word is
left out another tenth of the time. AdamW, warm-up and half a cosine; what is saved is a moving average of the weights,
in float16. Every 500 steps the average so far is written, so that an interrupted run leaves a model.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from manyheads.data import scenes as data
from manyheads.models.scenes import NAMES, ScenePipeline, build, load_scenes, predict, save
from manyheads.recipes import _card
from manyheads.training import TrainState, decay, fit

RATES = {"scenes": 2e-3, "unet": 1.5e-3, "moving": 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train.

    Attributes:
        steps, batch: optimiser steps, and samples of each.
        rate: highest learning rate.
        warmup: steps in which it rises.
        average: decay of the moving average of the weights, once it has settled.
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    average: float = 0.998


def dropped(tokens: Tensor, generator: Generator) -> Tensor:
    """Captions of which a tenth is empty and a tenth of the other words missing."""
    chance = torch.rand(len(tokens), 4, generator=generator)
    gone = (chance[:, :1] < 0.1) | (chance[:, 1:] < 0.1)
    return tokens.masked_fill(gone.to(tokens.device), 0)


def loss(pipe: ScenePipeline, sample: data.Sample, generator: Generator) -> Tensor:
    """Mean squared error of what the denoiser predicts of noisy samples, one value for each ``[N]``."""
    clean = pipe._packed(sample.images)
    count, spread = len(clean), (-1, *[1] * (clean.ndim - 1))
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    text = pipe.captions(dropped(sample.tokens(pipe.config.kind), generator))
    if pipe.unet is not None:
        t = torch.randint(1000, (count,), generator=generator).to(clean.device)
        noisy, target = pipe.scheduler.add_noise(clean, noise, t), noise
    else:
        sigma = torch.randn(count, generator=generator).sigmoid().to(clean)
        noisy = (1 - sigma.view(spread)) * clean + sigma.view(spread) * noise
        t, target = sigma * 1000, noise - clean
    with torch.autocast("cuda", torch.bfloat16, enabled=clean.is_cuda):
        out = predict(pipe.denoiser, noisy, t, text)
    return (out.float() - target).pow(2).flatten(1).mean(1)


def train(
    pipe: ScenePipeline, plan: Plan, seed: int, device: str, save: Path | None = None
) -> tuple[ScenePipeline, list[dict[str, float]]]:  # fmt: skip
    """Train in place; return a pipeline of the averaged weights, and the curve of the loss.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    parts = nn.ModuleDict({"captions": pipe.captions, "denoiser": pipe.denoiser}).to(device)
    averaged = copy.deepcopy(pipe)
    means = list(averaged.captions.parameters()) + list(averaged.denoiser.parameters())
    weights = list(pipe.captions.parameters()) + list(pipe.denoiser.parameters())
    optimizer = torch.optim.AdamW(parts.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    curve = []

    def on_step(state: TrainState) -> None:
        step = state.step
        kept = min(plan.average, step / (step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(means, weights, 1 - kept)
        if step % 100 == 0 or step == plan.steps:
            state.look()
            since = state.losses[-((step - 1) % 100 + 1) :]
            curve.append({"step": step, "loss": round(sum(since) / len(since), 4)})
            left = state.seconds / step * (plan.steps - step)
            told = f"loss {curve[-1]['loss']:.4f}  {state.seconds:5.0f} s, {left:5.0f} s left"
            print(f"{step:6d} of {plan.steps}  {told}", flush=True)
        if save is not None and step % 500 == 0:
            averaged.save_pretrained(save)

    fit(
        parts, lambda step: data.draw(pipe.config.kind, plan.batch, generator, device=device),
        lambda _, sample: loss(pipe, sample, generator).mean(), budget=plan.steps, optimizers=[optimizer], bf16=False,
        schedule=decay("cosine", warmup=plan.warmup), on_step=on_step,
    )  # fmt: skip
    averaged.captions.eval()
    averaged.denoiser.eval()
    return averaged, curve


@torch.no_grad()
def held_out(pipe: ScenePipeline, count: int, device: str) -> float:
    """The loss on scenes before photographs that training never saw, always the same noise."""
    generator = torch.Generator().manual_seed(2**31)
    found = []
    for _ in range(max(1, count // 64)):
        sample = data.draw(pipe.config.kind, 64, generator, "test", device)
        found.append(loss(pipe, sample, generator))
    return float(torch.cat(found).mean())


def write(pipe: ScenePipeline, out: Path, results: dict[str, Any], curve: list[dict[str, float]]) -> None:
    """The pipeline, its denoiser in 8 bits, its results, and its card."""
    pipe.to(dtype=torch.float16)
    save(pipe, out)
    (out / "results.json").write_text(json.dumps({**results, "curve": curve}, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(_card.render("scenes", results), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Train a model of scenes or films.")
    parser.add_argument("--kind", choices=list(NAMES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from a model that this recipe wrote")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="three steps, to see that it runs")
    given = parser.parse_args(arguments)
    plan = Plan(
        steps=3 if given.smoke else given.steps, batch=4 if given.smoke else given.batch,
        rate=given.rate or RATES[given.kind],
    )  # fmt: skip
    torch.manual_seed(given.seed)
    pipe, earlier = build(given.kind), []
    if given.start is not None:
        pipe = load_scenes(given.start)
        earlier = json.loads((given.start / "results.json").read_text(encoding="utf-8"))["trainings"]
    start = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    averaged, curve = train(pipe, plan, given.seed, given.device, given.out)
    results = {
        "kind": given.kind,
        "what": NAMES[given.kind],
        "parameters": sum(p.numel() for p in (*pipe.captions.parameters(), *pipe.denoiser.parameters())),
        "trainings": [
            *earlier,
            {
                "steps": plan.steps,
                "batch": plan.batch,
                "rate": plan.rate,
                "seed": given.seed,
                "seconds": round(time.perf_counter() - start),
            },
        ],
        "held_out": round(held_out(averaged, 64 if given.smoke else 1024, given.device), 4),
        "environment": _card.environment(given.device),
    }
    write(averaged, given.out, results, curve)
    print(f"held-out loss {results['held_out']}, written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
