# SPDX-License-Identifier: Apache-2.0
"""Keep what the centre of the queries looks at from the distances to come, and what queries far from it may.

Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression", arXiv 2604.04921. Before rotary
positions the queries of a head lie around a fixed centre, so that its logits over a key are, but for what spreads, a
trigonometric series in the distance. With q_f and k_f the pairs of channels that turn together, as complex numbers, at
the angle omega_f per position, and Delta the distance of the key from the newest token,

    S_trig = sum_f |E q_f| |k_f| cos(omega_f (Delta + delta) + arg(E q_f conj(k_f)))
    S_norm = sum_f (E |q_f| - |E q_f|) |k_f|

where S_trig is averaged over delta = 1, 2, 4, ... ``offset_max``, and S_norm weighs what the queries of a pair do not
share (|E q_f| / E |q_f| is 1 where all are the same). The sum of both is brought to mean 0 and deviation 1 over the
tokens of each query head, and a token of a key/value head counts by the best of its group. Tokens are dropped whenever
``schedule`` more have come.

As in the released code, each layer and key/value head chooses for itself (``per_layer_perhead_pruning``, there one of
three ways), and S_trig is the dot product of the mean query, turned on to those positions, with the cached key.

Differs: the centres are calibrated offline there, on a text, as they are held to be the model's and not the input's;
here they are those of the queries seen so far, so that nothing has to be fitted. The prompt is compressed, too.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference, rope
from ..errors import UserError
from ._policy import SCHEDULES, Schedule
from ._query_statistics import QueryStatistics
from ._view import CacheView

__all__ = ["TriAttention"]


@dataclass(frozen=True, kw_only=True)
class TriAttention(QueryStatistics):
    """Tokens by the series of the mean query over distances to come, and by the spread of the queries.

    Attributes:
        offset_max: farthest position ahead, of 1, 2, 4, ...
        use_trig, use_norm: with either part of the score.
    """

    schedule: Schedule = field(default=128, metadata={"help": SCHEDULES})
    offset_max: int = field(default=65536, metadata={"help": "farthest position ahead that is looked from"})
    use_trig: bool = field(default=True, metadata={"help": "with the series over distances"})
    use_norm: bool = field(default=True, metadata={"help": "with the spread of the queries"})

    def __post_init__(self) -> None:
        if self.offset_max < 1 or not (self.use_trig or self.use_norm):
            raise UserError("triattention: offset_max is at least 1, and one part of the score is left")
        super().__post_init__()

    @property
    def gathers_sizes(self) -> bool:
        return True

    def score(self, view: CacheView) -> Tensor:
        state, heads = view.state, view.k.shape[1]
        newest, width = (state["cos"][:, None], state["sin"][:, None]), state["cos"].shape[-1]
        keys, mean = reference.widened(view.k), state["query_mean"].unflatten(1, (heads, -1))  # [B, Hkv, G, d]
        x = torch.zeros(*mean.shape[:3], keys.shape[2], device=keys.device, dtype=keys.dtype)
        if self.use_trig:
            ahead = 2 ** torch.arange(self.offset_max.bit_length(), device=keys.device)
            cos, sin = rope.mean_rotation(newest, state["angle_step"], ahead)
            x = x + mean.to(keys.dtype) @ rope.rotate(keys, (cos, -sin)).transpose(-1, -2)
        if self.use_norm:
            spread = state["query_size"].unflatten(1, (heads, -1)) - rope.pair_norms(mean, width)
            factor = torch.ones_like(spread[:, :1, :1])  # a pair stands at both of its channels, and may be scaled
            factor[..., :width] = torch.hypot(*(part[:, None] for part in newest)) / 2
            x = x + (spread * factor).to(keys.dtype) @ rope.pair_norms(keys, width).transpose(-1, -2)
        held = reference.repeat_kv((view.positions >= 0)[..., None], heads)[..., 0][:, :, None]
        count = held.sum(-1, keepdim=True).clamp(min=1)
        centred = (x - x.masked_fill(~held, 0.0).sum(-1, keepdim=True) / count).masked_fill(~held, 0.0)
        deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)
        return (centred / deviation).amax(2)
