# SPDX-License-Identifier: Apache-2.0
"""The models of scenes and films that ship with the package, and the judge of what they make.

    python -m manyheads.recipes.scenes --kind scenes|unet|moving|moving3d --out DIR [--budget "4000 steps"]

Denoisers are diffusers' own classes. Samples are put together as they are needed (``data/scenes.py``), so none is seen
twice. MMDiT, Latte and Wan predict the velocity of a flow at noise levels of a logit-normal (arXiv 2403.03206), the
UNet predicts the noise at uniform timesteps of a cosine schedule. A tenth of the captions is empty, and each word is
left out another tenth of the time. AdamW, warm-up and half a cosine; what is saved is a moving average of the weights,
in float16. Every 500 steps the average so far is written, so that an interrupted run leaves a model. On a GPU samples
are put together there, and steps are replayed. At the end the judge of ``recipes/judge.py`` counts captions that are
met, and a second time those of the weights in 8 bits, which are the ones that ship.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from manyheads.data import scenes as data
from manyheads.models.judge import load_judge
from manyheads.models.scenes import NAMES, ScenePipeline, build, load_scenes, predict, save
from manyheads.recipes import _card
from manyheads.training import TrainState, decay, fit

RATES = {"scenes": 2e-3, "unet": 1.5e-3, "moving": 2e-3, "moving3d": 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train.

    Attributes:
        budget: as ``4000 steps`` or ``5m``, see :meth:`manyheads.training.Budget.parse`.
        batch: samples of a step.
        rate: highest learning rate.
        warmup: steps in which it rises.
        average: decay of the moving average of the weights, once it has settled.
    """

    budget: str
    batch: int
    rate: float
    warmup: int = 100
    average: float = 0.998


class Captioned(Protocol):
    """Pictures or films in -1..1 that say their captions, int64 ``[N, 3]``."""

    @property
    def images(self) -> Tensor: ...
    def tokens(self, kind: data.Kind) -> Tensor: ...


class Noisy(NamedTuple):
    """Samples as the denoiser is given them.

    Attributes:
        latents: ``[N, ...]``, with noise.
        time: what the denoiser is told of it, ``[N]``.
        captions: int64 ``[N, 3]``, words left out.
        target: what it is to predict, as ``latents``.
    """

    latents: Tensor
    time: Tensor
    captions: Tensor
    target: Tensor


def dropped(tokens: Tensor, generator: Generator) -> Tensor:
    """Captions of which a tenth is empty and a tenth of the other words missing."""
    chance = torch.rand(len(tokens), 4, generator=generator)
    gone = (chance[:, :1] < 0.1) | (chance[:, 1:] < 0.1)
    return tokens.masked_fill(gone.to(tokens.device), 0)


def noisy(pipe: ScenePipeline, sample: Captioned, generator: Generator, drawn: Generator | None = None) -> Noisy:
    """``sample`` with noise; ``drawn`` is the generator of the noise, on the device of the sample."""
    clean = pipe._packed(sample.images)
    count, spread = len(clean), (-1, *[1] * (clean.ndim - 1))
    drawn = drawn or generator
    noise = torch.randn(clean.shape, generator=drawn, device=drawn.device).to(clean)
    captions = dropped(sample.tokens(pipe.config.kind), generator)
    if pipe.unet is not None:
        t = torch.randint(1000, (count,), generator=generator).to(clean.device)
        return Noisy(pipe.scheduler.add_noise(clean, noise, t), t, captions, noise)
    sigma = torch.randn(count, generator=generator).sigmoid().to(clean)
    mixed = (1 - sigma.view(spread)) * clean + sigma.view(spread) * noise
    return Noisy(mixed, sigma * 1000, captions, noise - clean)


def loss(pipe: ScenePipeline, given: Noisy) -> Tensor:
    """Mean squared error of what the denoiser predicts of noisy samples, one value for each ``[N]``."""
    out = predict(pipe.denoiser, given.latents, given.time, pipe.captions(given.captions))
    return (out.float() - given.target).pow(2).flatten(1).mean(1)


