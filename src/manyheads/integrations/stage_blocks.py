# SPDX-License-Identifier: Apache-2.0
"""A denoiser of videos of diffusers, as it is, with blocks inserted behind its own and a vector added to its time.

Both act around the calls of the denoiser's own modules (:mod:`.module_calls`), for the time of a call. What a block
gives is brought to ``[B, T, H, W, D]`` and back: tokens of Wan lie frame by frame, UNetMotionModel has its frames in
the batch. Skip connections of a UNet leave its blocks before what is inserted.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calls.stage_blocks import RegionSeen, StageBlocks
from ..conditioning import InsertedBlocks, StageConfig
from ..errors import UserError
from ..spec import parse
from .module_calls import unwrapped, wrap_call

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AdaptedDenoiser", "Denoised", "adapted", "stages_of"]

_TIME = {"WanTransformer3DModel": "condition_embedder.time_embedder", "UNetMotionModel": "time_embedding"}


class Denoised(NamedTuple):
    """What an adapted denoiser gives.

    Attributes:
        sample: its prediction.
        seen: of each inserted block, by the region's name.
    """

    sample: Tensor
    seen: "list[Mapping[str, RegionSeen]]"


def _blocks(denoiser: Any) -> list[nn.Module]:
    """The blocks that others can stand behind, in the order they run."""
    if hasattr(denoiser, "blocks"):
        return list(denoiser.blocks)
    return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]


def stages_of(denoiser: nn.Module) -> list[StageConfig]:
    """The sizes of what the denoiser's blocks give, in the order they run.

    Raises:
        UserError: a class that is not known.
    """
    model: Any = unwrapped(denoiser)
    if (name := type(model).__name__) not in _TIME:
        raise UserError(f"blocks can be inserted into {', '.join(_TIME)}; {name} is not known")
    config = model.config
    if name.startswith("Wan"):
        heads = config.num_attention_heads
        return [StageConfig(heads * config.attention_head_dim, heads)] * config.num_layers
    widths = tuple(config.block_out_channels)
    heads = config.num_attention_heads
    each = (heads,) * len(widths) if isinstance(heads, int) else tuple(heads)
    down = [StageConfig(*size) for size in zip(widths, each, strict=True)]
    return [*down, down[-1], *reversed(down)]


def adapted(denoiser: nn.Module, strategy: str | InsertedBlocks | None) -> "AdaptedDenoiser":
    """``denoiser`` with new blocks, on its device; None for none.

        model = adapted(transformer, "STRATEGY")
        out = model(noisy, timestep, crops, encoder_hidden_states=text)

    Raises:
        UserError: another strategy, layers that are not there, or a denoiser that is not known.
    """
    made: Any = parse(strategy) if isinstance(strategy, str) else strategy
    if made is not None and not isinstance(made, InsertedBlocks):
        raise UserError(f"{made.slug} inserts no blocks: docs/diffusion.md names strategies that do")
    stages = stages_of(denoiser)
    where = list(range(len(stages))) if made is None or made.layers is None else list(made.layers)
    if wrong := [i for i in where if i >= len(stages)]:
        raise UserError(f"the denoiser has {len(stages)} blocks, counted from 0: there is no {wrong[0]}")
    blocks = None if made is None else made.blocks([stages[i] for i in where])
    first = next(unwrapped(denoiser).parameters())
    return AdaptedDenoiser(denoiser, None if blocks is None else blocks.to(first.device, first.dtype), where)


class AdaptedDenoiser(nn.Module):
    """A denoiser and inserted blocks, trained and called together.

    Attributes:
        denoiser: of diffusers.
        inserted: the new blocks, None for none.
    """

    def __init__(self, denoiser: nn.Module, inserted: StageBlocks | None, where: Sequence[int]) -> None:
        super().__init__()
        self.denoiser, self.inserted, self._where = denoiser, inserted, tuple(where)

    def forward(
        self, sample: Tensor, timestep: Tensor, crops: Sequence[Tensor], *, lead: int = 0,
        time_added: Tensor | None = None, **given: Any,
    ) -> Denoised:  # fmt: skip
        """What the denoiser predicts.

        Args:
            sample: noisy videos ``[B, C, T, H, W]``.
            timestep: ``[B]``, or for each token ``[B, N]`` (Wan).
            crops: of the regions, as the inserted blocks read them.
            lead: frames at the beginning of which the inserted blocks see nothing: a clean reference.
            time_added: ``[B, D]``, added to what the denoiser embeds its time as.
            given: further inputs of the denoiser.
        """
        model: Any = unwrapped(self.denoiser)
        seen = list[Any]()
        with ExitStack() as stack:
            if time_added is not None:
                stack.callback(wrap_call(model.get_submodule(_TIME[type(model).__name__]), _plus(time_added))[1])
            if self.inserted is not None:
                described = self.inserted.described(crops)
                blocks = _blocks(model)
                for i, at in enumerate(self._where):
                    around = self._around(i, sample, lead, described, seen)
                    stack.callback(wrap_call(blocks[at], around)[1])
            name = "hidden_states" if hasattr(model, "blocks") else "sample"
            out: Tensor = self.denoiser(**{**given, name: sample, "timestep": timestep, "return_dict": False})[0]
        return Denoised(out, seen)

    def _around(
        self, index: int, sample: Tensor, lead: int, described: Sequence[Tensor], seen: list[Any]
    ) -> Callable[..., Any]:  # fmt: skip
        inserted, frames, batch = self.inserted, sample.shape[2], sample.shape[0]
        assert inserted is not None
        config: Any = unwrapped(self.denoiser).config

        def around(inner: Callable[..., Any], *args: Any, **named: Any) -> Any:
            out = inner(*args, **named)
            hidden, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            if hidden.ndim == 3:
                sides = [n // p for n, p in zip(sample.shape[2:], config.patch_size, strict=True)]
                features = hidden.unflatten(1, sides)
            else:
                features = hidden.unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2)
            first, later = features.split([lead, features.shape[1] - lead], 1)
            made = inserted.stage(index, later, described)
            seen.append(made.seen)
            features = torch.cat([first, made.features.to(first.dtype)], 1) if lead else made.features
            if hidden.ndim == 3:
                hidden = features.flatten(1, 3)
            else:
                hidden = features.permute(0, 1, 4, 2, 3).flatten(0, 1)
            return hidden if rest is None else (hidden, *rest)

        return around


def _plus(added: Tensor) -> Callable[..., Tensor]:
    """A function around an embedding of time ``[B, D]`` or ``[B, N, D]``."""

    def around(inner: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        out = inner(*args, **named)
        return out + (added if out.ndim == 2 else added[:, None])

    return around
