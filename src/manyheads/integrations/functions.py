# SPDX-License-Identifier: Apache-2.0
"""The attention function that computes at a module: transformers' own, or one that the user has registered."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..errors import UserError
from .configs import OWN, implementation_of
from .masks import own_mask

__all__ = ["base_function", "own_function", "register_own"]

_DISPATCHER = "ALL_ATTENTION_FUNCTIONS"


def base_function(module: nn.Module, eager: bool) -> tuple[str | None, Callable[..., Any]]:
    """The attention function that computes at ``module``, and its name if it is the user's own."""
    name = own_function(module)
    scope = inspect.unwrap(type(module).forward).__globals__
    if name is not None:
        return name, scope[_DISPATCHER][name]
    if not eager:
        return None, sdpa_attention_forward
    if "eager_attention_forward" not in scope or getattr(module, "reorder_and_upcast_attn", False):
        raise UserError(
            f"{type(module).__name__} computes eager attention in its own way, which the port cannot call; "
            'load the model with attn_implementation="sdpa"'
        )
    return None, scope["eager_attention_forward"]


def own_function(module: nn.Module) -> str | None:
    """Name of the attention function that computes at ``module``, if it is not one of transformers or its kernels."""
    name = implementation_of(module)
    table = inspect.unwrap(type(module).forward).__globals__.get(_DISPATCHER, {})
    if name is None or name not in table or "/" in name or "|" in name:
        return None
    function = table[name]
    function = getattr(function, "func", function)  # a partial
    home = getattr(function, "__module__", None) or type(function).__module__
    return None if home.partition(".")[0] in ("transformers", "manyheads") else name


def register_own(modules: Iterable[nn.Module], attention: Callable[..., Any]) -> frozenset[str]:
    """Register ``attention`` for the user's own functions at ``modules``, each with the mask function of its name.

    Returns the names of those functions. One without a mask function gets no mask, as without a port.
    """
    names = frozenset(name for module in modules if (name := own_function(module)) is not None)
    for name in names:
        AttentionInterface.register(OWN + name, attention)
        build = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
        if build is None:
            AttentionMaskInterface._global_mapping.pop(OWN + name, None)
        else:
            AttentionMaskInterface.register(OWN + name, own_mask(build))
    return names
