# SPDX-License-Identifier: Apache-2.0
"""A denoiser of diffusers, as it is, together with the weights by which it is shown a source.

Where a condition acts is reached around the calls of the denoiser's own modules (:mod:`.module_calls`), for the time of
a call: the embedding of patches, the table of rotary positions, attention to text. A joined sequence is given to the
denoiser as a grid twice as long on its first axis, whose halves are embedded and placed apart: tokens lie row by row,
so that the second half's stand behind the first's.

A rendering (:class:`ViewedDenoiser`) passes through the same blocks apart from them, without attention to text: a block
is called for it first, and what self-attention then reads of it is what the condition is given in that block.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention.rope import Rotary
from ..calls.condition import Condition, Stream, ViewCondition
from ..conditioning import DenoiserConfig, SourceCondition
from ..errors import UserError
from ..spec import parse
from .module_calls import unwrapped, wrap_call

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["ConditionedDenoiser", "ViewedDenoiser", "conditioned", "size_of"]

Around = tuple[nn.Module, Callable[..., Any]]  # a module, and what is around its calls


@dataclass(frozen=True)
class _Places:
    """Where things are in a class of denoisers: modules by path, the list of blocks, and names in a block."""

    embed: str
    blocks: str
    rope: str = ""
    text: str = ""  # of attention to text in a block
    own: str = ""  # of self-attention in a block, where tokens of another grid can pass through it
    timed: bool = False  # a timestep for every token, ``[B, N]``


_PLACES = {
    "WanTransformer3DModel": _Places("patch_embedding", "blocks", "rope", "attn2", "attn1", True),
    "PixArtTransformer2DModel": _Places("pos_embed", "transformer_blocks", text="attn2"),
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
    weights = weights.to(first.device, first.dtype)
    if isinstance(weights, ViewCondition):
        return ViewedDenoiser(denoiser, weights)
    return ConditionedDenoiser(denoiser, weights)


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
        return self._predicted(target, source, timestep, given, self._around(source, {}))

    def _predicted(
        self, target: Tensor, source: Tensor, timestep: Tensor, given: dict[str, Any], around: "Iterable[Around]"
    ) -> Tensor:
        """A call of the denoiser with the condition at its places."""
        if target.shape != source.shape:
            raise UserError(f"source and target lie on one grid: {list(source.shape)} is not {list(target.shape)}")
        timestep, latents = timestep.expand(target.shape[0]), target
        if self.condition.joined:
            latents = torch.cat([target, source], 2)
            if self.condition.clean:
                count = torch.Size(self._grid(target)).numel()
                of_target = timestep[:, None].expand(-1, count)
                timestep = torch.cat([of_target, torch.zeros_like(of_target)], 1)
        with ExitStack() as stack:
            for module, function in around:
                stack.callback(wrap_call(module, function)[1])
            out: Tensor = self.denoiser(
                hidden_states=latents, timestep=timestep, **{**given, "return_dict": False}
            )[0]  # fmt: skip
        return out[:, :, : target.shape[2]]

    def _grid(self, latents: Tensor) -> tuple[int, ...]:
        """Tokens of latents along each axis."""
        sides = zip(latents.shape[2:], size_of(self.denoiser).patch, strict=True)
        return tuple(size // patch for size, patch in sides)

    def _around(self, source: Tensor, seen: dict[str, Any]) -> "Iterator[Around]":
        """What is around which module for one call; ``seen`` keeps what one leaves for another."""
        condition, model, places = self.condition, unwrapped(self.denoiser), self._places

        def embed(inner: Callable[..., Tensor], latents: Tensor) -> Tensor:
            first, second = inner(latents[:, :, : source.shape[2]]), inner(source)
            grid = first.shape[2:] if first.ndim > 3 else None
            tokens, seen["source"] = (x if grid is None else x.flatten(2).transpose(1, 2) for x in (first, second))
            made = condition.embedded(tokens, seen["source"], source)
            return made if grid is None else made.transpose(1, 2).unflatten(2, (-1, *grid[1:]))

        def rope(inner: Callable[..., Rotary], latents: Tensor) -> Rotary:
            cos, sin = seen["rotary"] = inner(source)
            if condition.goes_on:
                return inner(latents)
            return (condition.join(cos, cos), condition.join(sin, sin)) if condition.joined else (cos, sin)

        def text(layer: int) -> Callable[..., Tensor]:
            def around(inner: Callable[..., Tensor], hidden: Tensor, *more: Any, **named: Any) -> Tensor:
                out = inner(hidden, *more, **named)
                return out + condition.added(layer, hidden, seen["source"], seen.get("rotary"))

            return around

        yield model.get_submodule(places.embed), embed
        if places.rope:
            yield model.get_submodule(places.rope), rope
        for layer, block in enumerate(getattr(model, places.blocks)) if condition.beside_text else ():
            yield block.get_submodule(places.text), text(layer)


class ViewedDenoiser(ConditionedDenoiser):
    """One that is also told cameras, and shown a rendering from there; text is told to the target's tokens alone."""

    condition: ViewCondition

    def __init__(self, denoiser: nn.Module, condition: ViewCondition) -> None:
        super().__init__(denoiser, condition)
        if not self._places.own:
            raise UserError("cameras are told to a denoiser of videos: give a WanTransformer3DModel")

    def forward(
        self, target: Tensor, source: Tensor, timestep: Tensor, cameras: Tensor | None = None,
        render: Tensor | None = None, **given: Any,
    ) -> Tensor:  # fmt: skip
        """What the denoiser predicts of ``target``, knowing ``source``, the cameras and the rendering.

        Args:
            target: noisy latents ``[B, C, F, H, W]``.
            source: clean latents.
            timestep: ``[B]`` or a scalar.
            cameras: ``[B, F', 3, 4]`` or ``[B, F', 4, 4]``, a camera for each frame of tokens, from the world of the
                source's first camera into its own.
            render: clean latents ``[B, C, F, h, w]`` of what is known to be seen from there, smaller; None for none.
            given: further inputs of the denoiser.
        """
        frames, model = self._grid(target)[0], unwrapped(self.denoiser)
        if cameras is None or cameras.shape[:2] != (len(target), frames) or cameras.shape[2:] not in ((3, 4), (4, 4)):
            found = "none are given" if cameras is None else f"they are {list(cameras.shape)}"
            raise UserError(f"cameras are [{len(target)}, {frames}, 3, 4], one for each frame of tokens; {found}")
        if render is not None:
            small, sides = self._grid(render), self._grid(target)
            fits = all(1 <= few <= size for few, size in zip(small, sides, strict=True))
            if not fits or render.shape[:3] != target.shape[:3]:
                raise UserError(f"a rendering has the target's frames and is no larger, not {list(render.shape)}")
        if getattr(model, "gradient_checkpointing", False) and self.training:
            raise UserError("a rendering passes through blocks once: turn gradient checkpointing off")
        render, seen = render if self.condition.rendered else None, dict[str, Any]()
        poses = self.condition.poses(cameras[:, :, :3].to(target.dtype))
        around = [*self._views(target, poses, render, seen), *self._around(source, seen)]
        return self._predicted(target, source, timestep, given, around)

    def _views(
        self, target: Tensor, poses: Tensor, render: Tensor | None, seen: dict[str, Any]
    ) -> "Iterator[Around]":  # fmt: skip
        """What is around which module beside the source; ``aside`` has something while the rendering passes alone."""
        condition, model, places, grid = self.condition, unwrapped(self.denoiser), self._places, self._grid(target)
        count, aside = torch.Size(grid).numel(), dict[str, Any]()

        def embed(inner: Callable[..., Tensor], latents: Tensor) -> Tensor:
            if render is not None and "render" not in seen:
                seen["render"] = inner(render).flatten(2).transpose(1, 2)
            return inner(latents)

        def block(inner: Callable[..., Tensor], hidden: Tensor, text: Tensor, time: Tensor, rotary: Rotary) -> Tensor:
            if render is None:
                return inner(hidden, text, time, rotary)
            own = condition.placed(seen["rotary"], grid, self._grid(render))
            aside["rotary"] = own
            after = inner(seen["render"], text, time, own)
            seen["shown"] = Stream(aside.pop("read"), aside.pop("rotary"))
            out = inner(hidden, text, time, rotary)
            seen["render"] = after
            return out

        def attention(layer: int) -> Callable[..., Tensor]:
            def around(inner: Callable[..., Tensor], hidden: Tensor, *more: Any, **named: Any) -> Tensor:
                if "rotary" in aside:
                    aside["read"] = hidden
                    return inner(hidden, *more, **named)
                return inner(condition.read(layer, hidden, poses), *more, **named)

            return around

        def text(layer: int) -> Callable[..., Tensor]:
            def around(inner: Callable[..., Tensor], hidden: Tensor, *more: Any, **named: Any) -> Tensor:
                if "rotary" in aside:
                    return torch.zeros_like(hidden)
                own = hidden[:, :count]
                out = inner(own, *more, **named)
                view = condition.viewed(layer, Stream(own, seen["rotary"]), poses, seen.get("shown"))
                return torch.cat([out if view is None else out + view, torch.zeros_like(hidden[:, count:])], 1)

            return around

        yield model.get_submodule(places.embed), embed
        for layer, each in enumerate(getattr(model, places.blocks)):
            yield each, block
            yield each.get_submodule(places.own), attention(layer)
            yield each.get_submodule(places.text), text(layer)
