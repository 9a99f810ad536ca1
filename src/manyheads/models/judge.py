# SPDX-License-Identifier: Apache-2.0
"""The judge of generated scenes and films: a small network that says what it sees, and how far two sets are apart.

It is trained on real scenes (``recipes/judge.py``) to name object, place or direction, and backdrop. Its last layer
before the answers gives the features of a Fréchet distance; that network is not Inception and the distance is no FID,
so it is called FD-small, and means something only beside the distance between two sets of real scenes. The shipped ones
are stored in 8 bits since 2026-11-29: features are off by 0.3 % from those of the float16 ones that older results are
of, and 997 of 1,000 answers are the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import scenes as data
from ..errors import UserError
from . import packed

__all__ = ["Judge", "Seen", "frechet", "load_judge"]

FEATURES = 64


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, before)
        self.first = nn.Conv2d(before, after, 3, stride, 1)
        self.between = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, 1, 1)
        self.skip = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.second(self.between(self.first(self.norm(x).relu())).relu())
        out: Tensor = self.skip(x) + inner
        return out


@dataclass(frozen=True, slots=True)
class Seen:
    """What the judge sees.

    Attributes:
        features: float32 ``[N, 64]``.
        chances: of the words of each kind, as it has them: float32 ``[N, words]`` by kind.
    """

    features: Tensor
    chances: dict[str, Tensor]

    def right(self, labels: Tensor, kind: str) -> Tensor:
        """1 where the likeliest word of a kind is that of ``labels [N, 3]``, else 0: float32 ``[N]``."""
        at = list(self.chances).index(kind)
        return (self.chances[kind].argmax(1).cpu() == labels[:, at].cpu()).float()


class Judge(nn.Module):
    """A residual network over scenes ``[N, 3, 32, 32]`` or films ``[N, 3, 8, 16, 16]``, values in -1..1."""

    def __init__(self, kind: data.Kind) -> None:
        super().__init__()
        self.kind: data.Kind = kind
        films = kind == "moving"
        self.stem = nn.Conv2d(3 * (data.FRAMES if films else 1), 32, 3, 1 if films else 2, 1)
        self.blocks = nn.Sequential(_Residual(32, 64, 2), _Residual(64, 96, 2), nn.GroupNorm(8, 96), nn.ReLU())
        self.project = nn.Linear(96 * 4, FEATURES)
        self.answers = nn.ModuleDict(
            {name: nn.Linear(FEATURES, len(words)) for name, words in data.VOCABULARY[kind].items()}
        )

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features ``[N, 64]`` and the logits of each kind of word."""
        x = self.blocks(self.stem(images.flatten(1, 2) if images.ndim == 5 else images))
        features = self.project(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu()
        return features, {name: answer(features) for name, answer in self.answers.items()}

    @torch.no_grad()
    def see(self, images: Tensor, batch: int = 256) -> Seen:
        """Judge images whose values are in 0..1, as a pipeline gives them with ``output_type="pt"``."""
        device = self.stem.weight.device
        found = [self(rows.to(device) * 2 - 1) for rows in images.split(batch)]
        chances = {name: torch.cat([f[1][name] for f in found]).softmax(-1) for name in self.answers}
        return Seen(torch.cat([f[0] for f in found]), chances)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features ``[N, d]``, each taken for a Gaussian; in float64."""
    a, b = a.double(), b.double()
    one, two = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + one.trace() + two.trace() - 2 * cross)


def judge_path(kind: str) -> Path:
    """Folder of a shipped judge."""
    return Path(__file__).parent / "judges" / kind


def load_judge(kind: data.Kind, device: str = "cpu") -> tuple[Judge, dict[str, Any]]:
    """The shipped judge of ``scenes`` or ``moving``, and how good it is (its ``results.json``).

    Raises:
        UserError: there is none.
    """
    folder = judge_path(kind)
    if not (folder / packed.FILE).is_file():
        raise UserError(f"there is no judge of {kind!r}; make one with `python -m manyheads.recipes.judge`")
    judge: Judge = packed.load_into(Judge(kind), folder, torch.float32)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return judge.to(device).eval(), results
