# SPDX-License-Identifier: Apache-2.0
"""Replacing the configs of a model by copies that name our attention functions, and putting the originals back."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["EAGER", "SDPA", "switch_configs"]

SDPA, EAGER = "manyheads", "manyheads_eager"
_KEPT = "_manyheads_config"  # on a module: [original config, number of open ports]


def switch_configs(model: nn.Module) -> Callable[[], None]:
    """Point every module of ``model`` at our attention functions; the returned function restores them.

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
        if clone._attn_implementation not in (SDPA, EAGER):
            eager = clone._attn_implementation in ("eager", None) or id(original) in lacks_sdpa
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
