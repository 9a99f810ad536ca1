# SPDX-License-Identifier: Apache-2.0
"""DiJiang: linear attention over frequency features, in a trained model or in one that is trained from scratch.

The kernel of softmax attention is the expectation of a product of features along random directions. Quasi-Monte-Carlo
fixes the directions and samples their length alone; rows of a discrete cosine transform are such directions, and a
weight of each feature is learned. Attention is then a state of fixed size; a trained model recovers in little training.

DiJiang: Efficient Large Language Models through Compact Kernelization (arXiv 2403.19928). For queries and keys x of d
channels, C the DCT-II, T = diag(t_i), t_i = Phi^-1(u_i), u_i uniform and fixed, D learned, m = d features:

    wdct   phi(x) = D * exp(T C x)
    dct    phi(x) = softmax_i(T C x)
    y_t = phi(q_t) S_t / (phi(q_t) n_t),    S_t = sum_{s <= t} phi(k_s)^T v_s,    n_t = sum_{s <= t} phi(k_s)

The paper and its released code are two models. The paper (the defaults) has ``wdct`` and the denominator of its
equation 4, which its equation 13 leaves out. The code has ``features=dct,decay=true,norm=group``: features that sum to
1, heads that forget at RetNet's rates, and in place of the denominator a GroupNorm and a gate ``silu(x W_g)``. It
multiplies q by ``gamma^n`` and k by ``gamma^-n``, learned for each of 2,048 positions, which overflows float32 from
position 2,790 on, and computes all pairs; here the recurrence of :mod:`manyheads.attention.recurrence` does, with fixed
decay, in O(T) and at any length.

Open and chosen here: what is normalised before the exponential, see :mod:`manyheads.attention.feature_maps`; rotary
positions turn q and k before the features, as in the model that is converted; draws are the same in all layers and
heads; one D a layer, for q and k. ``favor`` and ``elu`` are other maps in the same place, to compare with.
``radial=chi`` draws lengths for which the kernel is without bias. The product with C is a dense one: d is small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.feature_maps import Features, KernelAttention, Radial
from ..attention.masks import zero_padding
from ..attention.positions import positions_of, rope_tables, split_heads
from ..attention.recurrence import DecayState, SharedState
from ..call import MixerConfig
from ..calls.calibration import Statistics
from ..conversion import Anatomy, Conversion, Recovery, Replace, SurgeryPlan
from ..errors import UserError
from ..strategy import Mixer
from ._rotary import check_rotary

__all__ = ["DiJiang"]

_MODULE = "manyheads.integrations.kernel_attention:LinearAttention"
_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class DiJiang(Conversion, Mixer):
    """See the head of this file."""

    families: ClassVar[frozenset[str]] = frozenset({"llama"})

    features: Features = field(default="wdct", metadata={"help": "wdct (paper), dct (released code), favor or elu"})
    radial: Radial = field(default="normal", metadata={"help": "lengths of directions: normal (paper) or chi"})
    decay: bool = field(default=False, metadata={"help": "heads forget at RetNet's rates (released code)"})
    norm: Literal["sum", "group"] = field(
        default="sum", metadata={"help": "sum (a denominator) or group (GroupNorm and a gate; released code)"}
    )
    seed: int = field(default=0, metadata={"help": "of the draws"})
    loss: Literal["nll", "kl"] = field(
        default="nll", metadata={"help": "of the recovery: nll (of the text) or kl (to the model before)"}
    )
    lr: float = field(default=3e-4, metadata={"help": "highest learning rate of the recovery"})

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.seed < 0:
            raise UserError("dijiang: lr is above 0, and seed counts from 0")

    def build(self, config: MixerConfig) -> nn.Module:
        return DiJiangMixer(config, self)

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        check_rotary(self.slug, model)
        if getattr(model.config, "sliding_window", None):
            raise UserError("dijiang: a window of attention has no state of fixed size; convert a model without")
        steps = []
        for i, shape in enumerate(model.layers):
            config = {
                "width": model.width, "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
                "features": self.features, "radial": self.radial, "decay": self.decay, "norm": self.norm,
                "seed": self.seed, "bias": model.bias("q", i) is not None, "out_bias": model.bias("o", i) is not None,
            }  # fmt: skip
            tensors = {f"{part}_proj.weight": model.weight(part, i) for part in "qkvo"}
            tensors |= {f"{p}_proj.bias": bias for p in "qkvo" if (bias := model.bias(p, i)) is not None}
            tensors |= self._new(model.weight("q", i), shape.head_dim, i)
            steps.append(Replace(part="attention", layer=i, module=_MODULE, config=config, tensors=tensors))
        return SurgeryPlan(tuple(steps))

    def recovery(self, model: Anatomy) -> Recovery:
        return Recovery(loss=self.loss, lr=self.lr)

    def _new(self, q: Tensor, dim: int, layer: int) -> dict[str, Tensor]:
        """What the attention that is replaced has not: D; with ``group`` a norm, and a gate as large as queries are."""
        found = {}
        if self.features == "wdct":
            found["inner.map.weight"] = torch.ones(dim)
        if self.norm == "group":
            source = torch.Generator().manual_seed(self.seed + layer)
            found["gate.weight"] = torch.randn(q.shape, generator=source) * float(q.float().std())
            found |= {"inner.norm.weight": torch.ones(len(q)), "inner.norm.bias": torch.zeros(len(q))}
        return found


@dataclass(frozen=True, slots=True)
class DiJiangState:
    """The state of the mixer; its size does not depend on the length.

    Attributes:
        sums: of features and values.
        seen: ``[B]`` tokens so far.
    """

    sums: DecayState
    seen: Tensor

    def reorder(self, rows: Tensor) -> DiJiangState:
        return DiJiangState(self.sums.reorder(rows), self.seen[rows])

    def detach(self) -> DiJiangState:
        return DiJiangState(self.sums.detach(), self.seen)

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + self.seen.nbytes


class DiJiangMixer(nn.Module):
    """Linear attention over features, in a model that is trained from scratch."""

    def __init__(self, config: MixerConfig, strategy: DiJiang) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.dim, heads * dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(config.dim, kv_heads * dim, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(heads * dim, config.dim, bias=False)
        self.gate = nn.Linear(config.dim, heads * dim, bias=False) if strategy.norm == "group" else None
        self.inner = KernelAttention(
            heads, kv_heads, dim, strategy.features, strategy.radial, strategy.decay, strategy.norm, strategy.seed
        )

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: DiJiangState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, DiJiangState]:  # fmt: skip
        """``x [B, T, dim] -> [B, T, dim]``, as every mixer."""
        x = zero_padding(x, mask)
        past = None if state is None else state.seen
        at = positions_of(x.shape[0], x.shape[1], x.device, mask, past, cu_seqlens)
        count = x.new_full(x.shape[:1], x.shape[1], dtype=torch.long) if mask is None else mask.sum(1)
        count = count if cu_seqlens is None else cu_seqlens.diff()
        tables = rope_tables(at, self.config.head_dim, _THETA, torch.promote_types(x.dtype, torch.float32))
        q = rope.rotate(split_heads(self.q_proj(x), self.config.num_heads), tables)
        k = rope.rotate(split_heads(self.k_proj(x), self.config.num_kv_heads), tables)
        v = split_heads(self.v_proj(x), self.config.num_kv_heads)
        out, sums = self.inner(q.to(x.dtype), k.to(x.dtype), v, mask, None if state is None else state.sums, cu_seqlens)
        y: Tensor = self.out_proj(out if self.gate is None else out * nn.functional.silu(self.gate(x)))
        return y, DiJiangState(sums, count if past is None else past + count)

    def shared_state(self, before: SharedState, seen: Tensor) -> DiJiangState:
        """The state of a sequence of which other processes have the first ``seen [B]`` tokens."""
        return DiJiangState(before, seen)
