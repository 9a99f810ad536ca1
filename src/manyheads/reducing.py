# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that have a model work on fewer tokens: merged, pooled or selected, and restored.

One protocol for all: :meth:`Reducer.reduce` looks at tokens and gives a :class:`Reduction`, which makes them fewer
(``merge``) and makes as many again of what became of them (``restore``). It is no pair of tensors, since one choice of
tokens serves queries, keys and values, and may serve several layers.

Where tokens are fewer is what the two kinds below differ in. Around one attention (:class:`AttentionReducer`) the rest
of the block sees every token. In the stream (:class:`StreamReducer`) all blocks from one to another see fewer; a
:class:`LearnedReducer` does that in weights of its own.

In a model of images and text, tokens of images can be fewer between tower and decoder (:class:`ImageReducer`), or be
hidden from a decoder's words (:class:`ImageHiding`), or drop out of the decoder's stream layer by layer
(:class:`PromptReducer`), where those that are left keep their positions.
"""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError
from .strategy import AttentionEdit, AttentionPatch, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from torch import Tensor, nn

    from .attention.merging import Grouping
    from .call import AttentionCall, Site

__all__ = [
    "AttentionReducer", "ImageHiding", "ImageReducer", "ImageTokens", "Layout", "LearnedReducer", "Part",
    "PromptLayout", "PromptReducer", "Reducer", "Reduction", "StreamReducer",
]  # fmt: skip

Part = Literal["queries", "keys", "both"]
_LAYOUT, _REDUCTION = "layout", "reduction"


@dataclass(slots=True, eq=False)
class Layout:
    """How the tokens of one stage of a model stand in the forward at hand; the port keeps it.

    Attributes:
        grid: height and width of the patches of an image; None where tokens stand on none, as merged ones or words.
            Frames of a video stand below each other.
        frames: of a video (or pairs of them, as the model reads them), 1 of an image.
        prefix: tokens before them that stand for no patch (a class token, registers).
        stage, stages: which stage of how many, 0 of 1 in a model of one width.
        block: number of the block whose output is at hand, where the stream is reduced.
        stride: tokens of a side that are one key where attention reduces its keys itself (SegFormer).
        size: of the model's tokens that each one stands for, ``[B, N]``; None for one each.
        keys: ``[B, N, d]``, the mean over heads of the keys of the latest attention; None before the first. Only where
            the stream is reduced.
        kept: what is shared by layers until the forward ends, see :meth:`shared`.
    """

    grid: tuple[int, int] | None = None
    frames: int = 1
    prefix: int = 0
    stage: int = 0
    stages: int = 1
    block: int = 0
    stride: int = 1
    size: "Tensor | None" = None
    keys: "Tensor | None" = None
    kept: dict[Any, tuple[Any, int]] = field(default_factory=dict)

    def patches(self, spec: str) -> tuple[int, int]:
        """Height and width of the patches.

        Raises:
            UserError: tokens stand on no grid; ``spec`` is who asks.
        """
        if self.grid is None:
            raise UserError(f"{spec} needs the patches of an image, on their grid: give a model that reads images")
        return self.grid

    def of_keys(self, count: int) -> "Layout":
        """The layout of ``count`` keys: that of the tokens, or of a grid that attention has made coarser."""
        height, width = self.grid or (0, 0)
        if self.stride == 1:
            return self
        grid = height // self.stride, width // self.stride
        return dataclasses.replace(self, grid=grid if grid[0] * grid[1] == count else None, prefix=0)

    def shared(self, key: object, layers: int, make: "Callable[[], Any]") -> Any:
        """What ``make()`` gave at the first of ``layers`` layers in a row that ask for ``key`` in this forward."""
        found, left = self.kept.get(key, (None, 0))
        if not left:
            found, left = make(), layers
        self.kept[key] = found, left - 1
        return found

    def clear(self) -> None:
        """Forget what is of one forward."""
        self.grid = self.size = self.keys = None
        self.prefix, self.frames = 0, 1
        self.kept.clear()


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """Fewer tokens, and back.

    Attributes:
        merge: ``[B, N, C] -> [B, M, C]``, of the tokens and of whatever else stands for them; any number of channels.
        restore: ``[B, M, C] -> [B, N, C]``.
        size: of the model's tokens that each of M stands for, ``[B, M]``; None where that does not matter.
        grid: height and width of the M tokens behind the prefix where they stand on one.
    """

    merge: "Callable[[Tensor], Tensor]"
    restore: "Callable[[Tensor], Tensor]"
    size: "Tensor | None" = None
    grid: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, grouping: "Grouping", layout: Layout, x: "Tensor", *, weights: "Tensor | None" = None,
        grid: tuple[int, int] | None = None, change_of: "Tensor | None" = None,
    ) -> "Reduction":  # fmt: skip
        """Means of groups, and to every token what its group has become.

        Args:
            grouping: of N tokens.
            layout: of them; each counts as often as the tokens that it stands for.
            x: the tokens, of which device, dtype and number of rows are read.
            weights: ``[B, N]`` in the mean, instead of their sizes.
            grid: of the groups.
            change_of: the tokens ``[B, N, C]`` if every one is to keep what it was and is given what has changed of its
                group, rather than a copy of its group.
        """
        size = layout.size if layout.size is not None else x.new_ones(x.shape[:2])
        shares = size if weights is None else weights

        def merge(y: "Tensor") -> "Tensor":
            return grouping.reduce(y, shares)

        def restore(y: "Tensor") -> "Tensor":
            if change_of is None:
                return grouping.restore(y)
            return change_of + grouping.restore(y - merge(change_of))

        return cls(merge, restore, grouping.totals(size), grid)


class Reducer(Strategy):
    """Has a model work on fewer tokens."""

    kinds = frozenset({"self"})

    @abstractmethod
    def reduce(self, x: "Tensor", layout: Layout) -> Reduction | None:
        """How to reduce the tokens ``x [B, N, C]``, by which they are compared; None to leave them as they are."""

    def selects(self, site: "Site") -> bool:
        """Where a module does not know its layer, as in encoders of images, it is its place among the modules."""
        layer = site.index if site.layer is None else site.layer
        return site.kind in self.kinds and not site.causal and (self.layers is None or layer in self.layers)


class AttentionReducer(Reducer, AttentionEdit, AttentionPatch):
    """Reduces the queries, or the keys and values, of single attentions; their outputs are restored.

    Queries, keys and values are reduced behind their projections, which of means give the means.
    """

    @abstractmethod
    def part(self, layout: Layout) -> Part | None:
        """What is reduced in attentions of a stage; None for nothing."""

    @property
    @abstractmethod
    def proportional(self) -> bool:
        """Whether a key counts in the softmax as often as the keys that it stands for."""

    def check(self, call: "AttentionCall", fewer: "AttentionCall", layout: Layout) -> None:
        """Refuse what is not worth it, given a call and the same with fewer tokens; nothing is refused by default."""
        del call, fewer, layout

    def edit(self, call: "AttentionCall") -> "AttentionCall":
        layout: Layout = call.state[_LAYOUT]
        fewer = self._reduced(call, layout)
        if fewer is not call:
            self.check(call, fewer, layout)
        return fewer

    def _reduced(self, call: "AttentionCall", layout: Layout) -> "AttentionCall":
        part = self.part(layout)
        if part is None:
            return call
        if call.rotary is not None:
            raise UserError(
                f"{self.spec} merges queries and keys of several places, and {call.site.name} turns them by where they "
                "stand (rotary positions); use a model without, as ViT, DINOv2 or SegFormer"
            )
        alike = call.q.shape[2] == call.k.shape[2]
        if part == "keys":
            x = call.hidden if alike and call.hidden is not None else _joined(call.k)
            return self._fewer_keys(call, self.reduce(x, layout.of_keys(call.k.shape[2])))
        if part == "both" and not alike:
            raise UserError(f"{self.spec}: {call.site.name} has fewer keys than queries; reduce one of the two")
        reduction = self.reduce(_joined(call.q) if call.hidden is None else call.hidden, layout)
        if reduction is None:
            return call
        if any(x is not None and x.shape[-2] > 1 for x in (call.mask, call.bias)):
            raise UserError(f"{self.spec}: {call.site.name} has a mask for each query, which merged ones have not")
        call.state[_REDUCTION] = reduction
        fewer = call.replace(q=_each_head(call.q, reduction))
        return self._fewer_keys(fewer, reduction) if part == "both" else fewer

    def _fewer_keys(self, call: "AttentionCall", reduction: Reduction | None) -> "AttentionCall":
        if reduction is None:
            return call
        if any(x is not None and x.shape[-1] > 1 for x in (call.mask, call.bias)):
            raise UserError(f"{self.spec}: {call.site.name} has a mask of its keys (padding?), which merged ones lose")
        fewer = call.replace(k=_each_head(call.k, reduction), v=_each_head(call.v, reduction))
        return _counted(fewer, reduction.size) if self.proportional else fewer

    def patch(self, call: "AttentionCall", out: "Tensor") -> "Tensor":
        reduction: Reduction | None = call.state.pop(_REDUCTION, None)
        if reduction is None:
            return out
        restored: Tensor = reduction.restore(out.flatten(2)).unflatten(2, out.shape[2:])
        return restored


class StreamReducer(Reducer, AttentionEdit):
    """Reduces the residual stream at the outputs of blocks; the blocks behind see fewer tokens, until it is restored.

    ``layers`` are the blocks. Means of tokens that blocks have already changed are not what these blocks make of means:
    unlike around an attention, it matters how early tokens become fewer.
    """

    @property
    @abstractmethod
    def proportional(self) -> bool:
        """Whether a key counts in the softmax as often as the tokens that it stands for."""

    def selects(self, site: "Site") -> bool:
        """At every attention, since later ones have to know what a token stands for."""
        return site.kind in self.kinds and not site.causal

    def reduces_at(self, block: int, blocks: int) -> bool:
        """Whether the output of ``block`` of ``blocks`` is reduced; that of the last never is."""
        return block < blocks - 1 and (self.layers is None or block in self.layers)

    def restores_at(self, block: int, blocks: int) -> bool:
        """Whether the output of ``block`` is restored, before it may be reduced again."""
        return block == blocks - 1

    def edit(self, call: "AttentionCall") -> "AttentionCall":
        layout: Layout = call.state[_LAYOUT]
        layout.keys = call.k.mean(1)
        return _counted(call, layout.size) if self.proportional else call


class LearnedReducer(StreamReducer):
    """Reduces the stream in weights of its own, which are trained together with the model."""

    @abstractmethod
    def new_weights(self, dim: int, blocks: int) -> "nn.Module":
        """Weights for a model of ``blocks`` blocks of width ``dim``, as they are before any training."""

    @abstractmethod
    def having(self, weights: "nn.Module") -> "Self":
        """This strategy with ``weights``, which may be in training, rather than those of a folder."""


@dataclass(slots=True, eq=False)
class PromptLayout:
    """What the tokens of a prompt are, those that are left at the block at hand; the port keeps it.

    Attributes:
        image: which stand for patches of images, bool ``[B, N]``.
        asking: which are text behind the last of them, bool ``[B, N]``.
        whole: tokens of images that each row had at first.
        block, blocks: which block is next, or at hand in its attention, of how many.
        received: what each token was given by attention, ``[B, N]``, as the strategy counts it; None before it has.
    """

    image: "Tensor"
    asking: "Tensor"
    whole: int
    block: int = 0
    blocks: int = 1
    received: "Tensor | None" = None


class PromptReducer(AttentionEdit):
    """Drops tokens of images from the stream of a decoder, from some block on; text is never dropped.

    A call's ``state["prompt"]`` has the :class:`PromptLayout` while a prompt with images is read, and None otherwise.
    """

    kinds = frozenset({"self"})

    def selects(self, site: "Site") -> bool:
        return site.kind in self.kinds and site.causal

    @abstractmethod
    def reduce(self, x: "Tensor", layout: PromptLayout) -> "tuple[Tensor, Tensor] | None":
        """What goes into the block at hand instead of ``x [B, N, C]``; None for ``x`` itself.

        Returns:
            Which of the N tokens stay, ``[B, M]``, ascending, and the M tokens ``[B, M, C]``.
        """


@dataclass(slots=True, eq=False)
class ImageTokens:
    """Tokens of images in the forward of a model that reads them; the port keeps it under ``images`` in a call's state.

    Attributes:
        columns: which of the keys that the decoder holds are of images, bool ``[B, S]``; None where none is.
        real: which of them are no padding, bool ``[B, S]``.
        now: what layers of one forward leave to the next.
        memory: what lasts as long as the model's cache.
    """

    columns: "Tensor | None" = None
    real: "Tensor | None" = None
    now: dict[Any, Any] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)


class ImageReducer(AttentionEdit):
    """Gives a decoder fewer tokens of each image than its tower and projector made, as many of every one.

    It looks at the tower's attention, and changes none. What is left of a group stands where the member of the
    greatest weight stood; behind the decoder every token has the state of its group, so that outputs have their shape.
    """

    kinds = frozenset({"self"})

    def selects(self, site: "Site") -> bool:
        return site.kind in self.kinds and not site.causal

    @abstractmethod
    def group(
        self, features: "Tensor", grid: tuple[int, int], seen: "Sequence[dict[str, Any]]"
    ) -> "tuple[Grouping, Tensor]":
        """Groups of the tokens of images, and the weight of each in the mean of its group.

        Args:
            features: ``[N, V, D]``, behind the projector.
            grid: height and width, V patches.
            seen: states of the tower's attentions in their order, as :meth:`edit` left them.

        Returns:
            A grouping of as many groups for each image, none of them empty, and ``[N, V]``.
        """


class ImageHiding(AttentionEdit):
    """Hides tokens of images in a decoder's layers, by what attention gave them in earlier ones."""

    kinds = frozenset({"self"})

    def selects(self, site: "Site") -> bool:
        return site.kind in self.kinds and site.causal


def _joined(heads: "Tensor") -> "Tensor":
    """``[B, H, N, d] -> [B, N, H * d]``."""
    return heads.transpose(1, 2).flatten(2)


def _each_head(heads: "Tensor", reduction: Reduction) -> "Tensor":
    """``[B, H, N, d] -> [B, H, M, d]``."""
    count, width = heads.shape[1], heads.shape[3]
    fewer: Tensor = reduction.merge(_joined(heads)).unflatten(2, (count, width)).transpose(1, 2)
    return fewer


def _counted(call: "AttentionCall", size: "Tensor | None") -> "AttentionCall":
    """The call in which a key that stands for n weighs as n keys: log n is added to its logits (ToMe)."""
    if size is None:
        return call
    bias = size.log().to(call.q.dtype)[:, None, None]
    return call.replace(bias=bias if call.bias is None else call.bias + bias)