def train(
    pipe: ScenePipeline, plan: Plan, seed: int, device: str, save: Path | None = None
) -> tuple[ScenePipeline, list[dict[str, float]], TrainState]:  # fmt: skip
    """Train in place; return a pipeline of the averaged weights, the curve of the loss, and where training ended.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    parts = nn.ModuleDict({"captions": pipe.captions, "denoiser": pipe.denoiser}).to(device)
    averaged = copy.deepcopy(pipe)
    means = list(averaged.captions.parameters()) + list(averaged.denoiser.parameters())
    weights = list(pipe.captions.parameters()) + list(pipe.denoiser.parameters())
    optimizer = torch.optim.AdamW(parts.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.Generator(device).manual_seed(seed) if device != "cpu" else None
    curve = []

    def get_batch(step: int) -> Noisy:
        return noisy(pipe, data.draw(pipe.config.kind, plan.batch, generator, device=device), generator, drawn)

    def on_step(state: TrainState) -> None:
        step = state.step
        kept = min(plan.average, step / (step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(means, weights, 1 - kept)
        if step % 100 == 0 or state.progress >= 1:
            state.look()
            since = state.losses[-((step - 1) % 100 + 1) :]
            curve.append({"step": step, "loss": round(sum(since) / len(since), 4)})
            left = state.seconds / max(state.progress, 1e-9) - state.seconds
            told = f"loss {curve[-1]['loss']:.4f}  {state.seconds:5.0f} s, {left:5.0f} s left"
            print(f"{step:6d} steps  {told}", flush=True)
        if save is not None and step % 500 == 0:
            averaged.save_pretrained(save)

    state = fit(
        parts, get_batch, lambda _, given: loss(pipe, given).mean(), budget=plan.budget, optimizers=[optimizer],
        schedule=decay("cosine", warmup=plan.warmup), replayed=device != "cpu", on_step=on_step,
    )  # fmt: skip
    averaged.captions.eval()
    averaged.denoiser.eval()
    return averaged, curve, state


@torch.no_grad()
def held_out(pipe: ScenePipeline, count: int, device: str) -> float:
    """The loss on scenes before photographs that training never saw, always the same noise."""
    generator = torch.Generator().manual_seed(2**31)
    found = []
    for _ in range(max(1, count // 64)):
        sample = data.draw(pipe.config.kind, 64, generator, "test", device)
        found.append(loss(pipe, noisy(pipe, sample, generator)))
    return float(torch.cat(found).mean())


@torch.no_grad()
def met(pipe: ScenePipeline, count: int, device: str, steps: int) -> dict[str, float]:
    """The share of ``count`` captions whose word of each kind the judge reads off what the pipeline makes of them."""
    kind = pipe.config.kind
    judge = load_judge(kind, device)[0]
    generator = torch.Generator().manual_seed(2**31 + 1)
    labels = data.draw(kind, count, generator, "test").labels
    right = []
    for rows in labels.split(128):
        out = pipe.to(device)(
            data.tokens(rows, kind), num_inference_steps=steps, latents=pipe.noise(len(rows), generator),
            output_type="pt",
        )  # fmt: skip
        seen = judge.see(out.frames if kind == "moving" else out.images)
        right.append(torch.stack([seen.right(rows, word) for word in data.VOCABULARY[kind]], 1))
    return dict(zip(data.VOCABULARY[kind], torch.cat(right).mean(0).tolist(), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Train a model of scenes or films.")
    parser.add_argument("--kind", choices=list(NAMES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="4000 steps", help="steps, or time as 5m")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from a model that this recipe wrote")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="three steps, to see that it runs")
    given = parser.parse_args(arguments)
    plan = Plan(
        budget="3 steps" if given.smoke else given.budget, batch=4 if given.smoke else given.batch,
        rate=given.rate or RATES[given.kind],
    )  # fmt: skip
    judged, steps = (2, 2) if given.smoke else (2048, 20)
    torch.manual_seed(given.seed)
    pipe, earlier = build(given.kind), []
    if given.start is not None:
        pipe = load_scenes(given.start)
        earlier = json.loads((given.start / "results.json").read_text(encoding="utf-8"))["trainings"]
    start = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    averaged, curve, state = train(pipe, plan, given.seed, given.device, given.out)
    results = {
        "kind": given.kind,
        "what": NAMES[given.kind],
        "parameters": sum(p.numel() for p in (*pipe.captions.parameters(), *pipe.denoiser.parameters())),
        "trainings": [
            *earlier,
            {
                "budget": plan.budget,
                "steps": state.step,
                "batch": plan.batch,
                "rate": plan.rate,
                "seed": given.seed,
                "seconds": round(time.perf_counter() - start),
            },
        ],
        "held_out": round(held_out(averaged, 64 if given.smoke else 1024, given.device), 4),
        "met": met(averaged, judged, given.device, steps),
        "judged": judged,
        "environment": _card.environment(given.device),
    }
    averaged.to(dtype=torch.float16)
    save(averaged, given.out)
    results["met_stored"] = met(load_scenes(given.out), judged, given.device, steps)
    (given.out / "results.json").write_text(json.dumps({**results, "curve": curve}, indent=1) + "\n", encoding="utf-8")
    (given.out / "README.md").write_text(_card.render("scenes", results), encoding="utf-8")
    print(f"captions met, by the judge: {results['met']}; with the stored weights: {results['met_stored']}")
    print(f"held-out loss {results['held_out']}, written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
