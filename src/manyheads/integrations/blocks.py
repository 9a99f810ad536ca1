# SPDX-License-Identifier: Apache-2.0
"""What lies around an attention module: the block whose output is the residual stream, and the output projection."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..call import Site
from ..strategy import Residual
from .weights import input_width, weight_of

__all__ = ["block_of", "output_of", "watch_blocks"]

_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "out_lin", "o", "dense")  # beside q, k and v
_BEHIND = ("output.dense",)  # beside the attention module itself (BERT)

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
    :mod:`.weights`. The layer is held weakly.
    """
    parent = name.rpartition(".")[0]
    paths = [f"{name}.{last}" for last in _PROJECTIONS] + [f"{parent}.{last}" if parent else last for last in _BEHIND]
    for path in paths:
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            continue
        if input_width(layer) is not None:
            return weight_of(layer, path, model)
    return None


def watch_blocks(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, Any]]) -> Callable[[], None]:
    """Give the outputs of blocks to the strategies that ask for them, in order; the returned function undoes it."""
    at: dict[int, tuple[nn.Module, list[_Asking]]] = {}
    for site, _, entry in entries:
        if not isinstance(entry.strategy, Residual):
            continue
        block = block_of(model, site.name)
        if block is None:
            continue
        _, asking = at.setdefault(id(block), (block, []))
        if all(other is not entry.strategy for _, _, other in asking):  # once, however many sites the block has
            asking.append((site, entry, entry.strategy))
    handles = [block.register_forward_hook(_hook(asking)) for block, asking in at.values()]

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


def _hook(asking: Sequence[_Asking]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = given = output[0] if isinstance(output, tuple) else output
        for site, entry, strategy in asking:
            hidden = strategy.residual(site, hidden, entry.current)
        if hidden is given:
            return None
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook
