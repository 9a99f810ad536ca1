# SPDX-License-Identifier: Apache-2.0
"""An editor of voxel objects by instruction: diffusers' Wan transformer over patches of voxels, shown the source.

A rectified flow over the occupancy itself, +1 where a voxel is filled and -1 elsewhere, as the first stage of TRELLIS
has it over latents. The instruction is one token of text. ``recipes/native3d_edit.py`` trains one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..data.voxels import INSTRUCTIONS, Edits, Instruction
from ..errors import UserError
from ..integrations.source_condition import conditioned
from .rectified import Flow, euler, noised, small_wan

__all__ = ["EditorConfig", "Noisy", "VoxelEditor", "noisy"]

_TEXT = 32


@dataclass(frozen=True, slots=True)
class EditorConfig:
    """Size of an editor.

    Attributes:
        side: voxels along an axis of the grid.
        patch: of a token.
        dim, heads, layers: of the blocks.
        hidden: width of their feed-forward part; 0 for four times ``dim``.
        strategy: spec of the condition; empty for none, an editor that never sees what it edits.
    """

    side: int = 8
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 3
    hidden: int = 0
    strategy: str = "native3d_edit"


class Noisy(NamedTuple):
    """Edits as an editor is trained on them.

    Attributes:
        latents: of targets with noise, ``[N, 1, S, S, S]``.
        source: as latents, clean.
        time: of 1,000, ``[N]``.
        instruction: int64 ``[N]``.
        velocity: what is to be predicted.
    """

    latents: Tensor
    source: Tensor
    time: Tensor
    instruction: Tensor
    velocity: Tensor


class VoxelEditor(Flow):
    """A conditioned denoiser and the vectors of the instructions.

    Attributes:
        config: its size.
        denoiser: see :func:`manyheads.integrations.source_condition.conditioned`.
        words: a vector for each instruction.
    """

    named: ClassVar[str] = "editor"
    recipe: ClassVar[str] = "native3d_edit"
    config_type: ClassVar[type] = EditorConfig

    def __init__(self, config: EditorConfig) -> None:
        super().__init__()
        if config.side % config.patch:
            raise UserError("a patch parts the side: give another side or patch")
        self.config = config
        self.words = nn.Embedding(len(INSTRUCTIONS), _TEXT)
        patch = (config.patch, config.patch, config.patch)
        transformer = small_wan(config, patch, (1, 1), _TEXT, config.side // config.patch)
        self.denoiser = conditioned(transformer, config.strategy or None)  # last: others' first weights are the same

    def forward(self, latents: Tensor, source: Tensor, time: Tensor, instruction: Tensor) -> Tensor:
        """Velocity of ``latents [N, 1, S, S, S]``, as :class:`Noisy` has what is given."""
        text = self.words(instruction)[:, None]
        out: Tensor = self.denoiser(latents, source, time, encoder_hidden_states=text)
        return out

    @torch.no_grad()
    def edited(self, source: Tensor, instruction: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
        """Objects as they are after their instructions, by Euler steps of the flow.

        Args:
            source: bool ``[N, S, S, S]``.
            instruction: int64 ``[N]``.
            noise: to start from, float32 ``[N, S, S, S]``.
            steps: as many evaluations of the denoiser.
        """
        clean = _latents(source)
        return euler(lambda x, time: self(x, clean, time, instruction), noise[:, None], steps)[:, 0] > 0

    def edit(
        self, source: Tensor, instruction: Instruction | Sequence[Instruction], steps: int = 10, seed: int = 0
    ) -> Tensor:  # fmt: skip
        """The same of objects on the CPU, told by name: bool ``[N, S, S, S]``, or one object ``[S, S, S]``.

        Raises:
            UserError: an instruction that it does not know, or objects of another size.
        """
        many = source if source.ndim == 4 else source[None]
        names = [instruction] * len(many) if isinstance(instruction, str) else list(instruction)
        if (unknown := sorted(set(names) - set(INSTRUCTIONS))) or len(names) != len(many):
            said = f"not {', '.join(unknown)}" if unknown else f"and {len(names)} are given for {len(many)} objects"
            raise UserError(f"an object has one of {', '.join(INSTRUCTIONS)} for its instruction, {said}")
        if many.shape[1:] != (self.config.side,) * 3 or many.dtype != torch.bool:
            raise UserError(f"objects are bool, of {self.config.side} voxels a side, not {list(many.shape)}")
        device = self.words.weight.device
        noise = torch.randn(many.shape, generator=Generator().manual_seed(seed)).to(device)
        told = torch.tensor([INSTRUCTIONS.index(name) for name in names], device=device)
        out = self.edited(many.to(device), told, noise, steps).cpu()
        return out if source.ndim == 4 else out[0]


def _latents(voxels: Tensor) -> Tensor:
    return voxels[:, None].float() * 2 - 1


def noisy(edits: Edits, generator: Generator) -> Noisy:
    """Targets with noise at levels of a logit-normal (arXiv 2403.03206), drawn on the device of the edits."""
    mixed, time, velocity = noised(_latents(edits.target), generator)
    return Noisy(mixed, _latents(edits.source), time, edits.instruction, velocity)
