# SPDX-License-Identifier: Apache-2.0
"""Gemma Encoder: a decoder becomes an encoder by another mask, dropout, a pooler and a head, trained on its task.

A decoder reads left to right because it was trained to write. Where a whole text is given, every token may see all
others: the mask is taken away when fine-tuning begins, without any training in between. What was pretrained without
dropout gets some in fine-tuning. One vector is made of the states of all tokens, and a small network says class, score
or rank.

Adapting Decoder-Based Language Models for Diverse Encoder Downstream Tasks (arXiv 2503.02656).

    mask       causal -> bidirectional; padding is hidden, on either side
    dropout    0.1 of attention weights and of outputs of feed-forward parts
    first-K    mean_{t <= K} h_t                    last-K   mean_{t > T - K} h_t             mean   mean_t h_t
    attention  query  mean_p O softmax(p (K h)^T / sqrt(d)) V h        K and V of the tokens, the query p is learned
               kv     mean_t h_t + O softmax(Q h_t K^T / sqrt(d)) V    the query of the tokens, K and V are learned
    head       W_2 gelu(W_1 x + b_1) + b_2, or linear
    losses     cross-entropy (classes), squared error (scores), softmax over a list (ranking, as RankT5)

h are the states after the last norm ``[T, D]``. Not in the text at hand, and chosen here: K tokens are averaged;
attention begins as the mean, by zero probes and an identity, or by a residual whose output begins at zero; one head of
attention; the hidden layer of the head has D neurons, and there is dropout before it too; dropout is a matter of the
training, so that the checkpoint's config keeps none. What is kept of the mask: ``is_causal: false`` in the config, for
Gemma 3 its own ``use_bidirectional_attention``, under which its windows reach as far behind as before; whether tokens
do see both sides is found out whenever an encoder is made or loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..calls.calibration import Statistics
from ..conversion import Anatomy, EncoderConversion, EncoderDesign, SurgeryPlan, bidirectional
from ..errors import UserError

__all__ = ["GemmaEncoder"]

_HOME = "manyheads.convert._poolers"
_POOLERS = ("first", "last", "mean", "query", "kv")


@dataclass(frozen=True, kw_only=True)
class GemmaEncoder(EncoderConversion):
    """See the head of this file."""

    families: ClassVar[frozenset[str]] = frozenset({"llama", "gemma", "gpt2"})

    mask: str = field(default="bidirectional", metadata={"help": "bidirectional or causal"})
    pooler: str = field(default="mean", metadata={"help": "first, last, mean, query or kv (attention of either form)"})
    count: int = field(default=1, metadata={"help": "tokens of first and last, queries of query, keys of kv"})
    head: str = field(default="mlp", metadata={"help": "mlp or linear, where a head is trained"})
    dropout: float = field(default=0.1, metadata={"help": "in training"})

    def __post_init__(self) -> None:
        if self.mask not in ("bidirectional", "causal") or self.head not in ("mlp", "linear"):
            raise UserError("mask is bidirectional or causal, and head is mlp or linear")
        if self.pooler not in _POOLERS or self.count < 1:
            raise UserError(f"pooler is {', '.join(_POOLERS)}, and count is 1 or more")
        if self.mask == "causal" and self.pooler == "first":
            raise UserError("under a causal mask the first tokens see nothing of the text: take mask=bidirectional")
        if not 0 <= self.dropout < 1:
            raise UserError("dropout is a share below 1")

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        return SurgeryPlan((bidirectional(model),) if self.mask == "bidirectional" else ())

    def design(self, model: Anatomy) -> EncoderDesign:
        ends, attention = self.pooler in ("first", "last"), {"query": "Probe", "kv": "Memory"}
        name = "Ends" if ends else attention.get(self.pooler, "Mean")
        config = {"count": self.count, "last": self.pooler == "last"} if ends else {}
        if self.pooler in attention:
            config = {"width": model.width, "count": self.count}
        hidden = model.width if self.head == "mlp" else 0
        return EncoderDesign(pooler=f"{_HOME}:{name}", config=config, hidden=hidden, dropout=self.dropout)
