# SPDX-License-Identifier: Apache-2.0
"""ReLU in place of softmax: a head that has nothing to look for gives nothing, and needs no token to look at instead.

The mitigation of "Active-Dormant Attention Heads" (arXiv 2410.13835): ``A[t, s] = relu(S[t, s]) / n_t``, where ``n_t``
is the number of keys that query t sees, t + 1 counted from 0 in a causal model without padding. Rows need not sum to 1.
A model has to be trained with it:

    with manyheads.use(model, ReLUAttention()):
        loss = model(ids, labels=ids).loss

Legend: B batch, H query heads, T queries, S keys, dv channels of a value.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import dropout

from ...attention.normalizers import Normalizer
from ...attention.reference import logits, repeat_kv
from ...call import AttentionCall
from ...errors import UserError
from ...strategy import AttentionCompute

__all__ = ["ReLUAttention", "relu_weights"]


def relu_weights(call: AttentionCall) -> Tensor:
    """``relu(S[t, s]) / n_t`` of a call, ``[B, H, T, S]``; rows that may attend to nothing are 0."""
    x = logits(call.q, call.k, scale=call.scale, bias=call.bias, softcap=call.softcap)
    return Normalizer("relu")(x, call.allowed())


@dataclass(frozen=True, kw_only=True)
class ReLUAttention(AttentionCompute):
    """Attention with ReLU and the number of visible keys in place of softmax; differentiable."""

    def attend(self, call: AttentionCall) -> Tensor:
        if call.sinks is not None:
            raise UserError(f"{call.site.name} has learned sinks, which take part in a softmax only")
        weights = dropout(relu_weights(call), call.dropout)
        out: Tensor = (weights @ repeat_kv(call.v, call.q.shape[1])).transpose(1, 2)
        return out
