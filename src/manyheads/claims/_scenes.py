# SPDX-License-Identifier: Apache-2.0
"""What claims on generated scenes share: pictures under a strategy from noise that is always the same, and how to tell.

Arms differ in nothing but their strategy: the same captions, the same noise, the same steps. FD-small is the Fréchet
distance of the judge's features (``models/judge.py``) to real scenes before photographs that no model was trained on;
beside it stands the distance of two sets of real scenes, below which nothing can be told.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.claims._old import Figure, Setting
    from manyheads.compare.stats import Estimate
    from manyheads.models.judge import Seen
    from manyheads.models.scenes import ScenePipeline
    from manyheads.strategy import Strategy

__all__ = ["Bed", "distance", "drawn", "paired", "real"]


def drawn(count: int, seed: int) -> "Tensor":
    """Labels of scenes, int64 ``[N, 3]``, all words equally likely."""
    import torch

    from manyheads.data import scenes as data

    generator = torch.Generator().manual_seed(seed)
    kinds = data.VOCABULARY["scenes"].values()
    return torch.stack([torch.randint(len(words), (count,), generator=generator) for words in kinds], 1)


@dataclass(slots=True)
class Bed:
    """A model of scenes, its judge, and how pictures are made.

    Attributes:
        pipe: the model.
        steps: denoising steps.
        guidance: of classifier-free guidance, 1 for none.
        batch: pictures at once.
    """

    pipe: "ScenePipeline"
    judge: Any
    floor: float
    steps: int
    guidance: float
    batch: int = 64

    @staticmethod
    def of(setting: "Setting", name: str, steps: int, guidance: float) -> "Bed":
        """The shipped model called ``name`` and the judge of scenes, on the device of the claim."""
        from manyheads.models.judge import load_judge
        from manyheads.models.scenes import load_scenes

        judge, results = load_judge("scenes", setting.device)
        batch = 64 if setting.device == "cpu" else 512
        return Bed(load_scenes(name, setting.device), judge, results["floor"], steps, guidance, batch)

    def make(
        self, labels: "Tensor | None", strategy: "Strategy | str | None", count: int, seed: int,
        progress: "Callable[[float], None]", prepare: "Callable[[Tensor], Tensor] | None" = None,
    ) -> "Tensor":  # fmt: skip
        """Pictures with values in 0..1, float32 ``[N, 3, 32, 32]`` on the CPU.

        Args:
            labels: what is asked for, ``[N, 3]``; None for no condition.
            strategy: or its spec; None for the model as it is.
            count: N.
            seed: of the noise.
            progress: hears the share done.
            prepare: changes the noise of a batch (pairs that share theirs).
        """
        import torch

        import manyheads
        from manyheads.data import scenes as data

        generator = torch.Generator().manual_seed(seed)
        found = []
        for start in range(0, count, self.batch):
            size = min(self.batch, count - start)
            noise = self.pipe.noise(size, generator)
            tokens = torch.zeros(size, 3, dtype=torch.long)
            if labels is not None:
                tokens = data.tokens(labels[start : start + size], "scenes")
            given: dict[str, Any] = {
                "latents": noise if prepare is None else prepare(noise), "num_inference_steps": self.steps,
                "guidance_scale": self.guidance, "output_type": "pt",
            }  # fmt: skip
            if strategy is None:
                made = self.pipe(tokens, **given).images
            else:
                with manyheads.use(self.pipe, strategy):
                    made = self.pipe(tokens, **given).images
            found.append(made.cpu())
            progress((start + size) / count)
        return torch.cat(found)


def real(judge: Any, count: int) -> "Seen":
    """What the judge sees in real scenes before photographs of the test set."""
    import torch

    from manyheads.data import scenes as data

    sample = data.draw("scenes", count, torch.Generator().manual_seed(2**30), "test")
    seen: Seen = judge.see(sample.images / 2 + 0.5)
    return seen


def distance(
    figures: "list[Figure]", name: str, arm: "Tensor", other: "Tensor | None", truth: "Tensor", draws: int = 200
) -> "tuple[float, float, float]":
    """FD-small of ``arm`` to ``truth``, or how much it is above that of ``other``; adds a figure.

    Args:
        figures: grows by one.
        name: of the figure.
        arm: features ``[N, d]``.
        other: features of the same captions and noise under another arm, None for no difference.
        truth: features of real scenes.
        draws: of the bootstrap over pictures, paired.

    Returns:
        Value and the 95 % interval.
    """
    import torch

    from manyheads.claims._old import Figure
    from manyheads.models.judge import frechet

    def value(rows: "Tensor") -> float:
        return frechet(arm[rows], truth) - (0.0 if other is None else frechet(other[rows], truth))

    generator = torch.Generator().manual_seed(0)
    whole = value(torch.arange(len(arm)))
    found = [value(torch.randint(len(arm), (len(arm),), generator=generator)) for _ in range(draws)]
    found = torch.tensor(found).sort().values.tolist()
    # A bootstrap sample repeats pictures, which raises its distance: the interval is that of the deviations.
    middle = sum(found) / len(found)
    low, high = (whole + found[i] - middle for i in (int(0.025 * draws), int(0.975 * draws) - 1))
    figures.append(Figure(name, whole, len(arm), low, high))
    return whole, low, high


def paired(figures: "list[Figure]", name: str, values: "Tensor", unit: str = "") -> "Estimate":
    """Mean of ``values [N]``, one a picture, with its interval over pictures; adds a figure."""
    import numpy as np

    from manyheads.claims._old import Figure
    from manyheads.compare import stats

    each = values.double().cpu().numpy()
    found = stats.mean(each, np.arange(len(each), dtype=float), 0, name)
    figures.append(Figure(name, found.value, found.n, found.low, found.high, unit))
    return found
