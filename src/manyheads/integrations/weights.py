# SPDX-License-Identifier: Apache-2.0
"""The matrix that a linear layer multiplies by, whatever it is made of.

What a layer multiplies by need not stand in its ``weight``: an adapter adds to it (peft), quantised layers keep codes,
offloaded ones a tensor on ``meta`` (accelerate). So it is not looked up: the layer is asked, by what it gives for the
unit vectors, less what it gives for zero. A plain layer that holds its weight is read directly.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["effective_weight", "held_weight", "input_width", "weight_of"]

_ROWS = 1024  # unit vectors at a time
_LINEAR = 1e-2  # how far from linear a layer may be, for those that quantise what they are given


def input_width(layer: nn.Module) -> int | None:
    """Channels that a linear layer takes, None where it does not say; GPT-2's transposed layer calls them ``nx``."""
    for name in ("in_features", "nx"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    return None


def weight_of(model: nn.Module, path: str) -> Callable[[], Tensor]:
    """Gives the current :func:`effective_weight` of the layer ``path`` of ``model``, which it does not keep alive."""
    owner = weakref.ref(model)

    def weight() -> Tensor:
        here = owner()
        if here is None:
            raise RuntimeError(f"the model of {path} is gone")
        return effective_weight(here.get_submodule(path), path, _dtype(here))

    return weight


def effective_weight(layer: nn.Module, name: str = "layer", dtype: torch.dtype | None = None) -> Tensor:
    """The matrix ``W [out, in]`` of ``layer(x) = x W^T + b``: with adapters, dequantised, fetched where offloaded.

    Args:
        layer: a linear layer: torch's, GPT-2's transposed one, or what adapters and quantisation put in their place.
        name: of the layer, for errors.
        dtype: of inputs, where no parameter of the layer says it; torch's default where that is None.

    Returns:
        The weight itself where the layer is plain and holds it, else a tensor without gradients.

    Raises:
        UserError: the layer cannot be asked: its weights are nowhere, it raises, or it is not linear.
    """
    if (held := held_weight(layer)) is not None:
        return held
    width = input_width(layer)
    if width is None:
        raise UserError(f"{name}: {type(layer).__name__} does not say how many channels it takes (in_features)")
    like = next((p for p in layer.parameters() if p.is_floating_point() and p.device.type != "meta"), None)
    dtype = _dtype(layer) or dtype or torch.get_default_dtype()
    unit = torch.eye(width, dtype=dtype, device="cpu" if like is None else like.device)
    probe = torch.linspace(-1, 1, width, dtype=torch.float32, device=unit.device).cos()  # no particular direction
    with torch.no_grad(), _at_rest(layer):
        offset = _ask(layer, torch.zeros_like(unit[:1]), name)
        found = torch.cat([_ask(layer, rows, name) - offset for rows in unit.split(_ROWS)]).T
        given = (_ask(layer, probe.to(dtype)[None], name) - offset)[0].float()
    want = found.float() @ probe.to(dtype).to(found.device).float()
    if not (given - want).norm() <= _LINEAR * want.norm() + 1e-6:
        raise UserError(
            f"{name}: {type(layer).__name__} is no linear layer, so it has no weight by which heads are mixed"
        )
    return found


def held_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a layer that is nothing but its weight and bias, ``[out, in]``; None of any other."""
    turned = type(layer).__name__ == "Conv1D"
    if "forward" in vars(layer) or not (type(layer) is nn.Linear or turned):  # hooks of accelerate replace forward
        return None
    weight: Any = layer.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.device.type == "meta":
        return None
    held: Tensor = weight.T if turned else weight
    return held


def _dtype(module: nn.Module) -> torch.dtype | None:
    """What the floating parameters of ``module`` are kept in; those of 8 bits are codes."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() > 1), None)


def _ask(layer: nn.Module, x: Tensor, name: str) -> Tensor:
    """What ``layer`` gives for ``x``; by its ``forward``, so that hooks of others do not see the question."""
    absent = UserError(
        f"{name}: its weight is on the meta device and nothing loads it; load the model with its weights, or "
        "offload it with accelerate"
    )
    try:
        given: Any = layer.forward(x)
    except Exception as error:
        if any(parameter.device.type == "meta" for parameter in layer.parameters()):
            raise absent from error
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: the weight of {type(layer).__name__} cannot be had ({line}); merge adapters or load the model "
            "without quantisation"
        ) from error
    if not isinstance(given, Tensor) or given.device.type == "meta":
        raise absent
    return given


@contextmanager
def _at_rest(layer: nn.Module) -> Iterator[None]:
    """Adapters drop entries while they train; the weight has none of it."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
