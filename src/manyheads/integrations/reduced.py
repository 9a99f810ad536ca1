# SPDX-License-Identifier: Apache-2.0
"""Models that work on fewer tokens (``reducing.Reducer``): where their tokens stand, and their stream between blocks.

Strategies around one attention act through the port as any other; this module tells them the layout of the tokens. A
model's grid is that of its pixels and patches, or what its blocks are given as height and width. For strategies in the
stream it stands behind the blocks: hidden states become fewer at their outputs, and as many again at the end.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..call import Site
from ..errors import UserError
from ..reducing import Layout, Reducer, Reduction, StreamReducer
from .forwards import owner_of

__all__ = ["reduce_tokens"]

_STAGE = re.compile(r"(.*?\bstages?)\.(\d+)\.")
_Entry = tuple[Site, nn.Module, Any]


def reduce_tokens(model: nn.Module, entries: Sequence[_Entry]) -> Callable[[], None]:
    """Tell reducers among ``entries`` the layout of their tokens, and reduce the stream; returns what undoes it.

    Raises:
        UserError: two strategies reduce the stream, or one does where blocks need a grid.
    """
    reducing = [entry for entry in entries if isinstance(entry[2].strategy, Reducer)]
    stages: dict[tuple[int, str], _Stage] = {}
    streams: dict[int, _Stream] = {}
    handles: list[Any] = []

    def restore() -> None:
        for handle in handles:
            handle.remove()

    try:
        for site, module, entry in reducing:
            owner = _reads_pixels(model, site) or owner_of(model, site)
            found = _STAGE.match(f"{site.name}.")
            key = id(owner), found.group(0) if found else ""
            if key not in stages:
                stages[key] = _Stage(model, owner, module, found)
                handles += stages[key].hooks(owner)
            stage = stages[key]
            entry.state["layout"] = stage.layout
            handles.append(module.register_forward_pre_hook(stage.look, with_kwargs=True))
            if isinstance(entry.strategy, StreamReducer):
                handles += _in_stream(model, site, entry.strategy, stage, streams)
    except UserError:  # a strategy that is refused leaves no hook
        restore()
        raise
    return restore


def _in_stream(
    model: nn.Module, site: Site, strategy: StreamReducer, stage: "_Stage", streams: "dict[int, _Stream]"
) -> list[Any]:
    """Hooks on the list of blocks that ``site`` is in, where it has none yet."""
    blocks = _blocks_around(model, site.name)
    if blocks is None or stage.told:
        raise UserError(
            f"{strategy.spec} shortens what blocks give each other, and those of {type(model).__name__} need every "
            "token in its place; use a strategy that reduces around attention"
        )
    stream = streams.setdefault(id(blocks), _Stream(strategy, stage, len(blocks)))
    if stream.strategy is not strategy:
        raise UserError(f"{stream.strategy.spec} and {strategy.spec} cannot hold together: each shortens the stream")
    if stream.hooked:
        return []
    stream.hooked = True
    stage.streams.append(stream)
    return [
        handle
        for number, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(stream.entering, with_kwargs=True),
            block.register_forward_hook(stream.leaving(number)),
        )
    ]


class _Stage:
    """The layout of the tokens of one stage, from forward to forward."""

    def __init__(self, model: nn.Module, owner: nn.Module, module: nn.Module, found: re.Match[str] | None) -> None:
        self.layout = Layout(stride=int(getattr(module, "sequence_reduction_ratio", 1)))
        if found is not None:
            stages: Any = model.get_submodule(found.group(1))
            self.layout.stage, self.layout.stages = int(found.group(2)), len(stages)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.told = "height" in names and "width" in names  # where the tokens stand, at every call
        self.names = names
        self.patch, self.depth = _patch(getattr(owner, "config", None))
        self.streams: list[_Stream] = []

    def hooks(self, owner: nn.Module) -> list[Any]:
        return [
            owner.register_forward_pre_hook(self._begin, with_kwargs=True),
            owner.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end()
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        if self.patch is not None and isinstance(pixels, Tensor) and pixels.ndim in (4, 5):
            frames = pixels.shape[1] // self.depth if pixels.ndim == 5 else 1
            height, width = (side // size for side, size in zip(pixels.shape[-2:], self.patch, strict=True))
            self.layout.grid, self.layout.frames = (frames * height, width), frames

    def _end(self, *_: Any) -> None:
        self.layout.clear()
        for stream in self.streams:
            stream.taken.clear()

    def look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an attention: the height and width that it is told, or what of its tokens is no patch."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        hidden, layout = given.get("hidden_states", args[0] if args else None), self.layout
        if self.told:
            layout.grid = int(given["height"]), int(given["width"])
        if layout.grid is None or not isinstance(hidden, Tensor) or layout.size is not None:
            return
        layout.prefix = hidden.shape[1] - layout.grid[0] * layout.grid[1]
        if layout.prefix < 0:
            layout.grid, layout.prefix = None, 0


class _Stream:
    """The stream through one list of blocks."""

    def __init__(self, strategy: StreamReducer, stage: _Stage, blocks: int) -> None:
        self.strategy, self.layout, self.blocks, self.hooked = strategy, stage.layout, blocks, False
        self.taken: list[tuple[Reduction, int, tuple[int, int] | None, Tensor | None]] = []

    def entering(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what a block is given for each of the tokens that are no longer there."""
        if not self.taken:
            return
        whole = self.taken[0][1]
        for x in _tensors([*args[1:], *kwargs.values()]):
            if whole in x.shape and x.shape[1] != self.taken[-1][1]:
                raise UserError(
                    f"{self.strategy.spec} shortens the stream, and {type(block).__name__} is given {list(x.shape)} "
                    f"for its {whole} tokens (a mask, positions): leave padding away, or use another model"
                )

    def leaving(self, number: int) -> Callable[[nn.Module, Any, Any], Any]:
        """The hook behind the block of that number."""

        def hook(block: nn.Module, args: Any, output: Any) -> Any:
            hidden = given = output[0] if isinstance(output, tuple) else output
            if self.strategy.restores_at(number, self.blocks):
                hidden = self._restored(hidden)
            if self.strategy.reduces_at(number, self.blocks):
                hidden = self._reduced(hidden, number)
            if hidden is given:
                return None
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _reduced(self, hidden: Tensor, number: int) -> Tensor:
        layout = self.layout
        layout.block = number
        reduction = self.strategy.reduce(hidden, layout)
        if reduction is None:
            return hidden
        self.taken.append((reduction, hidden.shape[1], layout.grid, layout.size))
        layout.grid, layout.size = reduction.grid, reduction.size
        layout.keys = None
        return reduction.merge(hidden)

    def _restored(self, hidden: Tensor) -> Tensor:
        while self.taken:
            reduction, _, self.layout.grid, self.layout.size = self.taken.pop()
            hidden = reduction.restore(hidden)
        return hidden


def _blocks_around(model: nn.Module, name: str) -> nn.ModuleList | None:
    """The outermost list of modules on the way to the module called ``name``."""
    here: nn.Module = model
    for part in name.split("."):
        if isinstance(here, nn.ModuleList):
            return here
        here = here.get_submodule(part)
    return None


def _reads_pixels(model: nn.Module, site: Site) -> nn.Module | None:
    """The innermost module around ``site`` that is given pixels and has patches of one size."""
    parts = site.name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if "pixel_values" in inspect.signature(type(module).forward).parameters:
            return module
    return None


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width of a patch as a config says it, None where it does not."""
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _patch(config: Any) -> tuple[tuple[int, int] | None, int]:
    """Height and width of a patch as a config says it, None where it does not; and its frames, 1 of an image."""
    patch, tubelet = getattr(config, "patch_size", None), getattr(config, "tubelet_size", 1)
    if isinstance(tubelet, (list, tuple)):  # ViViT: frames, height, width
        patch, tubelet = tubelet[1:], tubelet[0]
    return _pair(patch), int(tubelet)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Tensors among values and in tuples among them."""
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in flat if isinstance(x, Tensor)]
