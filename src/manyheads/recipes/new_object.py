# SPDX-License-Identifier: Apache-2.0
"""A new object for a frozen text-to-image model, from a few pictures: an adaptor of its cross-attention.

    python -m manyheads.recipes.new_object --emoji 1f680 --out DIR [--strategy comcat.adaptor] [--steps 500]

The model is the UNet that ships. The object stands under a word that it was never told of (``down``, which is one of
films), before photographs and at places that it knows. Nothing but the adaptor is trained, by the model's own loss on
the pictures; images of its class, by which Custom Diffusion keeps a class, are not shown. What is written:
``adaptor.safetensors`` and ``adaptor.json``, which :func:`load` reads.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from manyheads.conditioning import AttentionAdaptor
from manyheads.data import scenes as data
from manyheads.errors import UserError
from manyheads.integrations.adapted import adapted, adaptor_of
from manyheads.models.scenes import ScenePipeline, load_scenes
from manyheads.recipes.scenes import loss, noisy
from manyheads.spec import parse
from manyheads.training import TrainState, decay, fit

_TOKEN = data.WORDS.index("down")
_FILES = ("adaptor.json", "adaptor.safetensors")


class Pictures(NamedTuple):
    """Pictures and their captions.

    Attributes:
        images: float32 in -1..1 ``[N, 3, H, W]``.
        captions: int64 ``[N, 3]``.
        alpha: how much the object covers, ``[N, 1, H, W]``.
    """

    images: Tensor
    captions: Tensor
    alpha: Tensor

    def tokens(self, kind: data.Kind) -> Tensor:
        return self.captions

    def rows(self, which: Tensor) -> "Pictures":
        return Pictures(*(x[which] for x in self))


def pictures(
    count: int, generator: Generator, sprite: Tensor | None = None, split: data.Split = "train", device: str = "cpu"
) -> Pictures:
    """Pictures of the new object under its word, or of those that the model knows where ``sprite`` is None."""
    sample = data.draw("scenes", count, generator, split, device, sprite=sprite)
    captions = sample.tokens("scenes")
    if sprite is not None:
        captions[:, 0] = _TOKEN
    return Pictures(sample.images, captions, sample.alpha)


def caption(text: str) -> Tensor:
    """The caption, int64 ``[1, 3]``, of the new object at a place and before a backdrop: ``top left, over a frog``."""
    return torch.tensor([[_TOKEN, *data.read_caption(text, "scenes")[1:]]])


def adaptor_strategy(spec: str) -> AttentionAdaptor:
    """The strategy of a spec.

    Raises:
        UserError: it adapts no attention.
    """
    strategy = parse(spec)
    if not isinstance(strategy, AttentionAdaptor):
        raise UserError(f"{strategy.slug} adapts no cross-attention; give comcat.adaptor or comcat.lora")
    return strategy


def train(
    pipe: ScenePipeline, strategy: AttentionAdaptor, shown: Pictures, steps: int, rate: float, batch: int, seed: int
) -> tuple[nn.ModuleDict, TrainState]:
    """An adaptor of a pipeline's UNet that is trained on pictures; the pipeline stays as it is.

    Args:
        pipe: on its device.
        strategy: which adaptor.
        shown: what is learned.
        steps, batch: of the training, of pictures drawn from ``shown``.
        rate: highest learning rate.
        seed: of first weights, order and noise.
    """
    device = pipe.denoiser.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adaptor = adaptor_of(pipe.denoiser, strategy)
    generator, drawn = Generator().manual_seed(seed), Generator(device).manual_seed(seed)
    for part in (pipe.denoiser, pipe.captions):
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=rate, weight_decay=0.0)
    with adapted(pipe.denoiser, adaptor):
        state = fit(
            adaptor,
            lambda step: noisy(
                pipe, shown.rows(torch.randint(len(shown.images), (batch,), generator=generator).to(device)),
                generator, drawn,
            ),
            lambda _, given: loss(pipe, given).mean(),
            budget=steps, optimizers=[optimizer], schedule=decay("cosine", warmup=min(20, steps // 4)), bf16=False,
        )  # fmt: skip
    return adaptor.requires_grad_(False), state


def save(adaptor: nn.ModuleDict, strategy: AttentionAdaptor, folder: Path) -> None:
    """Write the adaptor and its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILES[0]).write_text(json.dumps({"strategy": strategy.spec}) + "\n", encoding="utf-8")
    save_file(adaptor.state_dict(), folder / _FILES[1])


def load(folder: Path, denoiser: nn.Module) -> nn.ModuleDict:
    """What :func:`save` wrote, for a denoiser of the same shape.

    Raises:
        UserError: the folder holds none, or one of another denoiser.
    """
    try:
        spec = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))["strategy"]
        weights = load_file(folder / _FILES[1])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no adaptor that can be read ({error}): train one") from error
    adaptor = adaptor_of(denoiser, adaptor_strategy(spec))
    try:
        adaptor.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the adaptor in {folder} was made for another denoiser: train one for this") from error
    return adaptor.requires_grad_(False)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Teach the shipped UNet a new object from a few pictures.")
    parser.add_argument("--emoji", required=True, help="its code point in hexadecimal, as 1f680 for a rocket")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", default="comcat.adaptor", help="comcat.adaptor or comcat.lora")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    strategy = adaptor_strategy(given.strategy)
    pipe = load_scenes("unet", given.device)
    shown = pictures(
        given.pictures, Generator().manual_seed(given.seed), data.new_object(given.emoji), device=given.device
    )
    adaptor, state = train(pipe, strategy, shown, given.steps, given.rate, given.batch, given.seed)
    save(adaptor, strategy, given.out)
    generator = Generator().manual_seed(given.seed)
    with adapted(pipe.denoiser, adaptor):
        made = pipe(shown.captions[:4].cpu(), generator=generator)
    for i, image in enumerate(made.images):
        image.save(given.out / f"{i}.png")
    count = sum(p.numel() for p in adaptor.parameters())
    print(f"{count:,} numbers trained in {state.seconds:.0f} s, four pictures made; written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
