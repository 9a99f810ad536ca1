# SPDX-License-Identifier: Apache-2.0
"""What an open port does at an attention module of a transformers model."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..attention.causal import causal_tail, for_gradient_of
from ..attention.reference import repeat_kv
from ..attention.rope import copies
from ..call import AttentionCall, Site
from ..errors import UserError
from ..strategy import AttentionWatch, Strategy
from .cache import StoreLayer, find_cache, install, seen_by
from .configs import EAGER, SDPA, implementation_of
from .functions import base_function
from .hook_chain import BoundStrategy, HookChain
from .masks import eager_mask, port_mask
from .passes import Passes, in_one_thread
from .prompt_chunks import tell
from .shared_keys import borrow, lend, lends
from .thread_state import Running, ThreadState

__all__ = ["ATTENTION", "BoundStrategy", "SiteState", "is_eager", "register"]

_STATE = "_manyheads"
_LOGITS = ("softcap", "s_aux", "position_bias")  # what a model gives its attention function beside scale and mask


def is_eager(module: nn.Module) -> bool:
    """Whether the (already switched) config of an attention module asks for the model's own eager function."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == EAGER


class SiteState(HookChain):
    """What the open ports of a model keep on one attention module; what one call needs is kept by thread."""

    def __init__(self, site: Site, module: nn.Module, eager: bool) -> None:
        self.site = site
        self.eager = eager
        self.function, self.base = base_function(module, eager)
        self.ports = 0
        self.thread = ThreadState()
        self.passes = Passes()
        self.copies: int | None = None  # of the model's rotary tables, to be in the half-split layout; 0 for never
        super().__init__()
        self.handle = module.register_forward_pre_hook(self._take_cache, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SiteState":
        raise UserError("a model cannot be copied while its port is open: copy it before `manyheads.use`, or after")

    @staticmethod
    def attach(site: Site, module: nn.Module, eager: bool) -> "SiteState":
        """The state on ``module``, made if this is the first open port there."""
        state: SiteState | None = module.__dict__.get(_STATE)
        if state is None:
            state = module.__dict__[_STATE] = SiteState(site, module, eager)
        state.ports += 1
        return state

    @staticmethod
    def detach(module: nn.Module) -> None:
        """Take one open port off; the last one leaves no trace."""
        state: SiteState = module.__dict__[_STATE]
        state.ports -= 1
        if state.ports == 0:
            state.handle.remove()
            del module.__dict__[_STATE]

    @staticmethod
    def owners(module: nn.Module) -> list[Any]:
        """Open ports with a strategy at ``module``."""
        state: SiteState | None = module.__dict__.get(_STATE)
        return [] if state is None else [entry.owner for entry in state.entries]

    @staticmethod
    def claims(module: nn.Module, kind: type[Strategy]) -> list[Strategy]:
        """Strategies of ``kind`` of the open ports at ``module``."""
        state: SiteState | None = module.__dict__.get(_STATE)
        return [] if state is None else [e.strategy for e in state.entries if isinstance(e.strategy, kind)]

    def _take_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the module runs: see which cache and positions it will use, and give an empty cache our stores."""
        running = self.thread.begin()
        if not running.compiling:
            self.passes.enter()
        running.rotary = _tables(kwargs.get("position_embeddings"))
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        running.hidden = hidden if isinstance(hidden, Tensor) and hidden.ndim == 3 else None
        cache = find_cache(*kwargs.values(), *args)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        running.past = cache
        self.entering(cache)
        if cache is None or self.site.layer is None or not self.site.causal:
            return
        if self.site.kv_sharing == "reuse":
            running.lent = lends(cache, self.site)
            return
        site, bound = self.site, self.cache_strategy
        layer = _ours(cache, site)
        if bound is not None and kwargs.get("layer_idx", site.layer) != site.layer:
            raise UserError(
                f"{bound[1].spec} cannot keep the caches of {site.name}: one module serves several layers, each with a "
                "cache of its own"
            )
        if bound is not None:
            entry, strategy = bound
            if layer is None:
                install(cache, [(site, module)], strategy.store, strategy)
                layer = _ours(cache, site)
            elif layer.strategy != strategy:
                raise UserError(
                    f"the cache was made by {layer.strategy.spec}, and {strategy.spec} is in use at {site.name}: make "
                    "it by the one that is in use, or open the port without"
                )
            if not entry.stored:
                entry.stored = True
        if layer is not None:
            running.store = layer.store
            if self.function is not None and (layer.store.fixed or layer.store.computes):
                raise UserError(
                    f"{layer.strategy.spec} computes attention itself here, and {site.name} uses {self.function!r}, a "
                    'function of your own: load the model with attn_implementation="sdpa"'
                )

    def run(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One attention computation through all strategies of the site: ``[B, T, H, d]``, and weights if eager."""
        running = self.thread.now
        store = running.store
        self.mark_called()
        if not running.compiling:
            self.passes.run(stored=store is not None)
            in_one_thread(self.entries)
        if self.function is not None and mask is not None and getattr(mask, "ndim", 0) != 4:
            return self._pass_through(module, q, k, v, mask, kwargs)
        if (
            self.follower is not None and mask is None and store is None and self.site.kv_sharing is None
            and not running.compiling and q.shape[2] == 1 and all(kwargs.get(name) is None for name in _LOGITS)
        ):  # fmt: skip
            return self._follow(*self.follower, module, q, k, v, running, kwargs)
        original = call = self._read(module, q, k, v, mask, running, kwargs)
        if store is not None:
            alone = not self.has_hooks and not kwargs.get("output_attentions")  # the store may answer in its own way
            alone = alone and self.function is None and self.site.kv_sharing is None
            if alone and (held := store.attend(call)) is not None:
                running.clear()
                return held, None
            if not running.compiling:
                tell(store)
            call = store.mask(call)
            if self.site.kv_sharing == "store":
                lend(k, call)
        elif self.site.kv_sharing == "reuse":
            call = borrow(k, call, running.lent)
        if call.mask is not None and call.mask.shape[1] not in (1, q.shape[1]):  # slots differ between kv heads
            call = call.replace(mask=repeat_kv(call.mask, q.shape[1]))
        weights: Tensor | None = None
        answered: Tensor | None = None
        if self.has_changes:
            call = self.edit(call)
            answered = self.attend(call)
        if answered is not None:
            out = answered
        elif call is original and not (call.is_causal and q.shape[2] < k.shape[2]) and not self._dense(call):
            if mask is not None and mask.dtype == torch.bool and self.eager:
                mask = _additive(mask, q.dtype)
            out, weights = self.base(module, q, k, v, mask, **kwargs)
        else:
            out, weights = self._attend(module, call, original, kwargs)
        if self.has_hooks:
            out = self.after(call, out)
            if not running.compiling:
                in_one_thread(self.entries)
        if store is not None:
            store.evict(call)
        running.clear()
        return out, weights

    def _follow(
        self, entry: BoundStrategy, strategy: AttentionWatch, module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        running: Running, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """A single query that sees all keys, where one strategy watches and none acts: it often needs no call."""
        found: tuple[Tensor, Tensor | None] = self.base(module, q, k, v, None, **kwargs)
        rest = running.hidden, kwargs.get("position_ids"), _halves(self, module, running.rotary, q.shape[-1])
        if not strategy.follow(entry.current, running.past, (q, k, v), rest, found[0]):
            self.after(self._read(module, q, k, v, None, running, kwargs), found[0])
        running.clear()
        return found

    def _pass_through(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The user's own function with a mask that only it can read."""
        if self.has_hooks or self.thread.now.store is not None:
            raise UserError(
                f"{self.function!r}, an attention function of your own, takes a mask ({type(mask).__name__}) that "
                f"strategies at {self.site.name} cannot read: register transformers' sdpa_mask for it"
            )
        out: tuple[Tensor, Tensor | None] = self.base(module, q, k, v, mask, **kwargs)
        return out

    def _dense(self, call: AttentionCall) -> bool:
        """Whether the model's own kernel, which SDPA stands for here, knew a cap or sinks that SDPA does not."""
        return self.base is sdpa_attention_forward and (call.softcap is not None or call.sinks is not None)

    def _read(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, running: Running,
        kwargs: dict[str, Any],
    ) -> AttentionCall:  # fmt: skip
        """The AttentionCall that the model's arguments mean under its own attention function."""
        store, past, dim = running.store, running.past, q.shape[-1]
        length, size = q.shape[2], k.shape[2]
        bias = kwargs.get("position_bias")
        is_causal = False
        if length > 1 and mask is None and not self.eager:
            causal = kwargs.get("is_causal")
            is_causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        if mask is not None and mask.dtype != torch.bool:  # a user's own additive mask
            bias, mask = mask if bias is None else bias + mask, None
        if is_causal and size > length and store is None and self.site.kv_sharing != "reuse":
            k, v, size = k[:, :, :length], v[:, :, :length], length  # SDPA reads a static cache from its start
        scale = kwargs.get("scaling")
        step: int | Tensor = size - length
        if store is not None:
            step = store.seen - length
        elif self.has_hooks and past is not None:
            seen = seen_by(past, self.site, kwargs.get("layer_idx"))
            step = seen - length
            if self.site.kind != "cross" and seen < size:  # what is allocated ahead is no key
                k, v = k[:, :, :seen], v[:, :, :seen]
                mask, bias = _first_columns(mask, seen), _first_columns(bias, seen)
        elif self.site.kind == "cross":
            step = 0
        cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
        if not (cap is None and sinks is None) and not self.eager and implementation_of(module) == "sdpa":
            cap = sinks = None  # SDPA reads neither
        return AttentionCall(
            site=self.site, q=q, k=k, v=v, scale=dim**-0.5 if scale is None else scale, mask=mask, bias=bias,
            is_causal=is_causal, softcap=cap, sinks=sinks,
            dropout=kwargs.get("dropout", 0.0), training=module.training, hidden=running.hidden,
            positions=kwargs.get("position_ids"), rotary=_halves(self, module, running.rotary, dim),
            function=self.function, step=step, cache=store, past=past,
        )  # fmt: skip

    def _attend(
        self, module: nn.Module, call: AttentionCall, original: AttentionCall, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention function on a call that was changed."""
        if call.sinks is not original.sinks or call.softcap != original.softcap or self._dense(call):
            return call.attend(), None  # eager functions read sinks from the module, SDPA has no cap
        kwargs = {**kwargs, "scaling": call.scale, "dropout": call.dropout, "is_causal": call.is_causal}
        mask, shorter = call.mask, call.is_causal and call.q.shape[2] < call.k.shape[2]
        if call.bias is not None:
            allowed = call.allowed()
            floor = torch.finfo(call.q.dtype).min
            mask = call.bias if allowed is None else torch.where(allowed, call.bias, floor)
            kwargs.pop("position_bias", None)
            kwargs["is_causal"] = False
        elif self.eager:
            allowed = call.allowed()
            mask = None if allowed is None else _additive(allowed, call.q.dtype)
        elif shorter and mask is None and self.function is None:  # SDPA anchors at the top left
            return causal_tail(call.q, call.k, call.v, call.scale, call.dropout), None
        elif call.is_causal and (shorter or mask is not None):  # SDPA heeds one of the two: a mask alone
            mask, kwargs["is_causal"] = call.allowed(), False
        q = for_gradient_of(mask, call.q, call.k, call.v)
        out, weights = self.base(module, q, call.k, call.v, mask, **kwargs)
        return out, weights


def _ours(cache: Cache, site: Site) -> StoreLayer | None:
    """The layer of ``cache`` that holds a store of ours for ``site``."""
    index = site.layer
    layer = cache.layers[index] if index is not None and index < len(cache.layers) else None
    return layer if type(layer) is not DynamicLayer and isinstance(layer, StoreLayer) else None


def _halves(
    state: SiteState, module: nn.Module, rotary: tuple[Tensor, Tensor] | None, head_dim: int
) -> tuple[Tensor, Tensor] | None:
    """Rotary tables in half-split layout, where the model's rotation has one."""
    if rotary is None or state.copies == 1:
        return rotary
    if state.copies is None:
        apply = inspect.unwrap(type(module).forward).__globals__.get("apply_rotary_pos_emb")
        known = apply is not None and state.site.latent is None
        state.copies = copies(apply, rotary[0].shape[-1], head_dim) if known else 0
        return _halves(state, module, rotary, head_dim)
    cos, sin = rotary
    return (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)) if state.copies else None


def _tables(given: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines ``[B, T, rotary_dim]`` among the arguments of an attention module."""
    if not isinstance(given, tuple) or len(given) != 2:
        return None
    cos, sin = given
    return (cos, sin) if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.ndim == sin.ndim == 3 else None


def _first_columns(x: Tensor | None, count: int) -> Tensor | None:
    """What a mask or bias says of the first ``count`` keys; one for all keys stays."""
    return x if x is None or x.shape[-1] == 1 else x[..., :count]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask -> 0 where attended, the dtype's least number elsewhere."""
    return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), torch.finfo(dtype).min)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the model calls as its attention function while a port is open."""
    state: SiteState | None = module.__dict__.get(_STATE)
    if state is None:
        raise RuntimeError(f"{type(module).__name__} was copied from a model while its port was open; copy it before")
    return state.run(module, query, key, value, attention_mask, kwargs)


ATTENTION = _attention


def register() -> None:
    """Make the port's functions known to transformers by their names. Importing this module does not."""
    for name, mask in ((SDPA, port_mask), (EAGER, eager_mask)):
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, mask)
