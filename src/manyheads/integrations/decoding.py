# SPDX-License-Identifier: Apache-2.0
"""Decoding from a cache: of fixed size as one CUDA graph per token, or of any size, token by token.

``generate`` of transformers runs a cache of fixed size compiled too, but prepares inputs, checks guards and waits for
the device at every token. In :func:`decode` the step with all that it changes (cache, token, position) is captured once
and replayed. :func:`greedy_rows` goes on from a cache that any number of tokens was read into, in pieces.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..lens import device_of
from ..writing import BatchedLoop, Decoding, DecodingLoop, Request, TokenChoice, Written
from .cache import SlotCache, StoreLayer, cache_arguments
from .model_access import Access

__all__ = ["decode", "end_tokens", "greedy", "greedy_rows", "processor", "takes_padding", "write", "write_each"]

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
    """:func:`greedy_rows` of one row ``ids [1, T]``: its tokens."""
    return greedy_rows(
        model, cache, [ids[0].tolist()], [max_new_tokens], ends=ends, piece=piece, settled=[settled]
    )[0]  # fmt: skip


def greedy_rows(
    model: nn.Module, cache: Any, tails: Sequence[Sequence[int]], most: Sequence[int], *, ends: Collection[int] = (),
    piece: int | None = None, settled: Sequence[Callable[[list[int]], bool] | None] = (),
) -> list[list[int]]:  # fmt: skip
    """Read a tail in each row behind what ``cache`` holds, and go on with the likeliest tokens, read once each.

    The port of the model must be open. A row that has ended leaves the batch. Tails of unequal length are padded in
    front and the padding is masked, each row at positions of its own; :func:`takes_padding` says where that is exact.

    Args:
        model: a decoder-only transformers model.
        cache: of as many rows as there are tails; it is changed.
        tails: token ids that are not read yet, at least one in each row.
        most: how many to make at most, for each row, at least one.
        ends: tokens that end a row; they are not part of it.
        piece: most tokens of the tails that are read at once.
        settled: for each row, stop it when this says so of its tokens.

    Returns:
        The tokens of each row.
    """
    given, device = cache_arguments(model, cache), device_of(model)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1  # those of a long text would not fit
    width, seen = max(map(len, tails)), int(cache.get_seq_length())
    ids = torch.tensor([[0] * (width - len(tail)) + list(tail) for tail in tails], device=device)
    told = None
    if any(len(tail) < width for tail in tails):
        told = torch.ones(len(tails), seen + width, dtype=torch.long, device=device)
        for row, tail in zip(told, tails, strict=True):
            row[seen : seen + width - len(tail)] = 0

    def forward(fed: Tensor, upto: int) -> list[int]:
        more = {}
        if told is not None:
            mask = told[:, :upto]
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -fed.shape[1] :]}
        chosen: list[int] = model(input_ids=fed, **given, **more).logits[:, -1].argmax(-1).tolist()
        return chosen

    made: list[list[int]] = [[] for _ in tails]
    rows = list(range(len(tails)))  # that still go on
    with torch.inference_mode():
        for start in range(0, width, piece or width):
            fed = ids[:, start : start + (piece or width)]
            chosen = forward(fed, seen + start + fed.shape[1])
        while True:
            going = []
            for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                if token in ends:
                    continue
                made[row].append(token)
                done = settled[row] if settled else None
                if len(made[row]) < most[row] and not (done is not None and done(made[row])):
                    going.append(place)
            if not going:
                return made
            if len(going) < len(rows):
                cache.batch_select_indices(torch.tensor(going, device=device))
                told = None if told is None else told[going]
            rows, fed = [rows[place] for place in going], ids.new_tensor([[chosen[place]] for place in going])
            if told is not None:
                told = torch.cat([told, told.new_ones(len(rows), 1)], 1)
            chosen = forward(fed, 0 if told is None else told.shape[1])


def takes_padding(model: nn.Module, cache: Any) -> bool:
    """Whether rows of unequal length can go on from ``cache`` together: each then is what it would be alone.

    So where every layer is a store of ours without a window (which counts columns, padding too), no states stand beside
    it, nothing is evicted any more by a schedule that counts tokens of a forward, and positions can be given.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    seen = int(cache.get_seq_length())
    return all(
        type(layer) is StoreLayer
        and layer.site.window is None
        and layer.strategy.schedule == "prefill"
        and seen > layer.strategy.kept_whole
        for layer in cache.layers
    )


