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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...call import AttentionCall
from ...calls.edits import scale_heads
from ...errors import UserError
from ...strategy import AttentionPatch

__all__ = ["HeadDropout", "ahd_loss"]

Labelled = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class HeadDropout(AttentionPatch):
    """Whole heads dropped while the model is in training mode; nothing happens in evaluation mode or with p = 0.

        dropout = HeadDropout(p=0.5)
        with manyheads.use(model, dropout):
            fit(model, batches, ahd_loss(dropout), budget=640, optimizers=[optimizer])

    Attributes:
        p: probability of being dropped.
        state: whether it is at rest; :func:`ahd_loss` sets it.
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


def ahd_loss(
    dropout: HeadDropout, alpha: float | None = 0.2, spare_anchors: bool = True
) -> Callable[[nn.Module, tuple[Labelled, Labelled]], Iterator[Tensor]]:
    """The loss of AHD, as :func:`manyheads.training.fit` takes it: of a model, and of a batch of two parts.

    The parts are arguments of the model, with ``labels`` (-100 where nothing is asked): of the safety prompts, and of
    the anchors. Each is a term of its own, to be carried backward before the next is asked for, so that one of them is
    held at a time and gradient checkpointing meets the dropout of its own forward.

    Args:
        dropout: the strategy, in use on the model, a transformers model in training mode.
        alpha: weight of the first part; None for its share of the labels, the mean over tokens of the released code.
        spare_anchors: whether dropout rests for the anchors, as in the paper.

    Returns:
        A function of model and batch that gives the two weighted terms, nats per label.
    """

    def loss(model: nn.Module, batch: tuple[Labelled, Labelled]) -> Iterator[Tensor]:
        weight = alpha
        if weight is None:
            first, second = (int((part["labels"][:, 1:] != -100).sum()) for part in batch)
            weight = first / max(1, first + second)
        for part, share, rests in zip(batch, (weight, 1 - weight), (False, spare_anchors), strict=True):
            dropout.state["rests"] = rests
            try:
                yield share * model(**part).loss
            finally:
                dropout.state.pop("rests")

    return loss
