# SPDX-License-Identifier: Apache-2.0
"""The judges of generated scenes and films.

    python -m manyheads.recipes.judge --kind scenes|moving --out DIR [--steps 1500] [--device cuda] [--smoke]

Trained on real scenes with a little noise, tested on photographs that training never saw. Beside its accuracy stands
the floor of its Fréchet distance: that between two sets of 2,000 real test scenes each.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from manyheads.data import scenes as data
from manyheads.models import packed
from manyheads.models.judge import Judge, frechet
from manyheads.recipes import _card
from manyheads.training import TrainState, fit


def real(kind: data.Kind, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Test scenes with values in 0..1, and their labels."""
    sample = data.draw(kind, count, torch.Generator().manual_seed(seed), "test")
    return sample.images / 2 + 0.5, sample.labels


def train(judge: Judge, steps: int, batch: int, seed: int, device: str) -> None:
    """Train in place."""
    judge.to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)

    def get_batch(step: int) -> tuple[Tensor, Tensor]:
        sample = data.draw(judge.kind, batch, generator, device=device)
        noise = torch.randn(sample.images.shape, generator=generator).to(device)
        strength = 0.1 * torch.rand(batch, *[1] * (noise.ndim - 1), generator=generator).to(device)
        return sample.images + strength * noise, sample.labels

    def loss(model: nn.Module, drawn: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = drawn
        _, logits = model(images)
        losses = [nn.functional.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits.values())]
        return torch.stack(losses).sum()

    def on_step(state: TrainState) -> None:
        schedule.step()
        if state.step % 100 == 0:
            print(f"{state.step:5d} of {steps}  loss {state.loss.item():.3f}", flush=True)

    fit(judge, get_batch, loss, budget=steps, optimizers=[optimizer], clip=None, bf16=False, on_step=on_step)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Train the judge of scenes or films.")
    parser.add_argument("--kind", choices=["scenes", "moving"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="three steps, to see that it runs")
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    judge, start = Judge(given.kind), time.perf_counter()
    train(judge, 3 if given.smoke else given.steps, given.batch, given.seed, given.device)
    seconds = time.perf_counter() - start
    given.out.mkdir(parents=True, exist_ok=True)
    packed.save(judge.half(), given.out)
    packed.load_into(judge.float(), given.out, torch.float32)  # what is judged is what is read back
    count = 64 if given.smoke else 2000
    (images, labels), (others, _) = real(given.kind, count, 2**31), real(given.kind, count, 2**31 + 1)
    seen = judge.see(images)
    results = {
        "kind": given.kind,
        "parameters": sum(p.numel() for p in judge.parameters()),
        "steps": given.steps,
        "seconds": round(seconds),
        "accuracy": {name: round(float(seen.right(labels, name).mean()), 4) for name in judge.answers},
        "floor": round(frechet(seen.features, judge.see(others).features), 4),
        "environment": _card.environment(given.device),
    }
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["accuracy"]), "floor", results["floor"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
