# SPDX-License-Identifier: Apache-2.0
"""What lies around an attention module: its block, the residual stream in and after it, and the output projection."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Site
from ..errors import UserError
from ..strategy import AttentionWatch, BlockParts, MidBlock, Residual, Strategy
from .weights import input_width, weight_of

__all__ = ["add_in_blocks", "block_of", "output_of", "output_path", "watch_blocks"]

_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "out_lin", "o", "dense")  # beside q, k and v
_BEHIND = ("output.dense",)  # beside the attention module itself (BERT)
_NORMED = ("pre_feedforward_layernorm", "post_feedforward_layernorm")  # attention's output has a norm too, called
_NORM = "post_attention_layernorm"

_Asking = tuple[Site, Any, Residual]


def block_of(model: nn.Module, name: str) -> nn.Module | None:
    """The block of the attention module called ``name``: an element of the outermost list of modules on the way to it.

    None where there is no such list.
    """
    here: nn.Module = model
    for part in name.split("."):
        inside = isinstance(here, nn.ModuleList)
        here = here.get_submodule(part)
        if inside:
            return here
    return None


def output_of(model: nn.Module, name: str) -> Callable[[], Tensor] | None:
    """Gives the weight ``[D, H * dv]`` by which the attention module called ``name`` mixes its heads; None if unknown.

    Known by its name beside q, k and v; adapted, quantised and offloaded layers count with what they do, see
    :mod:`.weights`. The model is held weakly.
    """
    path = output_path(model, name)
    return None if path is None else weight_of(model, path)


def output_path(model: nn.Module, name: str) -> str | None:
    """The path of that layer."""
    parent = name.rpartition(".")[0]
    paths = [f"{name}.{last}" for last in _PROJECTIONS] + [f"{parent}.{last}" if parent else last for last in _BEHIND]
    for path in paths:
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            continue
        if input_width(layer) is not None:
            return path
    return None


def watch_blocks(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, Any]]) -> Callable[[], None]:
    """Give the outputs of blocks to the strategies that ask for them, in order; the returned function undoes it."""
    at: dict[int, tuple[nn.Module, list[_Asking]]] = {}
    for site, _, entry in entries:
        if not isinstance(entry.strategy, Residual) or not entry.strategy.reads_residual:
            continue
        block = block_of(model, site.name)
        if block is None:
            continue
        _, asking = at.setdefault(id(block), (block, []))
        if all(other is not entry.strategy for _, _, other in asking):  # once, however many sites the block has
            asking.append((site, entry, entry.strategy))
    said: set[str] = set()
    names = {id(module): name for name, module in model.named_modules()}
    handles = [
        handle for block, asking in at.values() for handle in _Block(names[id(block)], asking, said).hooks(block)
    ]

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


class _Block:
    """What is read of one block while it runs."""

    def __init__(self, name: str, asking: Sequence[_Asking], said: set[str]) -> None:
        self.name, self.asking, self.said = name, asking, said
        self.before: Tensor | None = None
        self.parts: dict[str, Tensor] = {}

    def hooks(self, block: nn.Module) -> list[Any]:
        """Put hooks on ``block``, and on its children where a strategy reads them."""
        handles: list[Any] = []
        if any(isinstance(s, BlockParts) and s.reads_parts for _, _, s in self.asking):
            handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
            for name, child in block.named_children():
                handles.append(child.register_forward_hook(self._keep(f"{self.name}.{name}")))
        return [*handles, block.register_forward_hook(self._leave)]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before, self.parts = _stream(args, kwargs), {}

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            given = output[0] if isinstance(output, tuple) else output
            if self.before is not None and isinstance(given, Tensor) and given.shape == self.before.shape:
                self.parts[name] = given

        return hook

    def _refuse(self, hidden: Any) -> None:
        """Say that the block's output is no residual stream ``[B, T, D]``: Gemma 3n, for one, carries several."""
        shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        what = f"{self.name} gives {shape}, no residual stream [batch, tokens, channels]"
        for _, _, strategy in self.asking:
            if not isinstance(strategy, AttentionWatch):
                raise UserError(f"{strategy.spec} acts on the residual stream, and {what}")
        if not self.said:
            warnings.warn(f"{what}: {self.asking[0][2].spec} looks at attention alone there", stacklevel=2)
            self.said.add(self.name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = given = output[0] if isinstance(output, tuple) else output
        before, parts = self.before, self.parts
        self.before, self.parts = None, {}
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            self._refuse(hidden)
            return None
        for site, entry, strategy in self.asking:
            if before is not None and isinstance(strategy, BlockParts) and before.shape == hidden.shape:
                strategy.parts(site, before, parts, hidden, entry.current)
            hidden = strategy.residual(site, hidden, entry.current)
        if hidden is given:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first ``[B, T, D]`` that a module is given."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 3), None)


def add_in_blocks(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, Any]]) -> Callable[[], None]:
    """Have the strategies that ask for it add to the stream between attention and feed-forward; returns what undoes it.

    What they add goes into what attention writes to the stream. That this reaches the feed-forward part as meant is
    looked at in the first forward.

    Raises:
        UserError: attention stands in no block.
    """
    handles: list[Any] = []
    for site, module, entry in entries:
        if not isinstance(entry.strategy, MidBlock):
            continue
        block = block_of(model, site.name)
        if block is None:
            raise UserError(f"{entry.strategy.spec} acts within a block, and {site.name} stands in none")
        handles += _Middle(site, entry, entry.strategy).hooks(block, module)

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


class _Middle:
    """What one strategy adds within one block."""

    def __init__(self, site: Site, entry: Any, strategy: MidBlock) -> None:
        self.site, self.entry, self.strategy = site, entry, strategy
        self.before: Tensor | None = None
        self.wanted: Tensor | None = None  # what the feed-forward part, or its norm, should be given
        self.checked = False

    def hooks(self, block: nn.Module, attention: nn.Module) -> list[Any]:
        children = dict(block.named_children())
        writer = children[_NORM] if _NORM in children and children.keys() & set(_NORMED) else attention
        others = (child for child in children.values() if child is not writer)
        return [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            writer.register_forward_hook(self._write),
            *(child.register_forward_pre_hook(self._look, with_kwargs=True) for child in others),
            block.register_forward_hook(self._leave),
        ]

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before = _stream(args, kwargs)

    def _write(self, module: nn.Module, args: Any, output: Any) -> Any:
        given = output[0] if isinstance(output, tuple) else output
        if self.before is None or not isinstance(given, Tensor) or given.shape != self.before.shape:
            raise _no_middle(self.strategy, self.site)
        given = given + self.strategy.added(self.site, self.before + given, self.entry.current)
        if not self.checked:
            self.wanted = (self.before + given).detach()
        return (given, *output[1:]) if isinstance(output, tuple) else given

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.wanted is not None:
            seen = _stream(args, kwargs)
            if seen is not None and torch.equal(seen, self.wanted):
                self.checked, self.wanted = True, None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.before = self.wanted = None
        if not self.checked:
            raise _no_middle(self.strategy, self.site)


def _no_middle(strategy: Strategy, site: Site) -> UserError:
    return UserError(
        f"{strategy.spec} acts between attention and feed-forward, and the block of {site.name} does not compute the "
        "one after the other on one stream; use a model as Llama"
    )
