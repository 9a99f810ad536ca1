# SPDX-License-Identifier: Apache-2.0
"""Reading a text once for all arms, and going on from there under each.

Every figure comes after compression: what an answer is predicted from has passed through the compressed cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...attention.budget import keep_limit
from ...errors import UserError
from ...integrations import use
from ...integrations.cache import StoreLayer, cache_arguments
from ...integrations.transformers import new_cache
from ...lens import device_of
from ...spec import parse
from ...strategy import Cache, Interleaved, Strategy

if TYPE_CHECKING:
    from ...experiment import Arm

__all__ = ["Prefix", "bytes_per_token", "chunk_size", "forward_chunked", "sequences_at_once", "token_nll"]

_FULL = cast(Cache, parse("full"))
_LEAST_RECORD = 64  # queries that a dense prefill keeps for the strategies forked from it
_SLACK = 50  # a query of a chunk sees at most one slot in this many beyond the budget
_CACHE_LIMIT = 2**30  # bytes of dense cache that one batch may hold
_CACHE_SHARE = 32  # on a GPU: this part of its memory
_FORGETS = 0.1  # difference of logits, in their standard deviation, beyond what rounding does


def cache_of(strategies: Sequence[Strategy]) -> Cache | None:
    """The strategy of an arm that says what is remembered, None if none does."""
    return next((strategy for strategy in strategies if isinstance(strategy, Cache)), None)


def _forks(strategies: Sequence[Strategy]) -> bool:
    """Whether a dense prefill that others share serves this arm too: it acts on the cache alone, and afterwards."""
    return len(strategies) == 1 and isinstance(strategies[0], Cache) and strategies[0].dense_prefill


def chunk_size(arm: Arm, length: int) -> int | None:
    """Most tokens to feed at once after ``length`` so that each is seen as in decoding, None for any number.

    Exact for strategies that evict at the prefill only, that say so (``exact_chunks``), or that evict every m tokens (m
    at once). Those that evict at every step get chunks so short that no query sees more than one slot in fifty beyond
    the budget.
    """
    strategy = cache_of(arm.strategies)
    if strategy is None:
        return None
    if isinstance(strategy.schedule, int):
        return strategy.schedule
    if strategy.schedule != "step" or strategy.exact_chunks or not strategy.has_budget or strategy.budget == 1.0:
        return None
    return 1 + keep_limit(strategy.budget, length) // _SLACK


class Prefix:
    """Tokens ``[B, L]`` that a model has read, and the caches that the arms have of them.

    One dense prefill serves every arm that compresses after it; the others read the tokens by themselves. The port of
    the model must be open. ``system`` are the tokens of the system message, None where there is none.
    """

    def __init__(
        self, model: nn.Module, ids: Tensor, arms: Iterable[Arm], system: tuple[int, int] | None = None
    ) -> None:  # fmt: skip
        self.model, self.ids, self._system = model, ids, system
        forked = [strategies[0] for arm in arms if _forks(strategies := arm.strategies)]
        caches = [strategy for strategy in forked if isinstance(strategy, Cache)]
        self._record = max([_LEAST_RECORD, *(strategy.record for strategy in caches)])
        self._whole = any(strategy.needs_queries for strategy in caches)  # see a prompt in one forward
        self._read(ids, anew=True)

    def _read(self, ids: Tensor, anew: bool) -> None:
        if anew:
            self._dense = new_cache(self.model, _FULL, record=self._record)
        _forward(self.model, ids, self._dense, 1)

    def extend(self, ids: Tensor) -> None:
        """Read on: ``ids [B, T]``, after what was read or, where a strategy has to see all queries, with it anew."""
        self.ids = torch.cat([self.ids, ids], 1)
        self._read(self.ids if self._whole else ids, anew=self._whole)

    def serves(self, arm: Arm) -> bool:
        """Whether what was read here serves ``arm``, too."""
        return not arm.strategies or _forks(arm.strategies)

    @contextmanager
    def open(self, arm: Arm) -> Iterator[Any]:
        """The cache of ``arm`` after these tokens, to be fed while the block lasts."""
        strategies = arm.strategies
        keeping = (cache_of(strategies) or _FULL).with_system(self._system)
        if self.serves(arm):
            yield self._dense.fork(keeping)
            return
        with ExitStack() as stack:
            if acting := [x for x in strategies if isinstance(x, Interleaved) or not isinstance(x, Cache)]:
                stack.enter_context(use(self.model, *acting))
            cache = new_cache(self.model, keeping)
            _forward(self.model, self.ids, cache, 1)
            yield cache


def forward_chunked(model: nn.Module, cache: Any, ids: Tensor, keep: int, size: int | None = None) -> Tensor:
    """Continue ``cache`` with ``ids [B, T]``, ``size`` at a time: float32 logits ``[B, keep, V]`` of the last."""
    step = size or ids.shape[1]
    outputs = []
    for start in range(0, ids.shape[1], step):
        piece = ids[:, start : start + step]
        wanted = min(piece.shape[1], start + piece.shape[1] - (ids.shape[1] - keep))
        logits = _forward(model, piece, cache, max(1, wanted))
        if wanted > 0:
            outputs.append(logits[:, -wanted:].float())
    return torch.cat(outputs, 1)


def _forward(model: nn.Module, ids: Tensor, cache: Any, keep: int) -> Tensor:
    more = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=ids, **cache_arguments(model, cache), **more).logits
    return logits[:, -keep:]


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of ``targets [B, T]`` under ``logits [B, T, V]``, float32 ``[B, T]``, nats per token."""
    return -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]


def bytes_per_token(model: nn.Module) -> float:
    """Bytes that a token takes in a cache to fork from, what does not grow with the text left out.

    The port must be open.

    Raises:
        UserError: a model without a cache, with one that ours cannot stand in for, or that does not read on where it
            stopped.
    """
    device = device_of(model)
    ids, held = torch.arange(16, device=device)[None], []
    for length in (8, 16):
        cache = new_cache(model, _FULL, record=1)
        try:
            last = forward_chunked(model, cache, ids[:, :length], 8)
        except UserError:
            raise
        except ValueError as error:  # of a model with a kind of cache of its own
            raise UserError(f"{type(model).__name__} does not take a cache of ours: {error}") from error
        held.append(cache.bytes())
    if held[0] == held[1]:
        raise UserError(f"{type(model).__name__} keeps no key/value cache, so there is nothing to compare")
    if not all(isinstance(layer, StoreLayer) for layer in cache.layers):
        cache = new_cache(model, _FULL)
        again = forward_chunked(model, cache, ids, 8, 8)
        if (again - last).norm() > _FORGETS * last.std() * last.numel() ** 0.5:
            raise UserError(
                f"{type(model).__name__} forgets its states when it reads several tokens after others, in "
                "transformers itself, so that no figure would be right"
            )
    return (held[1] - held[0]) / 8


def sequences_at_once(device: torch.device, length: int, per_token: float) -> int:
    """Sequences of ``length`` tokens whose dense caches are held at once."""
    limit = _CACHE_LIMIT
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory // _CACHE_SHARE
    return max(1, int(limit // (length * per_token)))
