# SPDX-License-Identifier: Apache-2.0
"""ToMe: in every block the tokens that are most alike are merged, and a merged token counts as often as it stands for.

"Token Merging: Your ViT But Faster", Bolya et al., arXiv 2210.09461. Tokens at even places look for the one at an odd
place that is most like them, by the mean over heads of the block's keys; the fraction ``share`` of all tokens that is
most alike joins its partner, weighted by the tokens that both stand for. Merged tokens go on through all blocks that
follow, whose softmax adds the log of their number to their logits (proportional attention), and are restored at the
end. A class token and registers are never merged.

The paper merges between attention and feed-forward; here it is behind both, at the output of the block, so that the
feed-forward part of the block itself sees its tokens unmerged. The paper's r is a number of tokens, 8 to 16 of 197; a
fraction fits images of any size. For dense outputs ``restore=change`` gives every token what changed of its group.
Shapes: hidden states ``[B, N, C]``, keys ``[B, N, d]``.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention.grid_merging import behind
from ..attention.merging import Choice, matched
from ..errors import UserError
from ..reducing import Layout, Reduction, StreamReducer

__all__ = ["ToMe"]


@dataclass(frozen=True, kw_only=True)
class ToMe(StreamReducer):
    """Merges tokens block by block.

    Attributes:
        share: of the tokens at a block that join another, at most a half.
        proportional: a merged token weighs as many.
        restore: every token is given a ``copy`` of its group, or the ``change`` of its group since it was merged.
        choose: ``random`` is a control.
    """

    share: float = field(default=0.08, metadata={"help": "fraction of a block's tokens that join another"})
    proportional: bool = field(default=True, metadata={"help": "a merged token weighs as many in the softmax"})
    restore: Literal["copy", "change"] = field(default="copy", metadata={"help": "what every token is given back"})
    choose: Choice = field(default="similar", metadata={"help": "random: a control"})

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 0.5:
            raise UserError(f"{self.slug}: share is a fraction from 0 to 0.5, not {self.share}")

    def reduce(self, x: Tensor, layout: Layout) -> Reduction | None:
        count = x.shape[1] - layout.prefix
        joins = min(int(self.share * count), count // 2)
        if not joins:
            return None
        metric = x if layout.keys is None else layout.keys
        real = torch.ones(len(x), count, dtype=torch.bool, device=x.device)
        kept = torch.full((len(x),), count - joins, device=x.device)
        grouping = matched(metric[:, layout.prefix :], real, kept, count - joins, choose=self.choose)
        return Reduction.of(
            behind(layout.prefix, grouping), layout, x, change_of=x if self.restore == "change" else None
        )
