# SPDX-License-Identifier: Apache-2.0
"""Decoding from a cache: of fixed size as one CUDA graph per token, or of any size, token by token.

``generate`` of transformers runs a cache of fixed size compiled too, but prepares inputs, checks guards and waits for
the device at every token. In :func:`decode` the step with all that it changes (cache, token, position) is captured once
and replayed. :func:`greedy` goes on from a cache that any number of tokens was read into, in pieces.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .cache import SlotCache, StoreLayer, cache_arguments

__all__ = ["decode", "end_tokens", "greedy"]

_WARM = 3  # steps before the capture: they compile, and let every library choose its kernels
_LOOK = 32  # tokens between two looks at whether all rows have ended


def decode(
    model: nn.Module,
    ids: Tensor,
    cache: SlotCache,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    eos: int | None = None,
    compiled: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue ``ids`` from a cache made with ``room``, that has read all of them but the last token.

    On a GPU each token replays one CUDA graph; elsewhere the same step runs as it is. The port of the model must be
    open and rows must not be padded.

    Args:
        model: a decoder-only transformers model.
        ids: ``[B, L]``, as given to :func:`manyheads.integrations.transformers.prefill`.
        cache: from ``new_cache(model, strategy, room=...)`` with room for the tokens.
        max_new_tokens: how many to make.
        temperature: 0 takes the likeliest token; above, tokens are drawn from ``softmax(logits / temperature)``.
        eos: token that ends a row; what follows it in the row repeats it. Decoding stops when all rows have ended.
        compiled: compile the step (a minute at first, fewer and faster kernels) before capturing it.
        progress: receives the number of tokens, now and then.

    Returns:
        New tokens ``[B, up to max_new_tokens]``.

    Raises:
        UserError: the cache has no fixed size, too little room, or has not read the right number of tokens.
    """
    stores = [layer.store for layer in cache.layers if isinstance(layer, StoreLayer)]
    if not stores or not all(store.fixed for store in stores):
        raise UserError("decode needs a cache of fixed size: make it by new_cache(model, strategy, room=...)")
    if (seen := int(cache.get_seq_length())) != ids.shape[1] - 1:
        raise UserError(f"the cache has read {seen} of {ids.shape[1]} tokens, not all but one: prefill it first")
    if max_new_tokens > (room := min(store.room for store in stores)):
        raise UserError(f"the cache has room for {room} tokens, not for {max_new_tokens}")
    batch, device = ids.shape[0], ids.device
    made = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=device)
    token, place = ids[:, -1:].clone(), torch.full((1, 1), seen, device=device)
    count = torch.zeros(1, dtype=torch.long, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)

    given = cache_arguments(model, cache)

    def forward(token: Tensor, place: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token, position_ids=place, **given).logits
        return logits[:, -1].float()

    if compiled and device.type == "cuda":
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def step() -> None:
        logits = forward(token, place)
        if temperature > 0:  # the argmax of Gumbel-perturbed logits is a draw
            logits = logits / temperature - torch.empty_like(logits).exponential_().log()
        chosen = logits.argmax(-1)
        if eos is not None:
            chosen = chosen.masked_fill(ended, eos)
            ended.logical_or_(chosen == eos)
        made.index_copy_(1, count, chosen[:, None])
        token.copy_(chosen[:, None])
        place.add_(1)
        count.add_(1)

    with torch.no_grad():
        again: Callable[[], Any] = step
        for done in range(max_new_tokens):
            if done == _WARM and device.type == "cuda":
                again = _captured(step)
            again()
            if (done + 1) % _LOOK == 0:
                if progress is not None:
                    progress(done + 1)
                if eos is not None and bool(ended.all()):
                    return made[:, : done + 1]
    return made


def _captured(step: Callable[[], None]) -> Callable[[], Any]:
    """The replay of ``step`` as a CUDA graph; capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's end of text."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = given if isinstance(given, (list, tuple)) else [given]
    return frozenset(int(x) for x in (*several, getattr(tokenizer, "eos_token_id", None)) if x is not None)


def greedy(
    model: nn.Module, cache: Any, ids: Tensor, max_new_tokens: int, *, ends: Collection[int] = (),
    piece: int | None = None, settled: Callable[[list[int]], bool] | None = None,
) -> list[int]:  # fmt: skip
    """Read ``ids`` behind what ``cache`` holds, and go on with the likeliest tokens, each of which is read once.

    The port of the model must be open.

    Args:
        model: a decoder-only transformers model.
        cache: of one row; it is changed.
        ids: ``[1, T]``, not read yet, at least one.
        max_new_tokens: how many to make at most.
        ends: tokens that end the answer; they are not part of it.
        piece: most tokens of ``ids`` that are read at once.
        settled: stop when this says so of the tokens that are made.

    Returns:
        The tokens.
    """
    given, made = cache_arguments(model, cache), list[int]()
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1  # those of a long text would not fit
    with torch.inference_mode():
        for fed in ids.split(piece or ids.shape[1], 1):
            logits = model(input_ids=fed, **given).logits
        while len(made) < max_new_tokens:
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            made.append(token)
            if len(made) == max_new_tokens or (settled is not None and settled(made)):
                break
            logits = model(input_ids=ids.new_tensor([[token]]), **given).logits
    return made
