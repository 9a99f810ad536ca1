# SPDX-License-Identifier: Apache-2.0
"""A model of transformers as conversions see it: its axis map, the shapes of its layers, and their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import LayerShape, SurgeryPlan
from ..errors import UserError
from .architectures import Family, families_of
from .plan_size import count, turned

__all__ = ["ModelAnatomy", "shared_copy", "turned"]

_QKV = ("q", "k", "v")


def shared_copy(model: Any, apart: bool = False) -> Any:
    """A copy of the modules and of the config whose parameters and buffers are the model's own.

    With ``apart`` its parameters are others, which may have gradients, over the same numbers.
    """
    parameters = {id(p): nn.Parameter(p.detach()) if apart else p for p in model.parameters()}
    made: Any = copy.deepcopy(model, {**parameters, **{id(x): x for x in model.buffers()}})
    return made


class ModelAnatomy:
    """See :class:`manyheads.conversion.Anatomy`.

    Args:
        model: a model of transformers, of a known family.

    Raises:
        UserError: it is of no known family, or has parameters that its axis map does not know.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        families = families_of(model.config.model_type)
        prefix = model.base_model_prefix
        self.prefix = f"{prefix}." if hasattr(model, prefix) else ""
        for known in families:
            self.map: Family = known
            unknown = [name for name, parameter in self.named_parameters() if self.axes(name, parameter) is None]
            if not unknown:
                break
        else:
            raise UserError(
                f"{type(model).__name__} has parameters that are not known of {self.map.name}: {', '.join(unknown[:3])}"
            )

    @property
    def family(self) -> str:
        return self.map.name

    @property
    def causal(self) -> bool:
        return self.map.causal and self.model.get_output_embeddings() is not None

    @property
    def width(self) -> int:
        return int(getattr(self.config, self.map.fields["width"]))

    @property
    def tied(self) -> bool:
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks."""
        found = self.model.get_submodule(self.prefix + self.map.layers)
        assert isinstance(found, nn.ModuleList)
        return found

    @cached_property
    def layers(self) -> tuple[LayerShape, ...]:
        heads = int(getattr(self.config, self.map.fields["heads"]))
        kv_heads = int(getattr(self.config, self.map.fields.get("kv_heads", ""), None) or heads)
        shapes = []
        for i in range(len(self.blocks)):
            down, o = self.weight("down", i), self.weight("o", i)
            if o.shape[1] % heads:
                raise UserError(f"layer {i} has not the {heads} heads that the config says: convert the model before")
            shapes.append(LayerShape(heads, kv_heads, o.shape[1] // heads, down.shape[1]))
        return tuple(shapes)

    def has(self, part: str) -> bool:
        return part in self.map.parts or (part in _QKV and "qkv" in self.map.parts)

    def linear(self, part: str, layer: int) -> nn.Module:
        """The linear layer of a part, fused or not; see :meth:`part`."""
        return self.blocks[layer].get_submodule(self.part(part))

    def part(self, name: str) -> str:
        """Where in a block a linear layer, or ``attention`` or ``mlp``, stands.

        Raises:
            UserError: the family has none of that name.
        """
        known = {**self.map.modules, **self.map.parts}
        if name not in known:
            raise UserError(f"{self.family} has no layer {name} of its own: there are {', '.join(known)}")
        return known[name]

    @property
    def middle(self) -> str:
        """Where in a block the norm stands that its feed-forward part reads through.

        Raises:
            UserError: there is none: the family normalises what parts write.
        """
        norms = [path for path, how in self.map.off["mlp"].items() if how == "same"]
        if not norms:
            raise UserError(f"parts of {self.family} do not read a stream through norms: score whole blocks instead")
        return norms[0]

    def weight(self, part: str, layer: int | None = None) -> Tensor:
        found = self._tensor(part, layer, "weight")
        assert found is not None
        return found

    def bias(self, part: str, layer: int) -> Tensor | None:
        return self._tensor(part, layer, "bias")

    def _tensor(self, part: str, layer: int | None, kind: str) -> Tensor | None:
        if layer is None:
            place = self.model.get_input_embeddings() if part == "embedding" else self.model.get_output_embeddings()
            whole: Tensor = getattr(place, kind)
            return whole.detach()
        fused = part in _QKV and "qkv" in self.map.parts
        module: Any = self.linear("qkv" if fused else part, layer)
        held: Tensor | None = getattr(module, kind, None)
        if held is None:
            return None
        held = held.detach().mT if turned(module) and held.ndim == 2 else held.detach()
        return held.chunk(3)[_QKV.index(part)] if fused else held

    def predicted(self, states: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        with torch.no_grad():
            last = self.model.get_submodule(self.prefix + self.map.norms[-1])(states.to(weight))
            logits: Tensor = self.model.get_output_embeddings()(last)
        return logits

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by all their names, tied ones under each."""
        yield from self.model.named_parameters(remove_duplicate=False)

    def axes(self, name: str, parameter: Tensor) -> tuple[str, ...] | None:
        """The axis of each dimension of a parameter, None where it is not known."""
        axes = self.map.axes_of(name.removeprefix(self.prefix))
        return axes if axes is not None and len(axes) == parameter.ndim else None

    def layer_of(self, name: str) -> int | None:
        """The block that a parameter stands in."""
        inside = name.removeprefix(f"{self.prefix}{self.map.layers}.")
        return int(inside.split(".")[0]) if inside != name else None

    @cached_property
    def sizes(self) -> list[tuple[str, tuple[str, ...], int | None, torch.Size]]:
        """Name, axes, layer and shape of every parameter, tied ones once."""
        named = self.model.named_parameters()
        return [(name, self.axes(name, p) or (), self.layer_of(name), p.shape) for name, p in named]

    def parameters(self, plan: SurgeryPlan | None = None) -> int:
        return count(self, plan or SurgeryPlan(()))
