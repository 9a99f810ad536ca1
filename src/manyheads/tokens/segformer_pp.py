# SPDX-License-Identifier: Apache-2.0
"""Segformer++: tokens that are alike are merged around attention, so that images of high resolution cost less.

"Segformer++: Efficient Token-Merging Strategies for High-Resolution Semantic Segmentation", arXiv 2405.14467; released
code KieDani/SegformerPlusPlus. Attention compares every query with every key; neighbouring patches of sky or road ask
and answer nearly the same. Around each attention (the rest of the block sees every token) queries or keys are merged:
the first token of every cell of ``c x c`` patches is a target, the fraction r of all tokens that is most like some
target joins it (the mean), and what comes out for a merged query is copied to all its tokens. As presets, by stage:

    hq      keys and values in the first half of the stages, r = 0.6, c = 2; queries in the rest, r = 0.8, c = 4
    fast    the same with r = 0.9, c = 4 everywhere
    2x2     queries are averages over 2 x 2 patches in all stages

Shapes: hidden states ``[B, N, C]``; queries ``[B, H, N, d]``, keys ``[B, H, S, d]`` with ``S = N / R**2`` where
SegFormer reduces them by R itself. A ViT is one stage of full width and is treated as SegFormer's last. A class token
and registers are never merged.

Where this follows neither, each an option that is off by default: ``proportional`` lets a merged key count as often as
the keys that it stands for (log of their number on its logits, as ToMe), ``every`` uses one matching for several layers
in a row, ``reach`` compares with the targets of nearby cells alone. The released presets ``bsm_fast`` and ``n2d_2x2``
name modes that its code does not know, so that nothing is merged; here an unknown preset is an error. Queries and keys
are merged behind their projections, which is the same but for rounding, since both are linear; the projections
themselves are not saved. Keys that SegFormer has reduced are compared as keys, the released code compares what they are
projected from.

Merging that by count costs more than it saves is refused; a count sees no launches, ``refuse=measured`` times both.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention.grid_merging import behind, matched_cells, pooled_cells
from ..attention.merging import Choice, Grouping
from ..call import AttentionCall
from ..errors import UserError
from ..reducing import AttentionReducer, Layout, Part, Reduction

__all__ = ["SegformerPP"]

_PRESETS: dict[str, tuple[tuple[Part, float, int], tuple[Part, float, int]]] = {
    "hq": (("keys", 0.6, 2), ("queries", 0.8, 4)),
    "fast": (("keys", 0.9, 4), ("queries", 0.9, 4)),
    "2x2": (("queries", 0.75, 2), ("queries", 0.75, 2)),
}
_PASSES, _PASS = 12, 32  # passes over the tokens of matching, merging and restoring; multiply-adds that one entry costs
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class SegformerPP(AttentionReducer):
    """Merges queries or keys around the attentions of an encoder of images.

    Attributes:
        preset: ``hq``, ``fast`` or ``2x2``.
        ratio, cell, of: instead of the preset's; None for its own.
        proportional: a merged key weighs as many.
        every: layers in a row that one matching serves.
        reach: cells on each side that are compared; 0 for all.
        choose: ``random`` is a control.
        refuse: what is refused. ``counted``: attention whose matching and merging cost more multiply-adds than they
            save, an entry that is read and written taken for 32 of them; ``measured``: more seconds, timed at the first
            call of a shape on its device; ``never``.
    """

    preset: Literal["hq", "fast", "2x2"] = field(default="hq", metadata={"help": "how much is merged where"})
    ratio: float | None = field(default=None, metadata={"help": "fraction of the tokens that join another"})
    cell: int | None = field(default=None, metadata={"help": "patches of a cell's side, one target each"})
    of: Part | None = field(default=None, metadata={"help": "what is merged, in all stages"})
    proportional: bool = field(default=False, metadata={"help": "a merged key weighs as many in the softmax"})
    every: int = field(default=1, metadata={"help": "layers in a row that one matching serves"})
    reach: int = field(default=0, metadata={"help": "cells on each side that are compared; 0 for all"})
    choose: Choice = field(default="similar", metadata={"help": "random: a control"})
    refuse: Literal["counted", "measured", "never"] = field(
        default="counted", metadata={"help": "refuse merging that costs more than it saves"}
    )

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise UserError(f"{self.slug}: there is no preset {self.preset!r}; there are {', '.join(_PRESETS)}")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(f"{self.slug}: ratio is a fraction of at least 0 and below 1, not {self.ratio}")
        if (self.cell is not None and self.cell < 2) or self.every < 1 or self.reach < 0:
            raise UserError(f"{self.slug}: cell is at least 2, every at least 1, reach at least 0")
        if self.preset == "2x2" and (self.ratio or self.reach or self.choose != "similar"):
            raise UserError(f"{self.slug}: 2x2 averages whole cells, without ratio, reach and choose; give hq or fast")

    def _at(self, layout: Layout) -> tuple[Part, float, int]:
        """What is merged at a stage, which fraction of it, and the side of a cell."""
        part, ratio, cell = _PRESETS[self.preset][layout.stage >= layout.stages // 2]
        return self.of or part, ratio if self.ratio is None else self.ratio, self.cell or cell

    def part(self, layout: Layout) -> Part | None:
        part, ratio, _ = self._at(layout)
        return part if ratio else None

    def reduce(self, x: Tensor, layout: Layout) -> Reduction | None:
        _, ratio, cell = self._at(layout)
        grid = layout.patches(self.spec)
        cell = min(cell, *grid)
        if cell < 2:
            return None
        joins = int(ratio * (x.shape[1] - layout.prefix))

        def match() -> Grouping:
            tail = x[:, layout.prefix :]
            if self.preset == "2x2":
                grouping = pooled_cells(len(x), grid, cell, x.device)
            else:
                grouping = matched_cells(tail, grid, cell, joins, reach=self.reach, choose=self.choose)
            return behind(layout.prefix, grouping)

        return Reduction.of(layout.shared((self.spec, x.shape[:2]), self.every, match), layout, x)

    def check(self, call: AttentionCall, fewer: AttentionCall, layout: Layout) -> None:
        shape = call.q.shape, call.k.shape
        if self.refuse == "never" or call.state.get("pays") == shape:
            return
        cost, saved = (self._counted if self.refuse == "counted" else self._measured)(call, fewer, layout)
        if cost >= saved:
            what = "multiply-adds" if self.refuse == "counted" else "ms"
            raise UserError(
                f"{self.spec}: merging costs more than it saves at {call.q.shape[2]} queries and {call.k.shape[2]} "
                f"keys of {call.site.name}, {cost:.3g} {what} against {saved:.3g}: give larger images or every=..., "
                "choose layers, or set refuse=never"
            )
        call.state["pays"] = shape

    def _counted(self, call: AttentionCall, fewer: AttentionCall, layout: Layout) -> tuple[float, float]:
        """Multiply-adds of a row that merging costs, and that it saves."""
        width = call.q.shape[1] * call.q.shape[3]
        count, left = (call.q.shape[2], fewer.q.shape[2])
        if count == left:
            count, left = (call.k.shape[2], fewer.k.shape[2])
        cell = self._at(layout)[2]
        targets = 0 if self.preset == "2x2" else (2 * self.reach + 1) ** 2 if self.reach else count // cell**2
        matching = count * targets * (width + 3 * _PASS) / self.every
        pairs = call.q.shape[2] * call.k.shape[2] - fewer.q.shape[2] * fewer.k.shape[2]
        return matching + _PASSES * _PASS * count * width, 2.0 * pairs * width

    def _measured(self, call: AttentionCall, fewer: AttentionCall, layout: Layout) -> tuple[float, float]:
        """Milliseconds that merging takes, and that it saves; a matching for several layers counts in parts."""
        part = self.part(layout)
        of_keys = part == "keys"
        x = call.k.transpose(1, 2).flatten(2) if of_keys else call.q.transpose(1, 2).flatten(2)
        at = layout.of_keys(call.k.shape[2]) if of_keys else layout

        def merge() -> Tensor:
            at.kept.clear()
            reduction = self.reduce(x, at)
            assert reduction is not None
            return reduction.restore(reduction.merge(x))

        kept = dict(layout.kept)
        merging = _milliseconds(merge, x.device) / self.every
        layout.kept.update(kept)
        whole, less = (
            _milliseconds(partial(scaled_dot_product_attention, c.q, c.k, c.v, scale=c.scale), x.device)
            for c in (call, fewer)
        )
        return merging, whole - less


def _milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Median of a few runs behind one that is not counted."""
    taken = []
    for _ in range(1 + _ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken[1:])
