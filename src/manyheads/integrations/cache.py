# SPDX-License-Identifier: Apache-2.0
"""A store of ours as a layer of transformers' cache: what the model and ``generate`` see of it."""

import copy
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from ..attention.padded import nbytes
from ..call import Site, Store
from ..errors import UserError
from ..strategy import Cache as CacheKind

__all__ = [
    "Past",
    "SlotCache",
    "StoreLayer",
    "cache_arguments",
    "expand",
    "find_cache",
    "given_with",
    "install",
    "seen_by",
    "store_layers",
]

_OF_TOKENS = ("mm_token_type_ids", "token_type_ids")  # arguments beside ``input_ids`` that have a value for each token
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
_HYBRID = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


class Past(int):
    """A number of cached columns that a mask leaves out, and the store that knows what is visible of them.

    transformers hands it on from the cache to the mask function, which asks the store.
    """

    store: Store

    @classmethod
    def of(cls, store: Store, seen: int) -> "Past":
        past = cls(seen)
        past.store = store
        return past


def _covered(store: Store, site: Site) -> bool:
    """Whether all layers of the cache are stores that cover the past: the layers share one mask."""
    return sum(each.covers_past for each in store.group.values()) == len(site.peers) > 0


def _owned(seen: int | Tensor, store: Store) -> Any:
    """``seen`` with the store that knows what is visible of so many columns."""
    if not isinstance(seen, Tensor):
        return Past.of(store, seen)
    vars(seen)["store"] = weakref.ref(store)
    return seen


class _Copied:
    """A layer is copied, as a prompt's cache is for every answer, but not pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UserError(
            "a cache of manyheads is not pickled: write it with manyheads.integrations.transformers.save_cache"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self).__new__(type(self))
        shared = ("site", "strategy", "_module")  # of the model, not of the sequence
        for name, value in vars(self).items():
            twin.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        return twin


class StoreLayer(_Copied, CacheLayerMixin):
    """Adapter from :class:`manyheads.call.Store` to transformers' cache layer.

    It answers with the *logical* length, so positions, masks and ``generate`` go on as if nothing was dropped.
    """

    supports_early_init = False

    def __init__(self, store: Store, site: Site, module: nn.Module, strategy: CacheKind) -> None:
        self.store = store
        self.site = site
        self.strategy = strategy
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

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """:meth:`crop` restores or says why it cannot, where transformers' own refusal would give no reason.

        But on MPS ``generate`` asks this also to run one step too many and crop it, with no assistant.
        """
        return all(x is None or x.device.type != "mps" for x in self.store.held)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store takes shape with its first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        module = self._module()
        if module is None or "_manyheads" not in module.__dict__:
            raise UserError(
                f"this cache drops tokens at {self.site.name} and needs its port: "
                "run the model inside `with manyheads.use(model):`"
            )
        held, rows = self.store.rows, key_states.shape[0]
        if held is not None and held != rows:
            if rows % held:
                raise UserError(f"the cache holds {held} rows and the model was called with {rows}: give it as many")
            self.store.reorder(torch.arange(held).repeat_interleave(rows // held))  # num_return_sequences of each
        return self.store.update(key_states, value_states)

    def get_seq_length(self) -> int:
        return cast("int", self.store.seen)  # a tensor while only the device counts, as in transformers' static cache

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.get_seq_length()
        if (
            self.site.window is None and self.is_initialized and _covered(self.store, self.site)
        ):  # the stores know the past
            return query_length, seen if torch.compiler.is_compiling() else _owned(seen, self.store)
        if self.site.window is None:
            return seen + query_length, 0
        reach = min(seen, self.site.window - 1)
        return reach + query_length, seen - reach

    def reset(self) -> None:
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (rows := self.store.rows) is not None:
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes minus the number of tokens to remove")
        self.store.crop(-tokens_to_remove)

    def offload(self) -> None:
        raise UserError("a cache that drops tokens cannot be offloaded: turn offloading off")

    prefetch = offload


class HybridStoreLayer(StoreLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """The same where attention and a state-space mixer lie in one layer: a store for the one, states for the other."""

    is_croppable = False

    def __init__(
        self, store: Store, site: Site, module: nn.Module, strategy: CacheKind, layer: LinearAttentionLayer
    ) -> None:
        fields = _copied(layer)  # the mixer may have run before the attention beside it
        for name in vars(LinearAttentionLayer(layer.number_of_states)):
            self.__dict__[name] = fields[name]
        StoreLayer.__init__(self, store, site, module, strategy)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        StoreLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        StoreLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, cast("Any", beam_idx))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(f"{self.site.name} has states beside its cache, which cannot be cropped: use no assistant")


class SlotCache(DynamicCache):
    """A transformers cache whose layers are stores of ours, to be passed to the model while the port is open.

    The argument is ``past_key_values``, and ``cache`` from transformers 5.24; :func:`cache_arguments` knows which.
    """

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
                twin.layers.append(copy.copy(layer))
                twin.layers[-1].__dict__.update(_copied(layer))
                continue
            if (module := layer._module()) is None:
                raise UserError("this cache cannot be forked: the model it was made for is gone")
            target = None
            if policy.selects(layer.site):
                target = _join(policy.store(layer.site), group)
            chosen = layer.strategy if target is None else policy
            twin.layers.append(_adapter(layer.store.fork(target), layer.site, module, chosen, layer))
        return twin

    def host_bytes(self) -> int:
        """Bytes that strategies which offload hold in host memory; counted so without a GPU, too."""
        return sum(nbytes(*layer.store.offloaded) for layer in self.layers if isinstance(layer, StoreLayer))

    def bytes(self) -> int:
        """Bytes really held by all layers: storages of keys, values, states and bookkeeping. Not :meth:`host_bytes`."""
        stores = sum(layer.store.nbytes() for layer in self.layers if isinstance(layer, StoreLayer))
        return stores + sum(nbytes(*_tensors(layer)) for layer in self.layers)


def _tensors(layer: Any) -> list[Tensor]:
    """What a layer keeps beside a store of ours."""
    fields = [x for x in vars(layer).values() if not isinstance(x, dict)]
    fields += [x for held in vars(layer).values() if isinstance(held, dict) for x in held.values()]
    return [x for x in fields if isinstance(x, Tensor)]


def _copied(layer: Any) -> dict[str, Any]:
    """What a layer of transformers' own keeps, sharing no tensor with it."""
    fields = dict(vars(layer))
    for name, x in fields.items():
        if isinstance(x, Tensor):
            fields[name] = x.clone()
        elif isinstance(x, dict):
            fields[name] = {i: y.clone() if isinstance(y, Tensor) else y for i, y in x.items()}
    return fields