def write(strategy: Decoding, request: Request) -> Written:
    """Write on from a prompt as ``strategy`` chooses; the port of the model must be open.

    Raises:
        UserError: the strategy does not write with this model.
    """
    if len(request.ids) != 1:
        raise UserError(f"{strategy.spec} writes on from one prompt at a time, not from {len(request.ids)}")
    if isinstance(strategy, DecodingLoop):
        return strategy.write(request, Access(request.model))
    if not isinstance(strategy, TokenChoice):
        raise TypeError(f"{type(strategy).__name__} is neither TokenChoice nor DecodingLoop")
    return _chosen(strategy, request)[0]


def write_each(
    strategy: Decoding, request: Request, copies: int, fresh: Callable[[Tensor], Any]
) -> list[list[Written]]:  # fmt: skip
    """Write on from all prompts of ``request``, ``copies`` times from each, side by side where the strategy can.

    The port of the model must be open.

    Args:
        strategy: as for :func:`write`.
        request: prompts ``[P, T]``; its cache is not used. Texts that are written alone have seeds one after another.
        copies: texts of each prompt, drawn independently.
        fresh: a cache that has read all of its ids ``[P, T]`` but the last token.

    Raises:
        UserError: the strategy does not write with this model.
    """
    if isinstance(strategy, BatchedLoop):
        return strategy.write_each(replace(request, cache=fresh(request.ids)), Access(request.model), copies)
    if isinstance(strategy, TokenChoice):
        ids = request.ids.repeat_interleave(copies, 0)
        made = _chosen(strategy, replace(request, ids=ids, cache=fresh(ids)))
        return [made[at : at + copies] for at in range(0, len(made), copies)]
    return [
        [
            write(strategy, replace(request, ids=ids[None], seed=request.seed + n * copies + m, cache=fresh(ids[None])))
            for m in range(copies)
        ]
        for n, ids in enumerate(request.ids)
    ]


def _chosen(strategy: TokenChoice, request: Request) -> list[Written]:
    """Every row's text, token by token; a row that has ended is fed what it chooses on, unseen."""
    read, ids, generator = Access(request.model).reader(request.cache), request.ids, request.generator()
    fed, made = ids[:, -1:], [list[int]() for _ in ids]
    forwards = [request.most] * len(made)
    with torch.inference_mode():
        for step in range(request.most):
            fed = strategy.choose(read(fed), ids, generator)[:, None]
            for row, token in enumerate(fed[:, 0].tolist()):
                if forwards[row] <= step:
                    continue
                if token in request.ends:
                    forwards[row] = step + 1
                else:
                    made[row].append(token)
            if max(forwards) <= step + 1:
                break
            ids = torch.cat([ids, fed], 1)
    return [Written(tokens, count) for tokens, count in zip(made, forwards, strict=True)]


def processor(strategy: TokenChoice, seed: int = 0) -> Any:
    """``strategy`` as a ``LogitsProcessor``, for ``model.generate(logits_processor=LogitsProcessorList([...]))``.

    It leaves one token of each row, so that ``generate`` takes it, drawing or not. Draws follow ``seed``.
    """
    from transformers import LogitsProcessor

    class Chosen(LogitsProcessor):
        def __init__(self) -> None:
            self.generator: torch.Generator | None = None

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if self.generator is None:
                self.generator = torch.Generator(scores.device).manual_seed(seed)
            chosen = strategy.choose(scores.float(), input_ids, self.generator)[:, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return Chosen()
