# SPDX-License-Identifier: Apache-2.0
"""Caches on disk: one safetensors file holds every layer, its strategy and what the model was."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..call import Site
from ..errors import UserError
from ..spec import parse
from ..strategy import Cache as CacheKind
from .cache import SlotCache, StoreLayer, install
from .site_search import find_sites

__all__ = ["load_cache", "save_cache"]

_FORMAT = "manyheads-cache-1"


def save_cache(cache: Cache, path: str | Path) -> None:
    """Write a cache of ours, also one that ``generate`` has returned, as a safetensors file.

    The file holds what every layer remembers, the spec of its strategy, and the states of layers that are
    transformers' own. What :meth:`SlotCache.fork` needs is left out: a cache that was read back cannot be forked.

    Args:
        cache: with at least one layer of ours.
        path: of the file.

    Raises:
        UserError: no layer is ours, or a layer keeps something that is neither a tensor nor a plain value.
    """
    if type(cache) not in (SlotCache, DynamicCache):
        raise UserError(
            f"{type(cache).__name__} keeps more than its layers, and cannot be saved; use a decoder-only model"
        )
    if not any(isinstance(layer, StoreLayer) for layer in cache.layers):
        raise UserError("this cache has no layer of manyheads: keep it as transformers' caches are kept")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        about: dict[str, Any] = {"kind": type(layer).__name__}
        if isinstance(layer, StoreLayer):
            if (module := layer._module()) is None:
                raise UserError("this cache cannot be saved: the model it was made for is gone")
            about |= {"site": layer.site.name, "spec": layer.strategy.spec, "shape": _shape(layer.site, module)}
            about["store"] = _described(layer.store.state_dict(), f"{index}.store", tensors)
        about["fields"] = _described(_fields(layer), f"{index}.fields", tensors)
        layers.append(about)
    save_file(tensors, str(path), metadata={"format": _FORMAT, "layers": json.dumps(layers)})


def load_cache(path: str | Path, model: nn.Module, *strategies: CacheKind) -> SlotCache:
    """Read a cache that :func:`save_cache` wrote; pass it as ``past_key_values`` while the port of ``model`` is open.

    Args:
        path: of the file.
        model: the model that it was made with, or one of the same weights; tensors go to the devices of its layers.
        strategies: those of the cache, where its specs name none of the library's.

    Raises:
        UserError: the file is no cache of ours, or of another model.
    """
    known = {strategy.spec: strategy for strategy in strategies}
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        if about.get("format") != _FORMAT:
            raise UserError(f"{path} is not a cache that save_cache of this version wrote")
        layers = json.loads(about["layers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    config: Any = model.config
    cache = SlotCache(config=config)
    sites = {(site.name, site.layer): (site, module) for site, module in find_sites(model)}
    for index, described in enumerate(layers):
        place = model
        if "spec" in described:
            found = sites.get((described["site"], index))
            if found is None or _shape(*found) != described["shape"]:
                raise UserError(
                    f"{path} is a cache of another model than {type(model).__name__}: see {described['site']}"
                )
            strategy = known.get(described["spec"]) or parse(described["spec"])
            assert isinstance(strategy, CacheKind)
            install(cache, [found], strategy.store, strategy)
            place = found[1]
        if index >= len(cache.layers) or type(cache.layers[index]).__name__ != described["kind"]:
            raise UserError(
                f"{path}: layer {index} is a {described['kind']}, and {type(model).__name__} has no such layer"
            )
        layer: Any = cache.layers[index]
        device = next((p.device for p in place.parameters()), torch.device("cpu"))
        fields = _restored(described["fields"], tensors, device)
        vars(layer).update(fields)
        held = [x for x in (*fields.values(), *_inside(fields)) if isinstance(x, Tensor)]
        if isinstance(layer, StoreLayer):
            layer.store.load_state_dict(_restored(described["store"], tensors, device))
            layer.is_compileable = layer.store.fixed
        if held:
            layer.dtype, layer.device = held[0].dtype, held[0].device
    return cache


def _shape(site: Site, module: nn.Module) -> list[Any]:
    """What two models must have in common for one to read the cache of the other."""
    return [type(module).__name__, site.num_heads, site.num_kv_heads, getattr(module, "head_dim", None)]


def _fields(layer: Any) -> dict[str, Any]:
    """What a layer of a cache keeps itself, and not in a store of ours."""
    ours = ("store", "site", "strategy", "_module", "is_compileable", "is_sliding")
    left_out = (*ours, "dtype", "device") if isinstance(layer, StoreLayer) else ("dtype", "device")
    return {name: x for name, x in vars(layer).items() if name not in left_out}


def _inside(fields: dict[str, Any]) -> list[Any]:
    return [x for held in fields.values() if isinstance(held, dict) for x in held.values()]


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _described(x, f"{name}.{key}", tensors)] for key, x in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"the cache keeps {type(value).__name__} as {name}, which cannot be saved")


def _restored(value: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """The reverse of :func:`_described`."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to(device)
    return {key: _restored(x, tensors, device) for key, x in value["dict"]}
