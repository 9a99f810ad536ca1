# SPDX-License-Identifier: Apache-2.0
"""Decoders that work on fewer tokens of images from some block on (``reducing.PromptReducer``).

Hooks before the blocks shorten the stream, and with it what every block is given for its tokens: mask and positions,
rotary tables too. Tokens keep their positions. Behind the last block the stream is as long as it was, dropped tokens as
they were when they were dropped, so that heads and losses find their places. A layer's cache holds the tokens that it
has seen; which columns those are is remembered on the cache, for masks of later forwards.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Site
from ..errors import UserError
from ..reducing import PromptLayout, PromptReducer
from ..strategy import Cache
from .cache import find_cache

__all__ = ["reduce_prompts"]

_COLUMNS = "_manyheads_columns"
_TOKENS = ("image_token_id", "image_token_index")
_Entry = tuple[Site, nn.Module, Any]


def reduce_prompts(model: nn.Module, entries: Sequence[_Entry]) -> Callable[[], None]:
    """Put hooks on the decoder that the one such strategy acts in, if there is one; returns what takes them off.

    Raises:
        UserError: several strategies, one that keeps the cache beside it, or a model that reads no images among text.
    """
    mine = [entry for entry in entries if isinstance(entry[2].strategy, PromptReducer)]
    if not mine:
        return lambda: None
    strategy = mine[0][2].strategy
    others = [entry[2].strategy for entry in entries if isinstance(entry[2].strategy, (PromptReducer, Cache))]
    if wrong := [other for other in others if other is not strategy]:
        raise UserError(
            f"{strategy.spec} and {wrong[0].spec} cannot hold together: each says which tokens layers remember"
        )
    found = [_reader(model, site.name) for site, _, _ in mine]
    reader, blocks = found[0]
    if reader is None or blocks is None or any(other is not blocks for _, other in found):
        raise UserError(
            f"{strategy.spec} drops tokens of images from a decoder that reads them among text, which "
            f"{type(model).__name__} does not; use a model as LLaVA"
        )
    prompt = _Prompt(strategy, reader, [entry for _, _, entry in mine], len(blocks))
    handles = [
        reader.register_forward_pre_hook(prompt.begin, with_kwargs=True),
        reader.register_forward_hook(prompt.end, always_call=True),
        *(block.register_forward_pre_hook(prompt.entering(i), with_kwargs=True) for i, block in enumerate(blocks)),
        blocks[-1].register_forward_hook(prompt.leaving),
    ]

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


def _reader(model: nn.Module, name: str) -> tuple[Any, nn.ModuleList | None]:
    """The innermost module around ``name`` that reads ids with images among them, and the list of blocks on the way."""
    parts, blocks = name.split("."), None
    for end in range(len(parts) - 1, -1, -1):
        module: Any = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.ModuleList):
            blocks = module
        config = getattr(module, "config", None)
        reads = "pixel_values" in inspect.signature(type(module).forward).parameters
        if reads and any(getattr(config, token, None) is not None for token in _TOKENS):
            return module, blocks
    return None, None


class _Prompt:
    """One forward of a decoder after the other."""

    def __init__(self, strategy: PromptReducer, reader: Any, bound: Sequence[Any], blocks: int) -> None:
        config = reader.config
        self.token = int(next(found for name in _TOKENS if (found := getattr(config, name, None)) is not None))
        self.strategy, self.bound, self.blocks = strategy, bound, blocks
        self.image: Tensor | None = None
        self.text: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self.layout: PromptLayout | None = None
        self.rows: Tensor | None = None  # of the forward's tokens, those at hand, once some are dropped
        self.full: Tensor | None = None  # the stream of all tokens, dropped ones as they were

    def begin(self, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See which of the tokens stand for images."""
        self.end()
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dtype.is_floating_point:
            if kwargs.get("pixel_values") is not None:
                raise UserError(f"{self.strategy.spec} finds images by their ids: give input_ids, not embeddings")
            return
        self.image = ids == self.token
        real = torch.ones_like(self.image)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        self.text = real & ~self.image

    def end(self, *_: Any) -> None:
        """Forget what is of one forward."""
        self.image = self.text = None
        self._forget()
        self._tell()

    def _tell(self) -> None:
        for entry in self.bound:
            entry.state["prompt"] = self.layout

    def _first(self, hidden: Tensor) -> None:
        """At the first block: the layout, where there are images in what is read."""
        self._forget()
        if self.image is not None and self.text is not None and bool(self.image.any()):
            if self.image.shape != hidden.shape[:2]:
                raise UserError(f"{self.strategy.spec} needs an id for every token that the decoder reads")
            counts = self.image.sum(1)
            if bool((counts != counts[0]).any()):
                raise UserError(
                    f"{self.strategy.spec} reads rows of equally many tokens of images: run them one by one"
                )
            later = self.image.flip(1).long().cumsum(1).flip(1) == 0
            self.layout = PromptLayout(self.image, self.text & later, int(counts[0]), 0, self.blocks)
        self._tell()

    def entering(self, number: int) -> Callable[[nn.Module, Any, Any], Any]:
        """The hook before the block of that number."""

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                self._first(hidden)
            changed = self._reduced(hidden, number)
            cache = find_cache(*kwargs.values(), *args)
            more = self._given(kwargs, number, cache, self.rows, len(hidden))
            if changed is hidden and more is kwargs:
                return None
            return ((changed, *args[1:]), more) if args else (args, {**more, "hidden_states": changed})

        return hook

    def _reduced(self, hidden: Tensor, number: int) -> Tensor:
        layout = self.layout
        if layout is None:
            return hidden
        layout.block = number
        found = self.strategy.reduce(hidden, layout) if number else None
        layout.received = None
        if found is None:
            return hidden
        kept, fewer = found
        self.full = hidden if self.full is None or self.rows is None else _put(self.full, self.rows, hidden)
        self.rows = kept if self.rows is None else self.rows.gather(1, kept)
        layout.image, layout.asking = (x.gather(1, kept) for x in (layout.image, layout.asking))
        return fewer

    def _given(
        self, kwargs: dict[str, Any], number: int, cache: Any, rows: Tensor | None, batch: int
    ) -> dict[str, Any]:  # fmt: skip
        """What a block is given beside the stream, of the tokens at hand and the columns that its cache holds."""
        tables, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        places = kwargs.get("position_ids")
        count = tables[0].shape[-2] if tables else 0 if places is None else places.shape[-1]
        columns = _held(cache, number, rows, count, batch)
        if rows is None and columns is None:
            return kwargs
        more = dict(kwargs)
        if isinstance(mask, Tensor):
            if mask.ndim != 4:
                raise UserError(f"{self.strategy.spec} needs a mask of each query: load with attn_implementation=sdpa")
            mask = mask.expand(batch, -1, -1, -1)
            if rows is not None:
                mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
            if columns is None and rows is not None:
                columns = rows
            assert columns is not None
            more["attention_mask"] = mask.gather(3, columns[:, None, None].expand(-1, *mask.shape[1:3], -1))
        if rows is not None:
            if tables:
                more["position_embeddings"] = tuple(_taken(x, rows) for x in tables)
            if isinstance(places, Tensor):
                more["position_ids"] = _taken(places[..., None], rows)[..., 0]
        return more

    def leaving(self, block: nn.Module, args: Any, output: Any) -> Any:
        """Behind the last block: every token again."""
        if self.full is None or self.rows is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        whole = _put(self.full, self.rows, hidden)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _put(full: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    """``full [B, T, C]`` with ``hidden [B, M, C]`` at ``rows [B, M]``."""
    return full.scatter(1, rows[..., None].expand_as(hidden), hidden)


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """Of ``x [..., B or 1, T, d]`` the ``rows [B, M]``; in front there may be axes of positions (M-RoPE)."""
    x = x.expand(*x.shape[:-3], len(rows), *x.shape[-2:])
    return x.gather(-2, rows[..., None].expand(*x.shape[:-3], *rows.shape, x.shape[-1]))


def _held(cache: Any, number: int, rows: Tensor | None, count: int, batch: int) -> Tensor | None:
    """Columns ``[B, S']`` of all read so far that this layer has, those of this forward too; None for all of them.

    Args:
        cache: on which they are remembered; None without one.
        number: of the layer.
        rows: of the forward's ``count`` tokens, those that the layer reads; None for all.
        count: tokens of the forward.
        batch: B.
    """
    if cache is None:
        return None
    kept = cache.__dict__.setdefault(_COLUMNS, {})
    past = kept.get(("seen", number), 0) if number in kept else int(cache.get_seq_length()) - (count if number else 0)
    before: Tensor | None = kept.get(number)
    if before is None and rows is None:
        return None
    device = rows.device if rows is not None else before.device if before is not None else None
    new = torch.arange(count, device=device).expand(batch, -1) if rows is None else rows
    before = torch.arange(past, device=device).expand(batch, -1) if before is None else before
    kept[number], kept["seen", number] = torch.cat([before, past + new], 1), past + count
    found: Tensor = kept[number]
    return found
