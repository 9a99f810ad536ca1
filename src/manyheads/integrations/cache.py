# SPDX-License-Identifier: Apache-2.0
"""A store of ours as a layer of transformers' cache: what the model and ``generate`` see of it."""

import copy
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..attention.padded import nbytes
from ..call import Site, Store
from ..errors import UserError
from ..strategy import Cache as CacheKind

__all__ = ["SlotCache", "StoreLayer", "install", "seen_by"]


class StoreLayer(CacheLayerMixin):
    """Adapter from :class:`manyheads.call.Store` to transformers' cache layer.

    It answers with the *logical* length, so positions, masks and ``generate`` go on as if nothing was dropped.
    """

    is_croppable = False
    supports_early_init = False

    def __init__(self, store: Store, site: Site, module: torch.nn.Module) -> None:
        self.store = store
        self.site = site
        self.is_compileable = store.fixed
        self.is_sliding = site.window is not None
        self._module = weakref.ref(module)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self.store.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self.store.values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        seen = self.store.seen
        return isinstance(seen, Tensor) or seen > 0  # only the device knows a number, once there is one

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store takes shape with its first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        module = self._module()
        if module is None or "_manyheads" not in module.__dict__:
            raise UserError(
                f"this cache drops tokens at {self.site.name} and needs its port: "
                "run the model inside `with manyheads.use(model):`"
            )
        return self.store.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return cast("int", self.store.seen)  # a tensor while only the device counts, as in transformers' static cache

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.get_seq_length()
        if self.site.window is None and self.is_initialized and self._whole:
            return query_length, seen  # the stores know what is visible of the past
        if self.site.window is None:
            return seen + query_length, 0
        reach = min(seen, self.site.window - 1)
        return reach + query_length, seen - reach

    @property
    def _whole(self) -> bool:
        """Whether all layers of the cache are stores that cover the past: the layers share one mask."""
        return sum(store.covers_past for store in self.store.group.values()) == len(self.site.peers) > 0

    def reset(self) -> None:
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.store.reorder(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        keys = self.store.keys
        if keys is not None:
            self.store.reorder(torch.arange(keys.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove")
        self.store.crop(-tokens_to_remove)

    def offload(self) -> None:
        raise UserError("a cache that drops tokens cannot be offloaded: turn offloading off")

    prefetch = offload


class SlotCache(DynamicCache):
    """A transformers cache whose layers are stores of ours; pass it as ``past_key_values`` while the port is open."""

    def fork(self, policy: CacheKind) -> "SlotCache":
        """The cache that ``policy`` would have after the same forwards; this one is unchanged and shares its tensors.

        Exact for strategies with ``dense_prefill``. A layer that ``policy`` does not select stays as it is. Layers that
        the port leaves to transformers, as the states of linear attention, are copied: they are written in place.
        Raises UserError when this cache dropped something or was made without ``record``.
        """
        twin = SlotCache()
        twin.layer_class_to_replicate = None
        group: dict[int, Store] = {}
        for layer in self.layers:
            if not isinstance(layer, StoreLayer):
                twin.layers.append(_copied(layer))
                continue
            if (module := layer._module()) is None:
                raise UserError("this cache cannot be forked: the model it was made for is gone")
            target = None
            if policy.selects(layer.site):
                target = _join(policy.store(layer.site), group)
            twin.layers.append(StoreLayer(layer.store.fork(target), layer.site, module))
        return twin

    def bytes(self) -> int:
        """Bytes really held by all layers: storages of keys, values, states and bookkeeping."""
        return sum(
            layer.store.nbytes() if isinstance(layer, StoreLayer) else nbytes(*_tensors(layer)) for layer in self.layers
        )


def _tensors(layer: Any) -> list[Tensor]:
    """What a layer of transformers' own keeps."""
    fields = [x for x in vars(layer).values() if not isinstance(x, dict)]
    fields += [x for held in vars(layer).values() if isinstance(held, dict) for x in held.values()]
    return [x for x in fields if isinstance(x, Tensor)]


def _copied(layer: Any) -> Any:
    """A layer of transformers' own that shares no tensor with ``layer``."""
    twin = copy.copy(layer)
    for name, x in vars(layer).items():
        if isinstance(x, Tensor):
            twin.__dict__[name] = x.clone()
        elif isinstance(x, dict):
            twin.__dict__[name] = {i: y.clone() if isinstance(y, Tensor) else y for i, y in x.items()}
    return twin


def _join(store: Store, group: dict[int, Store]) -> Store:
    """``store`` as one of the layers of a cache."""
    assert store.site.layer is not None
    store.group = group
    group[store.site.layer] = store
    return store


def install(cache: Cache, sites: list[tuple[Site, torch.nn.Module]], make: Callable[[Site], Store], name: str) -> None:
    """Put stores into the empty layers of ``cache`` that belong to ``sites``.

    Raises:
        UserError: a layer already holds tokens, or is of a kind that cannot be replaced.
    """
    for site, module in sites:
        assert site.layer is not None
        while len(cache.layers) <= site.layer and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        if site.layer >= len(cache.layers):
            raise UserError(f"{name}: the cache has {len(cache.layers)} layers, none for {site.name}")
        layer = cache.layers[site.layer]
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or cache.offloading:
            raise UserError(
                f"{name} replaces transformers' dynamic cache and found {type(layer).__name__} at {site.name}; "
                "leave cache_implementation at its default"
            )
        assert isinstance(layer, DynamicLayer)
        if layer.get_seq_length() > 0:
            raise UserError(
                f"{name} must see a sequence from its first token, but the cache passed to {site.name} already holds "
                f"{layer.get_seq_length()} tokens; start with a fresh cache"
            )
        store = _join(make(site), cache.__dict__.setdefault("_manyheads", {}))
        cache.layers[site.layer] = StoreLayer(store, site, module)


def seen_by(cache: Cache, site: Site, layer: int | None = None) -> int:
    """Tokens that the sequence of ``site``'s queries has had, those of the call at hand included, as the cache counts.

    Args:
        cache: of that sequence, after it took the keys of the call.
        site: where the call is made.
        layer: index that the call itself gives, where several layers share a module.
    """
    index = site.layer if layer is None else layer
    mine = cache.layers[index] if index is not None and 0 <= index < len(cache.layers) else None
    if site.kind != "cross" and isinstance(mine, CacheLayerMixin):
        return int(mine.get_seq_length())
    return int(cache.get_seq_length())  # keys are another layer's, or another sequence's
