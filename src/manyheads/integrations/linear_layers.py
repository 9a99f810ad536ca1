# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a model's blocks whose computation a strategy replaces for as long as a port is open.

Chosen are the plain linear layers of the blocks that attention stands in: torch's, and GPT-2's transposed ones. Of an
adapter (peft) it is the layer below, so that the adapter goes on in full precision. A layer that is quantised or
offloaded already is refused: its weight is not there to be packed. The model keeps its own weights, which it is given
back at the end: this shows what a computation does to a model, and saves no memory of it.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..call import Site
from ..errors import UserError
from ..strategy import LinearCompute
from .blocks import block_of
from .weights import held_weight, input_width

__all__ = ["LinearLayers"]

_STATE = "_manyheads_linear"


class _Layer:
    """One linear layer whose forward is the strategy's."""

    def __init__(self, name: str, module: nn.Module, strategy: LinearCompute, weight: Tensor) -> None:
        self.name, self.module, self.strategy, self.called = name, module, strategy, False
        bias: Any = getattr(module, "bias", None)
        compute = strategy.linear(weight, bias, name)

        def forward(x: Tensor) -> Tensor:
            if not self.called:
                self.called = True
            return compute(x)

        module.__dict__[_STATE] = self
        module.__dict__["forward"] = forward

    def detach(self) -> None:
        del self.module.__dict__["forward"], self.module.__dict__[_STATE]


class LinearLayers:
    """The layers that one strategy computes in one model, from :meth:`attach` to :meth:`detach`."""

    def __init__(self, model: nn.Module, sites: Iterable[tuple[Site, nn.Module]], strategy: LinearCompute) -> None:
        self.strategy = strategy
        self._found = list(_chosen(model, sites, strategy))
        self.layers: list[_Layer] = []
        if not self._found:
            raise UserError(f"{strategy.spec} finds no linear layer to compute in {type(model).__name__}")

    def attach(self) -> None:
        """Replace the computation of every layer."""
        for name, module, weight in self._found:
            self.layers.append(_Layer(name, module, self.strategy, weight))
        self._found = []

    def detach(self) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            layer.detach()

    def check(self) -> None:
        """Raise UserError if no layer was called while attached; warn if some were not."""
        idle = [layer.name for layer in self.layers if not layer.called]
        if len(idle) == len(self.layers):
            raise UserError(
                f"{self.strategy.spec} selected {idle[0]}, and it was never called: the model did not run it in the "
                "block; narrow it with layers=..., or run the model"
            )
        if idle:
            warnings.warn(
                f"{self.strategy.spec} computed {len(self.layers) - len(idle)} of {len(self.layers)} linear layers; "
                f"the model did not run {', '.join(idle[:3])}{' and more' * (len(idle) > 3)}",
                stacklevel=4,
            )


def _chosen(
    model: nn.Module, sites: Iterable[tuple[Site, nn.Module]], strategy: LinearCompute
) -> Iterable[tuple[str, nn.Module, Tensor]]:
    """Names, modules and weights ``[N, K]`` of the layers that ``strategy`` selects."""
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[int] = set()
    for site, _ in sites:
        block = block_of(model, site.name)
        if block is None or id(block) in seen:
            continue
        seen.add(id(block))
        for path, module in _linear(block):
            name = f"{names[id(block)]}.{path}"
            if not strategy.selects_linear(name, site.layer):
                continue
            if (other := module.__dict__.get(_STATE)) is not None:
                raise UserError(f"{other.strategy.spec} and {strategy.spec} cannot hold together: each computes {name}")
            weight = held_weight(module)
            if weight is None:
                raise UserError(
                    f"{strategy.spec} computes linear layers from their weights, and that of {name} "
                    f"({type(module).__name__}) is quantised or offloaded already: load the model whole, without "
                    "quantisation"
                )
            yield name, module, weight
        experts = [path for path, parameter in block.named_parameters() if parameter.ndim == 3 and "expert" in path]
        if experts:
            warnings.warn(
                f"{strategy.spec} leaves {names[id(block)]}.{experts[0]} and the like as they are: experts in one "
                "tensor are no linear layers",
                stacklevel=6,
            )


def _linear(block: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Linear layers of a block by their paths; of an adapter the one below; no routers.

    A layer that says how many channels it takes counts, whatever it is made of.
    """
    inside: list[str] = []
    for path, module in block.named_modules():
        last = path.rpartition(".")[2]
        if input_width(module) is None or last in ("gate", "router"):
            continue
        if any(path.startswith(f"{outer}.") for outer in inside) and last != "base_layer":
            continue
        inside.append(path)
        if not hasattr(module, "base_layer"):
            yield path, module
