# SPDX-License-Identifier: Apache-2.0
"""The mask functions of an open port: what the model's mask says of cached columns reaches the stores that hold them.

A store knows which columns hold tokens from the forwards that brought them, so the mask of a later forward is built for
the new columns only: no ``T x S`` mask, no wait for the device. That is right as long as the model says the same of the
past. Where it does not (another ``attention_mask``, a rule that is not causal, a mask function of the user's own), the
mask is built for all columns, and each store takes from it the columns of its slots.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..call import Store
from ..errors import UserError
from .cache import Past

__all__ = ["eager_mask", "own_mask", "port_mask"]


def port_mask(**given: Any) -> Tensor | None:
    """SDPA's boolean mask; None where causal attention is all there is."""
    mask: Tensor | None = _mask(sdpa_mask, True, given)
    return mask


def eager_mask(**given: Any) -> Tensor | None:
    """The same, never left out where it is causal: eager functions do not infer causality."""
    mask: Tensor | None = _mask(sdpa_mask, True, {**given, "allow_is_causal_skip": False})
    return mask


def own_mask(build: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function ``build`` of the user's own, asked for all columns."""

    def mask(**given: Any) -> Any:
        return _mask(build, False, given)

    return mask


def _mask(build: Callable[..., Any], ours: bool, given: dict[str, Any]) -> Any:
    length, past, told = given["q_length"], given.get("kv_offset", 0), given.get("attention_mask")
    if not isinstance(past, Past):
        if isinstance(past, Tensor) and told is not None and not torch.compiler.is_compiling():
            _check_fixed(past, told, length)
        if given["kv_length"] != length and _slices_queries(given.get("config")):
            given = {**given, "allow_is_causal_skip": False}
        return build(**given)
    plain = ours and given.get("mask_function") is causal_mask_function
    if (
        told is not None
        and past.store.real is None
        and told.shape[1] >= past + length
        and _full(told[:, : past + length])
    ):
        told = None  # it says nothing: looked at once, for all columns
    agrees = _agrees(past.store, told, past, length)
    if plain and agrees:
        return build(**{**given, "attention_mask": told})
    whole = {**given, "kv_length": past + length, "kv_offset": 0}
    if not agrees:
        whole["allow_is_causal_skip"] = False
    return build(**whole)


def _full(told: Tensor) -> bool:
    return bool(told.all())


def _agrees(store: Store, told: Tensor | None, seen: int, length: int) -> bool:
    """Whether ``told [B, W]`` says of the cached columns what ``store`` knows; None says that all hold tokens."""
    real = store.real
    if told is None:
        return real is None or _full(real)
    if told.shape[1] < seen + length:
        return False
    before = told[:, :seen].bool()
    return _full(before) if real is None else torch.equal(before, real)


def _check_fixed(past: Tensor, told: Tensor, length: int) -> None:
    """A cache of fixed size has no mask over its slots: refuse a mask that hides what it holds."""
    owner: weakref.ref[Store] | None = vars(past).get("store")
    store = None if owner is None else owner()
    if store is not None and not _agrees(store, told, int(past), length):
        raise UserError(
            f"the cache of {store.site.name} has a fixed size and cannot mask tokens that it holds already; "
            "make it without room"
        )


def _slices_queries(config: Any) -> bool:
    """Whether layers that reuse keys may be asked for the last queries only: then no mask is inferred from shapes."""
    return any(mode == "reuse" for mode in getattr(config, "kv_sharing_modes", None) or ())
