# SPDX-License-Identifier: Apache-2.0
"""Decoders that read tokens of a strategy's own among those that they are given (``strategy.Interleaved``).

What is around the model under its head gives each piece as embeddings at positions of the strategy's, and hands on the
hidden states of the tokens given: heads, losses and ``generate`` go on as if nothing else had been read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..call import Piece, Site
from ..errors import UserError
from ..strategy import Interleaved
from .cache import cache_arguments, find_cache
from .forwards import owner_of
from .module_calls import CALLS, wrap_call

__all__ = ["read_interleaved"]

_REPLACED = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_position",
    "past_key_values",
    "cache",
)


def read_interleaved(model: nn.Module, site: Site, strategies: Sequence[Interleaved]) -> Callable[[], None]:
    """Put the one strategy around the decoder of ``model`` that ``site`` is in; return what takes it off.

    Raises:
        UserError: several strategies, another open port with one, or no decoder of transformers.
    """
    owner: Any = owner_of(model, site)
    if not isinstance(owner, PreTrainedModel):
        raise UserError(f"{strategies[0].spec} puts tokens into what a model of transformers reads; give one")
    if len(strategies) > 1 or CALLS in owner.__dict__:
        raise UserError(f"{strategies[-1].spec} and another strategy both put tokens of their own into one model")
    strategy = strategies[0]

    def around(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = owner.get_input_embeddings()(ids)
        cache = find_cache(*kwargs.values(), *args)
        wanted = kwargs.get("use_cache")
        if cache is None and (owner.config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=owner.config)
        seen = 0 if cache is None else int(cache.get_seq_length())
        pieces = strategy.pieces(embeds, seen, cache is not None)
        if pieces is None:
            return inner(*args, **kwargs)
        _check(strategy, kwargs, seen, embeds.shape[1])
        more = {name: x for name, x in kwargs.items() if name not in _REPLACED}
        alone: dict[str, Any] = {"use_cache": False}
        kept = alone if cache is None else cache_arguments(owner, cache)
        hidden, out = [], None
        for piece in pieces:
            piece.rotary = _tables(owner, piece)
            places = piece.positions.expand(embeds.shape[0], -1)
            memory = kept if piece.cached else alone
            out = inner(
                inputs_embeds=piece.embeds, position_ids=places, attention_mask=piece.mask, **{**more, **memory}
            )
            hidden.append(out.last_hidden_state[:, : piece.given])
        assert out is not None
        out.last_hidden_state = torch.cat(hidden, 1)
        return out

    return wrap_call(owner, around)[1]


def _check(strategy: Interleaved, kwargs: dict[str, Any], seen: int, new: int) -> None:
    """Refuse what pieces cannot answer: they have masks and positions of their own."""
    mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UserError(f"{strategy.spec} has masks of its own: give none, or which tokens are real, [B, T]")
    if mask is not None and not bool(mask.all()):
        raise UserError(f"{strategy.spec} reads rows of one length: leave padding away, or run the rows one by one")
    if isinstance(places, Tensor) and bool((places != torch.arange(seen, seen + new, device=places.device)).any()):
        raise UserError(f"{strategy.spec} counts its tokens itself: leave position_ids away")
    if any(kwargs.get(name) for name in ("output_hidden_states", "output_attentions")):
        raise UserError(f"{strategy.spec} reads in pieces, of which no hidden states or attentions are gathered")


def _tables(owner: Any, piece: Piece) -> tuple[Tensor, Tensor] | None:
    """The model's cosines and sines of the positions that a piece asks for."""
    rotary = getattr(owner, "rotary_emb", None)
    if piece.moved is None or rotary is None:
        return None
    cos, sin = rotary(piece.embeds, piece.moved[None])
    return cos, sin
