# SPDX-License-Identifier: Apache-2.0
"""Poly-encoders: Transformer Architectures and Pre-training Strategies for Fast and Accurate Multi-sentence Scoring.

arXiv 1905.01969. A bi-encoder makes one vector of a context before it knows what it is compared with; a cross-encoder
reads context and candidate together, every pair anew. A poly-encoder makes m vectors of a context, and the candidate's
own vector, which can be kept for all contexts, says how they are weighed:

    h_1 .. h_N = T1(context), y = red(T2(candidate))
    y_i   = sum_j softmax_j(c_i . h_j) h_j         i = 1 .. m, of learned codes c [m, D]
    y_ctx = sum_i softmax_i(y . y_i) y_i
    score = y_ctx . y

Training is by the softmax over the replies of a batch. ``codes=first`` and ``last`` take the first or last m outputs
for y_1 .. y_m, which learns nothing more (the paper's variants); ``fixed`` are random codes that do not learn, a
control. With m = 1 the candidate weighs nothing: a bi-encoder that pools by one learned query.

red is the mean of the outputs, as in the commands of the released ParlAI; ``pool=first`` is the first output, which the
paper takes for BERT. Codes are drawn with a deviation of D^-0.5, so that they weigh tokens softly at first; ParlAI
draws them uniformly from 0 to 1. Attention is not scaled, as in ParlAI's ``basic``. T1 and T2 start from a published
encoder and are one unless the task says ``tied=false``; the paper's are two. Not here: the paper's own pre-training, on
Wikipedia and books or on Reddit. The published encoder takes its place; it has seen Reddit, among others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...attention.reference import softmax
from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["PolyAttention", "Polyencoder"]

Codes = Literal["learned", "fixed", "first", "last"]
_SHOWN = 8  # codes of a picture


class PolyAttention(nn.Module):
    """m vectors of a context, and scores of them and candidates.

    Args:
        m: vectors.
        dim: of states.
        codes: what the vectors are.
    """

    codes: Tensor

    def __init__(self, m: int, dim: int, codes: Codes = "learned") -> None:
        super().__init__()
        self.m, self.kind = m, codes
        if codes in ("learned", "fixed"):
            drawn = torch.randn(m, dim) * dim**-0.5
            if codes == "learned":
                self.codes = nn.Parameter(drawn)
            else:
                self.register_buffer("codes", drawn)

    def weights(self, states: Tensor, mask: Tensor) -> Tensor:
        """Attention ``[B, m, N]`` of codes to states ``[B, N, D]``, where ``mask [B, N]`` is True."""
        return softmax(self.codes @ states.mT, mask[:, None])

    def vectors(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """y_1 .. y_m ``[B, m, D]``, and which of them are there ``[B, m]``: a short text has fewer outputs."""
        if self.kind in ("learned", "fixed"):
            return self.weights(states, mask) @ states, mask.any(1, keepdim=True).expand(-1, self.m)
        places = torch.arange(self.m, device=mask.device).expand(len(mask), -1)
        count = mask.sum(1, keepdim=True)
        if self.kind == "last":
            places = places + (count - self.m).clamp(min=0)
        there, kept = places < count, mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        rows = kept.gather(1, places.clamp(max=mask.shape[1] - 1))  # the columns of outputs that are there
        return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1])), there

    def scores(self, vectors: Tensor, there: Tensor, replies: Tensor) -> Tensor:
        """``[B, C]`` of vectors ``[B, m, D]`` and candidates ``[B, C, D]``."""
        products = replies @ vectors.mT
        weights = softmax(products, there[:, None])
        return (weights * products).sum(-1)  # y_ctx . y = sum_i w_i (y_i . y)


@dataclass(frozen=True, kw_only=True)
class Polyencoder(Recipe):
    """m vectors of a context, weighed by the candidate that they are compared with.

    Attributes:
        m: vectors.
        codes: what they are: ``learned`` or ``fixed`` codes, or outputs, the ``first`` or ``last``.
        pool: of candidates.
        rate: of the codes' learning, by that of all else: they are new where the encoder is published.
    """

    task: ClassVar[str] = "response_selection"

    m: Annotated[int, Field(ge=1)] = field(default=64, metadata={"help": "vectors of a context"})
    codes: Codes = field(default="learned", metadata={"help": "learned or fixed codes, or first or last outputs"})
    pool: Literal["mean", "first"] = field(default="mean", metadata={"help": "the vector of a candidate"})
    rate: Annotated[float, Field(gt=0)] = field(
        default=1.0, metadata={"help": "learning rate of codes, by that of all else"}
    )

    def build(self, task: FieldTask, width: int) -> nn.Module:
        model: Any = super().build(task, width)
        if not hasattr(model, "match"):
            raise UserError("polyencoder scores replies for contexts: give --task response_selection")
        model.match, model.pool = PolyAttention(self.m, task.dim, self.codes), self.pool
        made: nn.Module = model
        return made

    def rate_factors(self) -> Mapping[str, float]:
        return {} if self.rate == 1 else {"match.": self.rate}

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Where the first codes look in the first context; none where outputs are taken for them."""
        made: Any = model
        if self.codes in ("first", "last"):
            return ()
        mask = batch["mask"][:1]
        weights = made.match.weights(made.encoder(batch["inputs"][:1], mask), mask)[0, :_SHOWN, mask[0]]
        rows = [f"code {i + 1}" for i in range(len(weights))]
        return (Picture("attention of codes", rows, list(batch["words"]), weights.tolist(), ("codes", "tokens")),)
