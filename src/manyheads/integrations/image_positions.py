# SPDX-License-Identifier: Apache-2.0
"""Models that read images among text, with positions and a mask of a strategy's (``strategy.ImagePositions``).

What is around the vision-language model finds the images among the tokens that it is given, and hands the decoder
positions and, where a mask says more than "the past", a mask of its own. What a cache has seen is remembered on the
cache, so that decoding, further turns with further images and another port go on from there.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attention.image_layout import Block, ImageLayout
from ..call import Site
from ..errors import UserError
from ..strategy import ImagePositions
from .cache import find_cache
from .functions import own_function
from .module_calls import wrap_call

__all__ = ["ImageReader", "read_images"]

_PLAIN, _AXES = ("llava",), ("qwen2_vl", "qwen2_5_vl")  # by what their positions are
_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_LAYOUT, _GRIDS = "_manyheads_images", "_manyheads_grids"


def read_images(
    model: nn.Module, sites: Sequence[tuple[Site, nn.Module]], strategies: Sequence[ImagePositions]
) -> tuple["ImageReader", Callable[[], None]]:
    """Put the one strategy around the model that reads images; return what does it, and what takes it off.

    Raises:
        UserError: several strategies, layers that are chosen, or a model whose images or attention it cannot place.
    """
    strategy = strategies[0]
    if len(strategies) > 1:
        raise UserError(f"{strategy.spec} and {strategies[1].spec} cannot hold together: each places the images")
    if strategy.layers is not None:
        raise UserError(f"{strategy.spec}: positions are the same in all layers; leave layers away")
    owner: Any = next((m for m in model.modules() if _reads_images(m)), None)
    if owner is None:
        known = ", ".join((*_PLAIN, *_AXES))
        raise UserError(f"{strategy.spec} places the images of a model that reads them, of the kinds {known}; give one")
    if any(isinstance(around, ImageReader) for around in getattr(vars(owner).get("_manyheads_calls"), "around", ())):
        raise UserError(f"{strategy.spec} and another strategy of an open port both place the images of one model")
    if strategy.one_axis and owner.config.model_type in _AXES:
        raise UserError(
            f"{strategy.spec} turns by one position, and {type(model).__name__} has axes of time, height and width "
            "already (M-RoPE); use a model with plain RoPE, as LLaVA"
        )
    inside = [(site, module) for site, module in sites if site.causal]
    if named := next((name for _, module in inside if (name := own_function(module)) is not None), None):
        raise UserError(
            f"{strategy.spec} needs masks, which {named!r} may not take: load with attn_implementation=sdpa"
        )
    if any(site.window is not None for site, _ in inside):
        raise UserError(
            f"{strategy.spec}: layers with a sliding window count columns, not positions; use another model"
        )
    reader = ImageReader(owner, strategy)
    restorers = [wrap_call(owner, reader)[1], *(_sized(owner, reader, kind) for kind in _PIXELS)]

    def restore() -> None:
        for each in restorers:
            each()

    return reader, restore


def _reads_images(module: nn.Module) -> bool:
    """Whether ``module`` gives a decoder the embeddings of images, with positions that may be chosen."""
    named = getattr(getattr(module, "config", None), "model_type", None) in (*_PLAIN, *_AXES)
    return named and isinstance(module, PreTrainedModel) and "language_model" in module._modules


def _sized(owner: Any, reader: "ImageReader", kind: str) -> Callable[[], None]:
    """Have what encodes images write their grids on the features: ``generate`` encodes before it calls the model."""
    name = f"get_{kind}_features"
    encode = getattr(owner, name, None)
    if encode is None:
        return lambda: None
    before, names = vars(owner).get(name), list(inspect.signature(encode).parameters)

    @functools.wraps(encode)  # generate reads its signature
    def encoded(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        features = getattr(out, "pooler_output", None)
        if features is not None:
            grids = reader.grids(kind, dict(zip(names, args, strict=False)) | kwargs)
            for feature, each in zip(features, grids, strict=True):
                vars(feature)[_GRIDS] = each
        return out

    object.__setattr__(owner, name, encoded)

    def restore() -> None:
        if before is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)

    return restore


class ImageReader:
    """Around the calls of a model that reads images; made by :func:`read_images`."""

    def __init__(self, owner: Any, strategy: ImagePositions) -> None:
        self.owner, self.strategy, self.called = owner, strategy, False
        self.names = [name for name in inspect.signature(type(owner).forward).parameters if name != "self"]

    def check(self) -> None:
        """Raise UserError where the model has not run: nothing was placed."""
        if not self.called:
            raise UserError(f"{self.strategy.spec} placed no image: the model did not run in the block")

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One forward of the model, at positions and under the mask of the strategy."""
        self.called = True
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if torch.compiler.is_compiling():
            raise UserError(
                f"{self.strategy.spec} places each token as it comes, which cannot be compiled: leave it away"
            )
        cache = find_cache(*given.values())
        seen = 0 if cache is None else int(cache.get_seq_length())
        layout = self._layout(given, cache, seen)
        new, held = layout.real.shape[1] - seen, layout.real.shape[1]
        places = self.strategy.position_ids(layout)[:, seen:]
        given["position_ids"] = places.expand(3, -1, -1) if self.owner.config.model_type in _AXES else places
        if new > 1:
            allowed = self.strategy.allowed(layout, new)
            wide = held if cache is None else max(held, int(cache.get_mask_sizes(new, 0)[0]))
            given["attention_mask"] = nn.functional.pad(allowed, (0, wide - held))[:, None]
        out = inner(**given)
        made = find_cache(*(out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else ()))
        if (kept := cache if made is None else made) is not None:
            vars(kept)[_LAYOUT] = layout
        return out

    def _layout(self, given: dict[str, Any], cache: Any, seen: int) -> ImageLayout:
        """Of the columns that the cache holds and those of this call."""
        name, ids = self.strategy.spec, given.get("input_ids")
        if ids is None:
            raise UserError(f"{name} finds images by their tokens: give input_ids, not inputs_embeds")
        rows, new = ids.shape
        told = given.get("attention_mask")
        if told is not None and (told.ndim != 2 or told.shape[1] < seen + new):
            raise UserError(
                f"{name} has masks of its own: give none, or which of all tokens so far are real, [B, S]; generate "
                "makes another for a cache of fixed size: leave cache_implementation away"
            )
        real = torch.ones(rows, seen + new, dtype=torch.bool) if told is None else told[:, : seen + new].bool()
        real = real.to(ids.device)
        before = None if cache is None else vars(cache).get(_LAYOUT)
        if not seen:
            return ImageLayout.of(real, list(self._blocks(given)))
        if before is None or before.real.shape[1] < seen:
            raise UserError(
                f"{name}: the cache was filled without it, where its images stand is not known; fill it anew"
            )
        before = before.first(seen)
        if before.real.shape[0] != rows:
            raise UserError(f"{name}: the cache has read {before.real.shape[0]} rows, not {rows}; keep its rows")
        before = ImageLayout(real[:, :seen], before.image, before.cell)
        return before.followed_by(ImageLayout.of(real[:, seen:], list(self._blocks(given)), before.images))

    def _blocks(self, given: dict[str, Any]) -> Iterator[Block]:
        """Images and frames among the tokens of a call, in the order that the model is given them."""
        ids, config, name = given["input_ids"], self.owner.config, self.strategy.spec
        for kind, pixels in _PIXELS.items():
            token = getattr(config, f"{kind}_token_id", None)
            features = (given.get("mm_encoder_outputs") or {}).get(kind)
            none = given.get(pixels) is None and features is None
            if token is None or (none and ids.shape[1] == 1):  # a token that was made
                continue
            found = [] if none else self.grids(kind, given) if features is None else self._written(kind, features)
            sizes = [size for grids in found for size in grids]
            at, counts = (ids == token).nonzero().cpu(), [h * w for h, w in sizes]
            if len(at) != sum(counts):
                raise UserError(
                    f"{name}: {len(at)} tokens stand for {kind}s of {sum(counts)} patches; give as many tokens as "
                    f"patches, and the {kind}s by {pixels}, all at once"
                )
            for block, size in zip(at.split(counts) if counts else (), sizes, strict=True):
                row, start = block[0].tolist()
                if block[-1].tolist() != [row, start + len(block) - 1]:
                    raise UserError(f"{name}: the tokens of one {kind} are parted by others; let them stand together")
                yield row, start, *size

    def _written(self, kind: str, features: Any) -> list[list[tuple[int, int]]]:
        """The grids that stand on the features of images."""
        found = [vars(feature).get(_GRIDS) for feature in features.pooler_output]
        if not all(found):
            raise UserError(
                f"{self.strategy.spec}: these features of {kind}s have no sizes; give the {kind}s themselves"
            )
        return found

    def grids(self, kind: str, given: dict[str, Any]) -> list[list[tuple[int, int]]]:
        """Heights and widths in patches of the images of a call, for a video those of its frames."""
        config, name = self.owner.config, self.strategy.spec
        if config.model_type in _AXES:
            merge = config.vision_config.spatial_merge_size
            return [[(h // merge, w // merge)] * t for t, h, w in given[f"{kind}_grid_thw"].tolist()]
        if given.get("image_sizes") is not None:
            raise UserError(
                f"{name}: images of several sizes in one tensor have tokens between rows; leave image_sizes away"
            )
        chosen = given.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
        if chosen == "full":
            raise UserError(f"{name}: the tower's first token is no patch; set vision_feature_select_strategy=default")
        patch, (count, _, height, width) = config.vision_config.patch_size, given["pixel_values"].shape
        return [[(height // patch, width // patch)]] * count
