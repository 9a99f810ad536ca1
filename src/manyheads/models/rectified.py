# SPDX-License-Identifier: Apache-2.0
"""What small rectified flows share: noise and velocity of a training, steps of sampling, files, sizes that match."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from ..errors import UserError
from ..files import write_atomically

__all__ = ["Flow", "euler", "fitted", "noised", "small_wan"]

_CONFIG, _WEIGHTS = "{}.json", "model.safetensors"
ConfigT = TypeVar("ConfigT")


class Flow(nn.Module):
    """A denoiser that is trained from scratch under a condition. Subclasses have a name, a recipe and a config."""

    named: ClassVar[str]
    recipe: ClassVar[str]
    config_type: ClassVar[type]
    config: Any

    @property
    def parameters_held(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters())

    def loss(self, given: Any) -> Tensor:
        """Mean squared error of the velocity, the last of what is given."""
        said: Tensor = self(*given[:-1])
        wrong: Tensor = (said.float() - given[-1]).square().mean()
        return wrong

    def save(self, folder: Path | str) -> None:
        """Write weights and size, for :meth:`load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, folder / _WEIGHTS)
        write_atomically(folder / _CONFIG.format(self.named), json.dumps(asdict(self.config)) + "\n")

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> Self:
        """What :meth:`save` wrote.

        Raises:
            UserError: there is none.
        """
        folder, file = Path(folder), _CONFIG.format(cls.named)
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {cls.named}: train one, python -m manyheads.recipes.{cls.recipe} --out {folder}"
            )
        make: Any = cls
        made: Self = make(cls.config_type(**json.loads((folder / file).read_text("utf-8"))))
        made.load_state_dict(load_file(folder / _WEIGHTS))
        return made.to(device).eval()


def small_wan(config: Any, patch: tuple[int, int, int], channels: tuple[int, int], text: int, longest: int) -> Any:
    """An untrained Wan of diffusers, of the blocks that ``config`` says (``dim``, ``heads``, ``layers``, ``hidden``).

    Args:
        config: of the flow.
        patch: of a token: frames, rows and columns.
        channels: that are read, and predicted.
        text: channels of what stands for text.
        longest: tokens along an axis.

    Raises:
        UserError: a head of channels that three axes cannot share.
    """
    from diffusers import WanTransformer3DModel

    if config.dim % config.heads or config.dim // config.heads % 6:
        raise UserError("a head has a multiple of six channels, for three axes; give another dim or other heads")
    return WanTransformer3DModel(
        patch_size=patch, num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        in_channels=channels[0], out_channels=channels[1], text_dim=text, freq_dim=64,
        ffn_dim=config.hidden or 4 * config.dim, num_layers=config.layers, rope_max_seq_len=longest,
    )  # fmt: skip


def fitted(make: Callable[[ConfigT], Flow], config: ConfigT, parameters: int) -> ConfigT:
    """``config`` with the feed-forward width that brings what it makes nearest to so many parameters.

    Raises:
        UserError: it has more without any.
    """
    size: Any = config
    hidden = size.hidden or 4 * size.dim
    with torch.random.fork_rng(devices=[]):
        held = make(config).parameters_held
    width = hidden + round((parameters - held) / (size.layers * (2 * size.dim + 1)))
    if width < 1:
        raise UserError(f"{size.strategy or 'an editor'} has more than {parameters} parameters without a feed-forward")
    found: ConfigT = replace(size, hidden=width)
    return found


def noised(clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is clean ``[N, ...]`` with noise, times of 1,000 ``[N]``, and velocities.

    Levels are those of a logit-normal (arXiv 2403.03206), drawn on the device of ``clean``.
    """
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    sigma = torch.randn(len(clean), generator=generator, device=clean.device).sigmoid()
    mixed = torch.lerp(clean, noise, sigma.view(-1, *[1] * (clean.ndim - 1)))
    return mixed, 1000 * sigma, noise - clean


def euler(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Where a flow ends, by as many evaluations of ``velocity(x, time)``, times of 1,000 ``[N]``."""
    x = noise
    for i in range(steps):
        time = torch.full((len(x),), 1000 * (1 - i / steps), device=x.device)
        x = x - velocity(x, time).float() / steps
    return x
