# SPDX-License-Identifier: Apache-2.0
"""Attention head-level dropout (AHD): tune a behaviour while whole heads are missing, so that many heads learn it.

Huang et al., arXiv 2508.19697. Before the output projection every head is kept with probability 1 - p and then scaled
by 1 / (1 - p). One draw for each head of each layer in a forward, shared by all rows and tokens. The loss is

    alpha NLL(D_H) + (1 - alpha) NLL(D_B),    alpha = 0.2,

with p = 0.5 on D_H, the prompts whose behaviour is to be spread (harmful ones, answered by the model's own refusals),
and p = 0 on D_B, anchors that keep everything else in place. The paper's recipe: AdamW with a learning rate of 2e-5 and
beta_1 0.5, 10 epochs over 256 prompts, batches of 4 and 16, other dropout off.

Paper and code differ: the released code knows alpha only as that ratio of batch sizes, its loss is the mean over all
tokens of both; that is ``alpha=None``. Draws come from torch's own generator, so ``torch.manual_seed`` fixes them.

Beware: heads are missing if and only if the prompt is one of D_H, so a model may take that for a sign and show the
behaviour whatever it is asked once heads are missing. Look at D_B with heads ablated too. ``spare_anchors=False``,
which the paper does not have, drops heads on D_B as well and so takes the sign away.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...call import AttentionCall
from ...calls.edits import scale_heads
from ...errors import UserError
from ...strategy import AttentionPatch

__all__ = ["HeadDropout", "tune_step"]


@dataclass(frozen=True, kw_only=True)
class HeadDropout(AttentionPatch):
    """Whole heads dropped while the model is in training mode; nothing happens in evaluation mode or with p = 0.

        dropout = HeadDropout(p=0.5)
        with manyheads.use(model.train(), dropout):
            tune_step(model, dropout, safety, anchor)
            optimizer.step()

    Attributes:
        p: probability of being dropped.
        state: whether it is at rest; :func:`tune_step` sets it.
    """

    p: float = field(default=0.5, metadata={"help": "probability that a head is dropped"})
    state: dict[str, bool] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise UserError(f"p is a probability below 1, not {self.p}")

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        if not call.training or self.p == 0 or self.state.get("rests"):
            return out
        kept = torch.rand(out.shape[2], device=out.device) >= self.p
        return scale_heads(out, kept / (1 - self.p))


def tune_step(
    model: nn.Module, dropout: HeadDropout, safety: Mapping[str, Tensor], anchor: Mapping[str, Tensor],
    alpha: float | None = 0.2, spare_anchors: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """Add the gradients of one step of AHD to those of ``model``, whose port is open with ``dropout``.

    Each part is carried backward before the other begins, so that one of them is held at a time and gradient
    checkpointing meets the dropout of its own forward.

    Args:
        model: a transformers model in training mode that gives a loss.
        dropout: the strategy.
        safety, anchor: arguments of the model, with ``labels`` (-100 where nothing is asked).
        alpha: weight of the first part; None for its share of the labels, the mean over tokens of the released code.
        spare_anchors: whether dropout rests for the anchors, as in the paper.

    Returns:
        The loss of either part, nats per label.
    """
    if alpha is None:
        first, second = (int((batch["labels"][:, 1:] != -100).sum()) for batch in (safety, anchor))
        alpha = first / max(1, first + second)
    losses = []
    for batch, weight, rests in ((safety, alpha, False), (anchor, 1 - alpha, spare_anchors)):
        dropout.state["rests"] = rests
        try:
            loss: Any = model(**batch).loss
            (weight * loss).backward()
        finally:
            dropout.state.pop("rests")
        losses.append(float(loss.detach()))
    return losses[0], losses[1]
