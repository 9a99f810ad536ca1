# SPDX-License-Identifier: Apache-2.0
"""Models that read images among text (LLaVA), whose decoder gets fewer tokens of them or hides some of them.

The projector's output is grouped; the decoder is given the columns that are left, at the positions that they had, and
its hidden states are made as many again: to every token what has become of its group. A cache holds fewer columns than
tokens were read; which is remembered on it, so that decoding goes on with masks and positions of all tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Site
from ..errors import UserError
from ..reducing import ImageHiding, ImageReducer, ImageTokens

__all__ = ["place_images"]

_KEPT = "_manyheads_kept_tokens"
_Entry = tuple[Site, nn.Module, Any]


def place_images(model: nn.Module, entries: Sequence[_Entry]) -> Callable[[], None]:
    """Reduce the tokens of images for strategies among ``entries``, and tell them where images stand; returns the undo.

    Raises:
        UserError: two strategies reduce them, or the model reads no images in a way that is known.
    """
    acting = [entry for entry in entries if isinstance(entry[2].strategy, ImageReducer | ImageHiding)]
    if not acting:
        return lambda: None
    names = list(dict.fromkeys(e.strategy.spec for _, _, e in acting))
    reducers = list(dict.fromkeys(e.strategy.spec for _, _, e in acting if isinstance(e.strategy, ImageReducer)))
    if len(reducers) > 1:
        raise UserError(f"{reducers[0]} and {reducers[1]} cannot hold together: each reduces the tokens of images")
    parts = {"language_model", "multi_modal_projector", "vision_tower"}
    owner: Any = next((m for m in model.modules() if parts <= m._modules.keys()), None)
    if owner is None:
        raise UserError(f"{names[0]} acts on models that read images through a projector, as LLaVA; give one")
    around = _Images(owner, names[0])
    for _, _, entry in acting:
        entry.state["images"] = around.tokens
        if isinstance(entry.strategy, ImageReducer):
            around.strategy = entry.strategy
            around.seen.append(entry.state)
    handles = [
        owner.register_forward_pre_hook(around.begin, with_kwargs=True),
        owner.language_model.register_forward_pre_hook(around.enter, with_kwargs=True),
        owner.language_model.register_forward_hook(around.leave, always_call=True),
    ]
    if around.strategy is not None:
        handles.append(owner.multi_modal_projector.register_forward_hook(around.group))

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


class _Images:
    """The images of one model, from forward to forward."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.tokens = owner, name, ImageTokens()
        self.strategy: ImageReducer | None = None
        self.seen: list[dict[str, Any]] = []
        self.ids: Tensor | None = None
        self.grouped: tuple[Tensor, Tensor] | None = None  # which patch stays, and which one a patch has become [N, V]
        self.back: Tensor | None = None

    def begin(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model: where images stand."""
        self.ids = kwargs.get("input_ids", args[0] if args else None)

    def group(self, projector: nn.Module, args: tuple[Any, ...], features: Tensor) -> Tensor:
        """Behind the projector: the mean of each group in the place of its member of the greatest weight."""
        assert self.strategy is not None
        count, patches = features.shape[:2]
        side = round(patches**0.5)
        if side * side != patches:
            raise UserError(f"{self.name} needs images with as many patches on each side, not {patches} in all")
        grouping, weights = self.strategy.group(features.detach(), (side, side), self.seen)
        into = grouping.into
        best = torch.full((count, grouping.count + 1), -torch.inf, dtype=weights.dtype, device=into.device)
        best = best.scatter_reduce(1, into, weights, "amax")
        first = torch.arange(patches, device=into.device).expand(count, -1)
        first = torch.where((weights == best.gather(1, into)) & (into < grouping.count), first, patches)
        chosen = torch.full_like(best, patches, dtype=torch.long).scatter_reduce(1, into, first, "amin")[:, :-1]
        if bool((chosen == patches).any()):
            raise UserError(f"{self.name} made a group without tokens; give more tokens or fewer clusters")
        kept = torch.zeros(count, patches, dtype=torch.bool, device=into.device).scatter(1, chosen, True)
        nobody = torch.where(kept, first.new_tensor(0), patches).argmin(1, keepdim=True)  # for a token of no group
        self.grouped = kept, torch.cat([chosen, nobody], 1).gather(1, into)
        means = grouping.reduce(features, weights)
        return features.scatter(1, chosen[..., None].expand_as(means), means)

    def enter(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the decoder: fewer columns, and masks and positions of those."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embeds is None:
            raise UserError(f"{self.name} acts on a model that reads images, not on its decoder alone")
        rows, length = embeds.shape[:2]
        memory = {} if cache is None else vars(cache).setdefault(_KEPT, {})
        device = embeds.device
        empty = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        before, columns = memory.get("kept", empty), memory.get("columns", empty)
        if cache is not None and not before.shape[1] and cache.get_seq_length():
            raise UserError(f"{self.name}: the cache was filled without it; fill it anew")
        if before.shape[0] != rows:
            raise UserError(f"{self.name}: the cache has read {before.shape[0]} rows, not {rows}; keep its rows")
        image = torch.zeros(rows, length, dtype=torch.bool, device=device)
        if self.ids is not None and self.ids.shape == image.shape:
            image = self.ids == self.owner.config.image_token_id
        keep, back = torch.ones_like(image), torch.arange(length, device=device).expand(rows, -1)
        if self.grouped is not None and bool(image.any()):
            kept, became = self.grouped
            if int(image.sum()) != kept.numel():
                raise UserError(f"{self.name}: give as many tokens as patches, and all images at once")
            keep = keep.masked_scatter(image, kept)
            # a patch becomes another of its image: as far away among the tokens as among the patches
            step = (became - torch.arange(kept.shape[1], device=device)).flatten()
            back = back + torch.zeros_like(back).masked_scatter(image, step)
        self.grouped = None
        left = keep.sum(1)
        if bool((left != left[0]).any()):
            raise UserError(f"{self.name}: rows have differently many images; read them one by one")
        index = keep.nonzero()[:, 1].view(rows, -1)
        self.back = None if bool(keep.all()) else (keep.long().cumsum(1) - 1).gather(1, back)
        past = before.shape[1]
        whole = torch.cat([before, keep], 1)
        real = self._placed(kwargs, whole, index, past, length)
        kwargs["inputs_embeds"] = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[2]))
        columns = torch.cat([columns, image.gather(1, index)], 1)
        memory |= {"kept": whole, "columns": columns}
        self.tokens.columns = columns if bool(columns.any()) else None
        self.tokens.real, self.tokens.memory = real, memory
        self.tokens.now.clear()
        return args, kwargs

    def _placed(self, kwargs: dict[str, Any], whole: Tensor, index: Tensor, past: int, length: int) -> Tensor:
        """Positions and mask of the columns at ``index [B, T']`` in ``kwargs``; which held columns are real."""
        given, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(given, dict):
            raise UserError(f"{self.name} takes masks as tensors, not one for each kind of layer; give [B, S]")
        rows = len(index)
        held = whole.nonzero()[:, 1].view(rows, -1)
        real = torch.ones_like(held, dtype=torch.bool)
        if given is not None and given.ndim == 2:
            if given.shape[1] != whole.shape[1]:
                raise UserError(f"{self.name} needs which of all tokens so far are real, [B, S], or no mask")
            if places is None:
                places = (given.long().cumsum(1) - 1).clamp(min=0)[:, past:]
            kwargs["attention_mask"] = given.gather(1, held)
            real = kwargs["attention_mask"].bool()
        elif given is not None:
            if given.shape[-2:] != (length, whole.shape[1]):
                raise UserError(f"{self.name}: a mask of all columns is needed, not {list(given.shape)}")
            cut = given.expand(rows, *given.shape[1:]).gather(
                2, index[:, None, :, None].expand(-1, given.shape[1], -1, given.shape[3])
            )
            kwargs["attention_mask"] = cut.gather(3, held[:, None, None].expand(-1, *cut.shape[1:3], -1))
        if places is None:
            places = past + torch.arange(length, device=index.device).expand(rows, -1)
        kwargs["position_ids"] = places.expand(rows, -1).gather(1, index)
        return real

    def leave(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Behind the decoder: as many tokens again."""
        back, self.back = self.back, None
        if output is not None and output.get("past_key_values") is not None:
            vars(output.past_key_values)[_KEPT] = self.tokens.memory  # a cache that the decoder made itself
        if back is None or output is None:
            return output

        def restored(hidden: Tensor) -> Tensor:
            return hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[2]))

        output.last_hidden_state = restored(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(map(restored, output.hidden_states))
        return output
