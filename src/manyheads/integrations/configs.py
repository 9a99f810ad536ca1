# SPDX-License-Identifier: Apache-2.0
"""Replacing the configs of a model by copies that name our attention functions, and putting the originals back."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["EAGER", "OWN", "SDPA", "implementation_of", "switch_configs"]

SDPA, EAGER, OWN = "manyheads", "manyheads_eager", "manyheads_own_"  # of the user's own: OWN and its name
_KEPT = "_manyheads_config"  # on a module: [original config, number of open ports]


def implementation_of(module: nn.Module) -> str | None:
    """The attention implementation that the user asked for at ``module``, also while a port is open."""
    kept = module.__dict__.get(_KEPT)
    config = getattr(module, "config", None) if kept is None else kept[0]
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def switch_configs(model: nn.Module, own: frozenset[str] = frozenset()) -> Callable[[], None]:
    """Point every module of ``model`` at our attention functions; the returned function restores them.

    ``own`` names the implementations that are functions of the user's own; others become ``SDPA`` or ``EAGER``.

    Each distinct config is deep-copied once, nested ones with it, so the links between configs stay as they were.
    Ports may close in any order: the originals come back with the last one.
    """
    holders = [m for m in model.modules() if isinstance(m.__dict__.get("config"), PreTrainedConfig)]
    lacks_sdpa = {id(m.config) for m in holders if isinstance(m, PreTrainedModel) and not m._supports_sdpa}
    memo: dict[int, Any] = {}
    for module in holders:
        kept = module.__dict__.get(_KEPT)
        if kept is not None:
            kept[1] += 1
            continue
        original = module.__dict__["config"]
        clone = copy.deepcopy(original, memo)
        name = clone._attn_implementation
        if name in own:
            clone._attn_implementation_internal = OWN + name
        elif name not in (SDPA, EAGER, *(OWN + each for each in own)):  # several modules share one clone
            eager = name in ("eager", None) or id(original) in lacks_sdpa
            clone._attn_implementation_internal = EAGER if eager else SDPA
        module.__dict__[_KEPT] = [original, 1]
        module.__dict__["config"] = clone

    def restore() -> None:
        for module in holders:
            kept = module.__dict__[_KEPT]
            kept[1] -= 1
            if kept[1] == 0:
                module.__dict__["config"] = kept[0]
                del module.__dict__[_KEPT]

    return restore
