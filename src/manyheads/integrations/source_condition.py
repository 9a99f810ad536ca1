# SPDX-License-Identifier: Apache-2.0
"""A denoiser of diffusers, as it is, together with the weights by which it is shown a source.

Where a condition acts is reached around the calls of the denoiser's own modules (:mod:`.module_calls`), for the time of
a call: the embedding of patches, the table of rotary positions, attention to text. A joined sequence is given to the
denoiser as a grid twice as long on its first axis, whose halves are embedded and placed apart: tokens lie row by row,
so that the second half's stand behind the first's.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention.rope import Rotary
from ..calls.condition import Condition
from ..conditioning import DenoiserConfig, SourceCondition
from ..errors import UserError
from ..spec import parse
from .module_calls import unwrapped, wrap_call

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ConditionedDenoiser", "conditioned", "size_of"]


@dataclass(frozen=True)
class _Places:
    """Where things are in a class of denoisers: modules by path, the list of blocks, and names in a block."""

    embed: str
    blocks: str
    rope: str = ""
    text: str = ""  # of attention to text in a block
    timed: bool = False  # a timestep for every token, ``[B, N]``


_PLACES = {
    "WanTransformer3DModel": _Places("patch_embedding", "blocks", "rope", "attn2", True),
    "PixArtTransformer2DModel": _Places("pos_embed", "transformer_blocks", "", "attn2"),
    "SD3Transformer2DModel": _Places("pos_embed", "transformer_blocks"),
}


def size_of(denoiser: nn.Module) -> DenoiserConfig:
    """The size of a denoiser, as a condition needs it."""
    config: Any = unwrapped(denoiser).config
    patch, heads = config.patch_size, config.num_attention_heads
    sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return DenoiserConfig(heads * config.attention_head_dim, heads, config.num_layers, config.in_channels, sides)


def conditioned(denoiser: nn.Module, strategy: str | SourceCondition | None) -> "ConditionedDenoiser":
    """``denoiser`` with new weights, on its device; None for a denoiser that is shown no source.

        edit = conditioned(transformer, "STRATEGY")
        velocity = edit(noisy, source, timestep, encoder_hidden_states=text)

    Raises:
        UserError: another strategy, or a denoiser that the strategy cannot act in.
    """
    made: Any = parse(strategy) if isinstance(strategy, str) else strategy
    if made is not None and not isinstance(made, SourceCondition):
        raise UserError(f"{made.slug} shows a denoiser no source: docs/diffusion.md names strategies that do")
    weights = Condition() if made is None else made.condition(size_of(denoiser))
    first = next(unwrapped(denoiser).parameters())
    return ConditionedDenoiser(denoiser, weights.to(first.device, first.dtype))


class ConditionedDenoiser(nn.Module):
    """A denoiser and a condition, trained and called together.

    Attributes:
        denoiser: of diffusers.
        condition: its new weights.
    """

    def __init__(self, denoiser: nn.Module, condition: Condition) -> None:
        super().__init__()
        name = type(unwrapped(denoiser)).__name__
        if name not in _PLACES:
            raise UserError(f"a source can be shown to {', '.join(_PLACES)}; {name} is not known")
        places = _PLACES[name]
        if condition.beside_text and not places.text:
            raise UserError(f"{name} has no attention to text of its own that another could stand beside")
        if condition.joined and condition.clean and not places.timed:
            raise UserError(f"{name} has one time for all tokens; give the strategy time=same")
        self.denoiser, self.condition, self._places = denoiser, condition, places

    def forward(self, target: Tensor, source: Tensor, timestep: Tensor, **given: Any) -> Tensor:
        """What the denoiser predicts of ``target``, knowing ``source``; both ``[B, C, *grid]`` of one grid.

        Args:
            target: noisy latents.
            source: clean latents.
            timestep: ``[B]`` or a scalar, of the target.
            given: further inputs of the denoiser.
        """
        if target.shape != source.shape:
            raise UserError(f"source and target lie on one grid: {list(source.shape)} is not {list(target.shape)}")
        timestep, latents = timestep.expand(target.shape[0]), target
        if self.condition.joined:
            latents = torch.cat([target, source], 2)
            if self.condition.clean:
                sides = zip(target.shape[2:], size_of(self.denoiser).patch, strict=True)
                count = torch.Size([size // patch for size, patch in sides]).numel()
                of_target = timestep[:, None].expand(-1, count)
                timestep = torch.cat([of_target, torch.zeros_like(of_target)], 1)
        with self._shown(source):
            out: Tensor = self.denoiser(
                hidden_states=latents, timestep=timestep, **{**given, "return_dict": False}
            )[0]  # fmt: skip
        return out[:, :, : target.shape[2]]

    @contextmanager
    def _shown(self, source: Tensor) -> "Iterator[None]":
        """The condition at its places, for one call."""
        condition, seen = self.condition, dict[str, Any]()
        model, places = unwrapped(self.denoiser), self._places

        def embed(inner: Callable[..., Tensor], latents: Tensor) -> Tensor:
            first, second = inner(latents[:, :, : source.shape[2]]), inner(source)
            grid = first.shape[2:] if first.ndim > 3 else None
            tokens, seen["source"] = (x if grid is None else x.flatten(2).transpose(1, 2) for x in (first, second))
            made = condition.embedded(tokens, seen["source"], source)
            return made if grid is None else made.transpose(1, 2).unflatten(2, (-1, *grid[1:]))

        def rope(inner: Callable[..., Rotary], latents: Tensor) -> Rotary:
            cos, sin = seen["rotary"] = inner(source)
            return (condition.join(cos, cos), condition.join(sin, sin)) if condition.joined else (cos, sin)

        def text(layer: int) -> Callable[..., Tensor]:
            def around(inner: Callable[..., Tensor], hidden: Tensor, *more: Any, **named: Any) -> Tensor:
                out = inner(hidden, *more, **named)
                return out + condition.added(layer, hidden, seen["source"], seen.get("rotary"))

            return around

        with ExitStack() as stack:
            stack.callback(wrap_call(model.get_submodule(places.embed), embed)[1])
            if places.rope:
                stack.callback(wrap_call(model.get_submodule(places.rope), rope)[1])
            for layer, block in enumerate(getattr(model, places.blocks)) if condition.beside_text else ():
                stack.callback(wrap_call(block.get_submodule(places.text), text(layer))[1])
            yield
