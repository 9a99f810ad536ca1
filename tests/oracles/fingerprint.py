# SPDX-License-Identifier: Apache-2.0
"""All that a strategy could leave behind: in a model, in torch, in transformers."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

OURS = {"manyheads", "manyheads_eager"}


def _value(value: Any) -> Any:
    """Contents of containers, identity of everything else."""
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_value(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def _registry(interface: Any) -> dict[str, int]:
    return {name: id(function) for name, function in interface.items() if name not in OURS}


def of_libraries() -> dict[str, Any]:
    """Objects of torch and transformers that attention libraries like to replace."""
    hooks = {
        name: _value(value) for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_")
    }
    return {
        "attention": _registry(ALL_ATTENTION_FUNCTIONS),
        "masks": _registry(ALL_MASK_ATTENTION_FUNCTIONS),
        "classes": [
            id(v) for c in (AttentionInterface, AttentionMaskInterface) for k, v in vars(c).items() if callable(v)
        ],
        "hooks": hooks,
        "sdpa": id(torch.nn.functional.scaled_dot_product_attention),
        "call": id(nn.Module.__call__),
        "grad": torch.is_grad_enabled(),
    }


def of_model(model: nn.Module) -> dict[str, Any]:
    """Module tree, attributes, hooks of all kinds, parameters, buffers, flags, and configs by identity and content."""
    found: dict[str, Any] = {"libraries": of_libraries()}
    for name, module in model.named_modules():
        found[name] = {
            "type": id(type(module)),
            "attributes": {key: _value(value) for key, value in vars(module).items()},  # hooks and children are there
            "order": list(vars(module)),
            "config": _config(getattr(module, "config", None)),
        }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found["tensor " + name] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad)
    if hasattr(model, "generation_config"):
        found["generation"] = (id(model.generation_config), repr(model.generation_config))
    return found


def _config(config: Any) -> Any:
    if config is None or isinstance(config, dict):
        return None
    nested = {k: _config(v) for k, v in vars(config).items() if hasattr(v, "to_dict")}
    return id(config), config._attn_implementation, repr(sorted(vars(config))), repr(config.to_dict()), nested


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert list(now) == list(before), f"modules or tensors differ: {set(now) ^ set(before)}"
    for name, value in before.items():
        if not isinstance(value, dict):
            assert now[name] == value, f"{name}: {value} became {now[name]}"
            continue
        for key, item in value.items():
            assert now[name][key] == item, f"{name or 'the model'}: {key}: {item} became {now[name][key]}"
