# SPDX-License-Identifier: Apache-2.0
"""A small model in a folder: its size as JSON, its weights as safetensors; and the size that has so many parameters."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import UserError
from ..files import write_atomically

__all__ = ["Saved", "fitted_width"]

_WEIGHTS = "model.safetensors"


class Saved(nn.Module):
    """Base of models that are made from a dataclass of sizes.

    Attributes:
        config: the sizes.
        sizes: their class.
        what: name of the file of sizes, and of the model in an error.
        recipe: module that trains one.
    """

    config: Any
    sizes: ClassVar[Any]
    what: ClassVar[str]
    recipe: ClassVar[str]

    @property
    def parameters_held(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.parameters())

    def save(self, folder: Path | str) -> None:
        """Write weights and size, for :meth:`load`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}, folder / _WEIGHTS)
        write_atomically(folder / f"{self.what}.json", json.dumps(asdict(self.config)) + "\n")

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> Self:
        """The model that :meth:`save` wrote.

        Raises:
            UserError: there is none.
        """
        folder, said = Path(folder), f"{cls.what}.json"
        if not (folder / said).is_file():
            raise UserError(f"{folder} has no {cls.what}: train one, python -m {cls.recipe} --out {folder}")
        made: Any = cls(cls.sizes(**json.loads((folder / said).read_text("utf-8"))))
        made.load_state_dict(load_file(folder / _WEIGHTS))
        kept: Self = made.to(device).eval()
        return kept


def fitted_width(model: Saved, parameters: int) -> int:
    """The width of the feed-forward parts of ``model``'s blocks that brings it nearest to so many parameters.

    Raises:
        UserError: it has more without any.
    """
    config = model.config
    hidden = config.hidden or 4 * config.dim
    width: int = hidden + round((parameters - model.parameters_held) / (config.layers * (2 * config.dim + 1)))
    if width < 1:
        raise UserError(f"{config.strategy or 'a model'} has more than {parameters} parameters without a feed-forward")
    return width