def _join(store: Store, group: dict[int, Store]) -> Store:
    """``store`` as one of the layers of a cache."""
    assert store.site.layer is not None
    store.group = group
    group[store.site.layer] = store
    return store


def find_cache(*given: Any) -> Cache | None:
    """The cache among what a module was called with: transformers changes the name of that argument."""
    for x in given:
        if isinstance(x, Cache):
            return x
    return None


def store_layers(cache: Cache) -> list[StoreLayer]:
    """The layers of ``cache`` that hold stores of ours."""
    return [layer for layer in cache.layers if type(layer) is not DynamicLayer and isinstance(layer, StoreLayer)]


def cache_arguments(model: nn.Module, cache: Cache) -> dict[str, Any]:
    """Arguments by which ``model`` uses ``cache``: transformers 5.24 renamed ``past_key_values`` to ``cache``.

    A model that names neither, as a wrapper that hands all on, is called as transformers calls its own.
    """
    for function in (model.forward, GenerationMixin.prepare_inputs_for_generation):
        for name in ("cache", "past_key_values"):
            if name in inspect.signature(function).parameters:
                return {name: cache, "use_cache": True}
    raise UserError(f"{type(model).__name__} takes no cache: use a decoder of transformers")


def given_with(given: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """What a model is given beside the first ``count`` tokens of a prompt, of what belongs to all of it."""
    return {name: x[:, :count] if name in _OF_TOKENS else x for name, x in given.items()}


def expand(cache: Cache | None, rows: int) -> None:
    """Repeat every row of a cache with stores of ours, so that it has ``rows``: as ``generate`` repeats its prompts.

    Nothing happens where the numbers do not fit; the layers then say so.
    """
    if cache is None:
        return
    held = next((layer.store.rows for layer in store_layers(cache)), None)
    if held is not None and rows > held and rows % held == 0:
        cache.reorder_cache(cast("Any", torch.arange(held).repeat_interleave(rows // held)))


def install(
    cache: Cache, sites: list[tuple[Site, nn.Module]], make: Callable[[Site], Store], strategy: CacheKind
) -> None:
    """Put stores of ``strategy`` into the empty layers of ``cache`` that belong to ``sites``.

    Raises:
        UserError: a layer already holds tokens, or is of a kind that cannot be replaced.
    """
    name = strategy.slug
    for site, module in sites:
        assert site.layer is not None
        while len(cache.layers) <= site.layer and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        if site.layer >= len(cache.layers):
            raise UserError(f"{name}: the cache has {len(cache.layers)} layers, none for {site.name}")
        layer = cache.layers[site.layer]
        if type(layer) not in (*_PLAIN, *_HYBRID) or cache.offloading:
            raise UserError(
                f"{name} replaces transformers' dynamic cache and found {type(layer).__name__} at {site.name}; "
                + _advice(layer)
            )
        assert isinstance(layer, DynamicLayer)
        if layer.get_seq_length() > 0:
            raise UserError(
                f"{name} must see a sequence from its first token, but the cache passed to {site.name} already holds "
                f"{layer.get_seq_length()} tokens; start with a fresh cache"
            )
        store = _join(make(site), cache.__dict__.setdefault("_manyheads", {}))
        cache.layers[site.layer] = _adapter(store, site, module, strategy, layer)


def _adapter(store: Store, site: Site, module: nn.Module, strategy: CacheKind, layer: Any) -> StoreLayer:
    """``store`` in place of the attention part of ``layer``."""
    if isinstance(layer, LinearAttentionLayer):
        return HybridStoreLayer(store, site, module, strategy, layer)
    return StoreLayer(store, site, module, strategy)


def _advice(layer: Any) -> str:
    """What to do about a layer that a store cannot replace."""
    if isinstance(layer, StaticLayer) or "Quantized" in type(layer).__name__ or type(layer) in _PLAIN:
        return "leave cache_implementation at its default"
    return "the model keeps more there than keys and values, which no strategy can keep: use layers=... without it"


def seen_by(cache: Cache, site: Site, layer: int | None = None) -> int:
    """Tokens that the sequence of ``site``'s queries has had, those of the call at hand included, as the cache counts.

    Args:
        cache: of that sequence, after it took the keys of the call.
        site: where the call is made.
        layer: index that the call itself gives, where several layers share a module.
    """
    index = site.layer if layer is None else layer
    mine = cache.layers[index] if index is not None and 0 <= index < len(cache.layers) else None
    if site.kind != "cross" and (type(mine) is DynamicLayer or isinstance(mine, CacheLayerMixin)):
        return int(mine.get_seq_length())
    return int(cache.get_seq_length())  # keys are another layer's, or another sequence's
