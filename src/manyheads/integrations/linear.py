# SPDX-License-Identifier: Apache-2.0
"""Modules of linear attention with decay, which do not dispatch through AttentionInterface: their forward is replaced.

While a port is open, a module that a strategy selected (``kinds`` with ``linear``) runs ours: its own projections, then
``attend``, then its own norm, gate and output projection. Known is transformers' ``MiniMaxLightningAttention``. The
state is kept where the model keeps it, in the model's ``MiniMaxCache``, but in float32. That cache (transformers 5.23)
reorders keys and values only, so that beam search mixes up the states of its beams, cannot select rows where the last
layer is softmax, and takes its length from the first layer, which has none where that is linear; one that passes here
is mended.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..call import AttentionCall, Recurrence, Site
from ..errors import UserError
from ..strategy import AttentionCompute, Strategy
from .cache import find_cache
from .hook_chain import BoundStrategy
from .sites import SiteState

__all__ = ["LinearState", "compute_linear", "find_linear"]

_KNOWN = "MiniMaxLightningAttention"
_STATE = "_manyheads"


def find_linear(model: nn.Module, first: int) -> list[tuple[Site, nn.Module]]:
    """Modules of ``model`` known to compute linear attention with decay; their indices start at ``first``."""
    found: list[tuple[Site, nn.Module]] = []
    for name, module in model.named_modules():
        if type(module).__name__ == _KNOWN:
            known: Any = module
            heads = known.num_attention_heads
            site = Site(name, first + len(found), known.layer_idx, "linear", False, heads, heads)
            found.append((site, module))
    return found


class LinearState(SiteState):
    """What an open port keeps on one module of linear attention: the strategy that computes it."""

    def __init__(self, site: Site, module: nn.Module, entry: BoundStrategy, strategy: AttentionCompute) -> None:
        self.site, self.module, self.entries, self.strategy = site, module, [entry], strategy
        module.__dict__[_STATE] = self
        self.forward = module.__dict__.get("forward")  # of someone else who replaced it
        module.__dict__["forward"] = self._forward

    def detach(self) -> None:  # type: ignore[override]
        """Give the module its own forward back."""
        del self.module.__dict__["forward"], self.module.__dict__[_STATE]
        if self.forward is not None:
            self.module.__dict__["forward"] = self.forward

    def _forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None,
        *args: Any, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The module's forward, attention computed by the strategy: output and state, as the module has them."""
        module: Any = self.module
        layer, entry = module.layer_idx, self.entries[0]
        entry.called = True
        qkv = module.act_fn(module.qkv_proj(hidden_states))
        handed = attention_mask is not None and attention_mask.ndim > 2  # of a plan for tokens that processes share
        real = None if attention_mask is None or handed else attention_mask.bool()
        if real is not None:
            qkv = qkv.masked_fill(~real[..., None], 0.0)
        q, k, v = qkv.unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2).chunk(3, -1)
        cache: Any = find_cache(*args, *kwargs.values())
        past = None if cache is None else cache.get_linear_cache(layer)
        past = past if isinstance(past, Tensor) else None  # an empty list stands for no state
        mask = attention_mask if handed else None if real is None else real[:, None, None]
        call = AttentionCall(
            site=self.site, q=q, k=k, v=v, scale=1.0, mask=mask,
            is_causal=True, recurrence=Recurrence(-module.slope_rate.flatten(), past), state=entry.state,
        )  # fmt: skip
        answered = self.strategy.attend(call)
        assert answered is not None, "linear attention has no way but the strategy's"
        out = module.norm(answered.flatten(2))
        out = module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * out)
        assert call.recurrence is not None
        if cache is not None:
            cache.set_linear_cache(layer, call.recurrence.state)
            if not isinstance(cache, _Mended):
                kind: Any = type(cache)
                cache.__class__ = _mended(kind)
        return out, call.recurrence.state


def compute_linear(
    port: Any, linear: list[tuple[Site, nn.Module]], chosen: list[tuple[Strategy, set[int]]],
    restorers: list[Callable[[], None]],
) -> list[tuple[Site, nn.Module, BoundStrategy]]:  # fmt: skip
    """Have the strategies of ``port`` compute the modules of linear attention whose indices they chose.

    Raises:
        UserError: a strategy that computes no attention.
    """
    found = []
    for site, module in linear:
        for strategy in (s for s, at in chosen if site.index in at):
            if not isinstance(strategy, AttentionCompute):
                raise UserError(f"{strategy.spec} computes no attention, all that can act at {site.name}")
            entry = BoundStrategy(port, strategy)
            restorers.append(LinearState(site, module, entry, strategy).detach)
            found.append((site, module, entry))
    return found


class _Mended:
    """What a MiniMaxCache gets wrong: rows of its states, and its length where the first layer keeps no keys."""

    layers: list[Any]
    linear_cache: list[Any]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        states = self.linear_cache
        self.linear_cache = [x[beam_idx.to(x.device)] if isinstance(x, Tensor) else x for x in states]
        cast(Any, super()).reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._fill()
        cast(Any, super()).batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._fill()
        cast(Any, super()).batch_repeat_interleave(repeats)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length: int = cast(Any, super()).get_seq_length(self._keeper(layer_idx))
        return length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        sizes: tuple[int, int] = cast(Any, super()).get_mask_sizes(query_length, self._keeper(layer_idx))
        return sizes

    def _fill(self) -> None:
        """It asks every layer for its state, those after the last linear one too."""
        self.linear_cache += [[] for _ in range(len(cast(Any, self)) - len(self.linear_cache))]

    def _keeper(self, layer: int) -> int:
        """A layer that keeps keys."""
        return next((i for i, x in enumerate(self.layers) if x.get_seq_length()), layer)


@functools.cache
def _mended(kind: type) -> type:
    return type(kind.__name__, (_Mended, kind), {})
