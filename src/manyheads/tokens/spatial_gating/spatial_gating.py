# SPDX-License-Identifier: Apache-2.0
"""AdaToken-3D: layer by layer a decoder drops the tokens of a scene that its question attends to least.

"AdaToken-3D: Dynamic Spatial Gating for Efficient 3D Large Multimodal-Models Reasoning". A scene in 3D is hundreds or
thousands of tokens in front of a short question. What flows from a token s of it to the question in layer l is

    c_l(s) = mean over heads and over the question's tokens t of A_l[t, s]

and few tokens have nearly all of it. From the block ``start`` on, the least set of tokens with the part ``eta`` of the
flow of the layer before stays, whenever that is so many fewer (``step``) that it pays; the others leave the stream and
the caches of all later layers. How many stay is told by each input anew or, with a ``schedule``, fixed beforehand for
the model at hand from the curves of a few inputs (:func:`.schedule_of`), so that each architecture has its own.

    with manyheads.use(model, "spatial_gating:eta=0.95"): ...                       a model as LLaVA; each input anew
    python -m manyheads.recipes.spatial_gating --model FOLDER                       prints a schedule

:mod:`.flow` says of a model what part of its tokens receives next to nothing, without dropping any.

We had the abstract and no code. Inferred: the mean over heads and question tokens; that the flow of one layer decides
for the next; eta = .95, first at block 2 (earlier layers mix broadly), a step of a tenth, at least 5 % and 16 tokens;
schedules that never rise, of the medians over inputs; tokens of several images (views, distances) compared together.
Rows of a batch keep equally many: as the one that needs most. Tokens keep their positions, and text is never dropped.
``by`` has what it is compared with at equal numbers: the last token alone (as FastV), chance, and means of stretches.
Beams are not followed where rows are padded. Shapes: hidden states ``[B, N, C]``.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...call import AttentionCall
from ...errors import UserError
from ...reducing import PromptLayout, PromptReducer
from .contributions import needed, received

__all__ = ["By", "SpatialGating"]

By = Literal["question", "last", "random", "pooled"]


@dataclass(frozen=True, kw_only=True)
class SpatialGating(PromptReducer):
    """Drops tokens of images.

    Attributes:
        eta: part of the flow that stays; 1 drops nothing.
        schedule: part of the tokens that goes into each block; without, each input says how many.
        by: who is asked which tokens stay: all of the ``question``, or its ``last`` token; ``random`` draws them, and
            ``pooled`` makes means of neighbours. The latter two need a schedule.
        start: first block that may have fewer.
        step: least part of the tokens at hand that is dropped at once.
        least, floor: tokens that stay in any case, as a number and as a part.
        seed: of ``random``.
    """

    eta: float = field(default=0.95, metadata={"help": "part of the attention to images that stays; 1 drops nothing"})
    schedule: tuple[float, ...] = field(default=(), metadata={"help": "part of the tokens in each block, as 1+1+.4"})
    by: By = field(default="question", metadata={"help": "who is asked which tokens stay; random, pooled: controls"})
    start: int = field(default=2, metadata={"help": "first block that may have fewer tokens"})
    step: float = field(default=0.1, metadata={"help": "least part of the tokens at hand that is dropped at once"})
    least: int = field(default=16, metadata={"help": "tokens that stay in any case"})
    floor: float = field(default=0.05, metadata={"help": "part of the tokens that stays in any case"})
    seed: int = field(default=0, metadata={"help": "of by=random"})

    def __post_init__(self) -> None:
        if not (0 < self.eta <= 1 and 0 <= self.floor <= 1 and 0 < self.step <= 1):
            raise UserError(f"{self.slug}: eta and step are parts above 0, floor from 0, none above 1")
        if self.start < 1 or self.least < 1:
            raise UserError(f"{self.slug}: block 0 reads every token, and one stays at least: give 1 or more")
        if any(not 0 < part <= 1 for part in self.schedule) or sorted(self.schedule)[::-1] != list(self.schedule):
            raise UserError(f"{self.slug}: a schedule is parts above 0 and at most 1 that never rise, as 1+1+0.4+0.1")
        if not self.schedule and self.by in ("random", "pooled"):
            raise UserError(f"{self.slug}: by={self.by} asks nobody how many tokens stay; give a schedule")

    def edit(self, call: AttentionCall) -> AttentionCall:
        layout: PromptLayout | None = call.state["prompt"]
        if layout is not None and self.by in ("question", "last") and self._most(layout, layout.block + 1) is not None:
            asking = layout.asking
            if self.by == "last":
                asking = asking & (asking.flip(1).long().cumsum(1).flip(1) == 1)
            layout.received = received(call, asking)
        return call

    def reduce(self, x: Tensor, layout: PromptLayout) -> tuple[Tensor, Tensor] | None:
        at_hand, most = int(layout.image[0].sum()), self._most(layout, layout.block)
        if most is None:
            return None
        if self.by in ("question", "last"):
            assert layout.received is not None
            score = layout.received
            if not self.schedule:
                flow = score[layout.image].view(len(score), at_hand)
                most = max(self._least(layout), int(needed(flow, self.eta).max()))
        else:
            score = self._drawn(x, layout)
        if most > (1 - self.step) * at_hand:
            return None
        if self.by == "pooled":
            return _pooled(x, layout.image, most)
        best = score.masked_fill(~layout.image, -torch.inf).topk(most, 1).indices
        stays = (~layout.image).scatter(1, best, True)
        kept = stays.nonzero()[:, 1].view(len(x), -1)
        return kept, x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))

    def _least(self, layout: PromptLayout) -> int:
        return min(layout.whole, max(self.least, math.ceil(self.floor * layout.whole)))

    def _most(self, layout: PromptLayout, block: int) -> int | None:
        """Tokens that may go into a block, none dropped by what they are given; None where nothing is ever dropped."""
        at_hand = int(layout.image[0].sum())
        if block < self.start or block >= layout.blocks or self.eta == 1 or at_hand <= self._least(layout):
            return None
        if not self.schedule:
            return at_hand
        if len(self.schedule) != layout.blocks:
            raise UserError(
                f"{self.slug}: the schedule has {len(self.schedule)} parts, and the model {layout.blocks} blocks"
            )
        wanted = max(self._least(layout), round(self.schedule[block] * layout.whole))
        return wanted if wanted <= (1 - self.step) * at_hand else None

    def _drawn(self, x: Tensor, layout: PromptLayout) -> Tensor:
        """Scores ``[B, N]`` that say nothing, alike for all rows."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layout.block)
        return torch.rand(x.shape[1], generator=generator).to(x.device).expand(len(x), -1)


def _pooled(x: Tensor, image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens of images as ``count`` means of neighbours in their order; each stands where the first of them stood."""
    total = int(image[0].sum())
    into = torch.arange(total, device=x.device) * count // total
    of_image = x[image].view(len(x), total, -1)
    means = torch.zeros(len(x), count, x.shape[2], dtype=x.dtype, device=x.device).index_add(1, into, of_image)
    means = means / into.bincount(minlength=count)[:, None].to(x.dtype)
    first = torch.ones_like(into, dtype=torch.bool)
    first[1:] = into[1:] != into[:-1]
    columns = image.nonzero()[:, 1].view(len(x), total)[:, first]
    kept = (~image).scatter(1, columns, True).nonzero()[:, 1].view(len(x), -1)
    changed = x.scatter(1, columns[..., None].expand(-1, -1, x.shape[2]), means)
    return kept, changed.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
