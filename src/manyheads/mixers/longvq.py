# SPDX-License-Identifier: Apache-2.0
"""Gated attention over codewords, fed by a memory of moving averages: linear in the length, in decoders and encoders.

Liu et al., "LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory", arXiv 2404.11163. With one
head, keys of d_k and values of d_v channels, and the layer's input X:

    X' = silu(EMA(X) + w X)         structured memory: moving averages of each channel, from both sides in encoders
    Z  = silu(X' W_z),  Q = norm(Z g_q + b_q),  K = norm(Z g_k + b_k),  V = silu(X W_v)
    O  = softmax attention of Q over K quantised: key by key in near blocks, with a bias there, by codeword elsewhere
    r  = silu(X' W_r),  u = sigmoid(X' W_u),  H = silu(X' W_h + (r O) U_h),  Y = u H + (1 - u) X

The codebook is a length-fixed abstract of all that is far (:mod:`manyheads.attention.vq_attention`). It follows the
keys by running means while training, gradients pass to the keys as if they had not been quantised (straight through, by
the keys that are near, as in Transformer-VQ, arXiv 2309.16354), and ``commitment`` times the squared distance of keys
and codewords is added to the loss. Decoding has a state of fixed size.

Of the paper its abstract and summaries were at hand, no code is public. The attention is Transformer-VQ's, gates and
memory are Mega's (arXiv 2209.10655): its post-norm block, so that X is normed before and Y after. Ours: RMS norms;
averages that start forgetting between 4 tokens and the trained length, where Mega's all forget in some 4; a codeword
that few keys take is put on a key of the batch, as all are at first; sizes of codebook and blocks, which we did not
find.

The parts by themselves: ``codes=0`` is attention to keys as they are in near blocks (Mega-chunk, and to those beside
it; full attention where ``block`` is no less than the text), ``block=0`` beside it no attention; ``ndim=0`` no memory;
``cached=false`` quantised keys and nothing far; in an encoder ``block=0`` alone reads all by codeword.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attention.masks import each_text, texts_with_state
from ..attention.moving_average import damped_average
from ..attention.reference import widened
from ..attention.vq_attention import VQState, bias_size, codewords, follow, quantize, vq_attention
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import whole

__all__ = ["Codebook", "GatedVQ", "LongVQ", "LongVQState", "Memory"]

_SHORTEST = 4  # tokens after which the fastest average has forgotten, when training begins


@dataclass(frozen=True, kw_only=True)
class LongVQ(Mixer):
    """Gated attention over codewords beside a memory of moving averages.

    Attributes:
        codes: codewords of a layer; 0 for exact keys, and nothing far.
        block: tokens of a block; a query reads its own and those beside it exactly. 0 for none.
        cached: read what is far by codeword.
        key_dim: channels of queries and keys.
        expand: channels of values, as a multiple of the model's.
        ndim: moving averages of each channel; 0 for no memory.
        commitment: weight of the squared distance of keys and codewords in the loss.
        gamma: share of running means that a step of training keeps; 1 with ``dead=0`` leaves the codewords at random.
        dead: keys of a step, on average, below which a codeword is put elsewhere.
    """

    directions: ClassVar = ("causal", "bidirectional")

    codes: int = field(default=128, metadata={"help": "codewords of a layer; 0: exact keys, and nothing far"})
    block: int = field(
        default=128, metadata={"help": "tokens of a block; its own and those beside it are read exactly"}
    )
    cached: bool = field(default=True, metadata={"help": "read what is far by codeword"})
    key_dim: int = field(default=64, metadata={"help": "channels of queries and keys"})
    expand: int = field(default=2, metadata={"help": "channels of values, as a multiple of the model's"})
    ndim: int = field(default=16, metadata={"help": "moving averages of each channel; 0: no memory"})
    commitment: float = field(default=1e-4, metadata={"help": "weight of the distance of keys from codewords"})
    gamma: float = field(default=0.99, metadata={"help": "share of running means that a step of training keeps"})
    dead: float = field(default=0.5, metadata={"help": "keys of a step below which a codeword is put elsewhere"})

    def __post_init__(self) -> None:
        if min(self.codes, self.block, self.ndim, self.commitment, self.dead) < 0:
            raise UserError(f"{self.slug}: codes, block, ndim, commitment and dead are 0 or more: {self.spec}")
        if min(self.key_dim, self.expand) < 1 or not 0 <= self.gamma <= 1:
            raise UserError(f"{self.slug}: key_dim and expand are 1 or more, gamma from 0 to 1: {self.spec}")
        if not self.block and self.codes and not self.cached:
            raise UserError(f"{self.slug}: without blocks and without codewords there is nothing to read: codes=0")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal and self.codes and not self.block:
            raise UserError(f"{self.slug}: a decoder reads what is near in blocks: give block=1 or more")
        return GatedVQ(config, self)


@dataclass(frozen=True, slots=True)
class LongVQState:
    """The state of the mixer; its size does not depend on the length.

    Attributes:
        memory: ``[B, dim, ndim]`` moving averages; None without any.
        attention: near keys and values, and what stands behind the codewords; None without attention.
    """

    memory: Tensor | None
    attention: VQState | None

    def reorder(self, rows: Tensor) -> "LongVQState":
        memory = None if self.memory is None else self.memory[rows]
        return LongVQState(memory, None if self.attention is None else self.attention.reorder(rows))

    def detach(self) -> "LongVQState":
        memory = None if self.memory is None else self.memory.detach()
        return LongVQState(memory, None if self.attention is None else self.attention.detach())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.memory, self.attention) if x is not None)


class Memory(nn.Module):
    """``silu(EMA(x) + w x)``: damped moving averages of each channel, as Mega's released code has them."""

    def __init__(self, dim: int, ndim: int, length: int, causal: bool) -> None:
        super().__init__()
        self.shape = (1 if causal else 2, dim, ndim)
        spans = (
            torch.logspace(0, 1, ndim, base=max(1.0, length / _SHORTEST)) * _SHORTEST
        )  # 1 - alpha / 2 = 1 - 1 / span
        self.alpha = nn.Parameter((spans / 2 - 1).log().neg().expand(self.shape).flatten().clone())
        self.delta = nn.Parameter(torch.zeros(self.alpha.shape))
        signs = 1.0 - 2 * (torch.arange(ndim) % 2)
        self.beta = nn.Parameter((signs + 0.02 * torch.randn(self.shape)).flatten())
        self.eta = nn.Parameter(torch.randn(self.alpha.shape) * ndim**-0.5)
        self.direct = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor, lengths: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x [B, T, dim]``, 0 behind the end of each text; the averages after it, None where both sides are seen."""
        alpha, delta, beta, eta = (p.view(self.shape) for p in (self.alpha, self.delta, self.beta, self.eta))
        ways = list(zip(alpha.sigmoid(), delta.sigmoid(), beta, eta, strict=True))
        y, after = damped_average(x, *ways[0], state=state, lengths=lengths)
        if len(ways) == 2:
            y, after = y + damped_average(x.flip(1), *ways[1])[0].flip(1), None  # type: ignore[assignment]
        return nn.functional.silu(y + self.direct * x), after


class Codebook(nn.Module):
    """Codewords that follow the keys of training by running means.

    Attributes:
        sums, counts: ``[1, S, d]`` and ``[1, S]``; the codewords are their quotients.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, strategy: LongVQ) -> None:
        super().__init__()
        self.strategy = strategy
        counts = torch.zeros(1, strategy.codes)  # nobody's: the first step of training puts them on keys
        drawn = normed(torch.randn(1, strategy.codes, strategy.key_dim))
        self.register_buffer("sums", drawn / codewords(torch.ones_like(drawn), counts))
        self.register_buffer("counts", counts)

    def forward(self, k: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys ``k [B, 1, T, d]`` quantised, their codes, the codewords, and in training the commitment loss."""
        table = codewords(self.sums, self.counts)
        codes, nearest = quantize(k, table)
        if not self.training:
            return nearest, codes, table, None
        sums, counts = follow(
            self.sums, self.counts, k, codes, gamma=self.strategy.gamma, dead=self.strategy.dead, valid=valid
        )
        self.sums.copy_(sums)
        self.counts.copy_(counts)
        each = widened(k - nearest).square().sum(-1)[:, 0]
        mean = each.mean() if valid is None else (each * valid).sum() / valid.sum().clamp(min=1)
        return k + (nearest - k).detach(), codes, table, self.strategy.commitment * mean


class GatedVQ(nn.Module):
    """The layer; one head, whatever the model has.

    Attributes:
        auxiliary: the commitment loss that the last forward in training left.
    """

    residual = (1.0, 1.0)  # post-norm: y = X + u (H - X) of the normed X

    def __init__(self, config: MixerConfig, strategy: LongVQ) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        dim, wide, narrow = config.dim, strategy.expand * config.dim, strategy.key_dim
        self.memory = Memory(dim, strategy.ndim, config.length, config.causal) if strategy.ndim else None
        self.u_proj, self.h_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attends = strategy.block > 0 or strategy.codes > 0
        self.codebook = Codebook(strategy) if strategy.codes else None
        self.auxiliary: Tensor | None = None
        if self.attends:
            self.z_proj, self.v_proj, self.r_proj = (nn.Linear(dim, width) for width in (narrow, wide, wide))
            self.o_proj = nn.Linear(wide, dim, bias=False)
            self.q_scale, self.k_scale = (nn.Parameter(torch.randn(narrow)) for _ in range(2))
            self.q_shift, self.k_shift = (nn.Parameter(torch.zeros(narrow)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(bias_size(strategy.block, config.causal))) if strategy.block else None

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: LongVQState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LongVQState | None]:  # fmt: skip
        """``x [B, T, dim] -> [B, T, dim]``, see :mod:`manyheads.mixers._mixer`."""
        self.auxiliary = None
        if not self.config.causal:
            whole(state)
            return each_text(lambda texts, lengths: self._text(texts, lengths, None)[0], x, mask, cu_seqlens), None
        return texts_with_state(lambda texts, lengths: self._text(texts, lengths, state), x, mask, cu_seqlens)

    def _text(self, x: Tensor, lengths: Tensor | None, state: LongVQState | None) -> tuple[Tensor, LongVQState]:
        """Texts ``x [N, T, dim]`` that begin at column 0, of ``lengths [N]``."""
        memory, silu = None, nn.functional.silu
        if lengths is not None:
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0.0)
        context = x
        if self.memory is not None:
            context, memory = self.memory(x, lengths, None if state is None else state.memory)
        h, after = self.h_proj(context), None
        if self.attends:
            out, after = self._attend(x, context, lengths, None if state is None else state.attention)
            h = h + self.o_proj(silu(self.r_proj(context)) * out)
        return self.u_proj(context).sigmoid() * (silu(h) - x), LongVQState(memory, after)

    def _attend(
        self, x: Tensor, context: Tensor, lengths: Tensor | None, state: VQState | None
    ) -> tuple[Tensor, VQState | None]:  # fmt: skip
        strategy, silu = self.strategy, nn.functional.silu
        z, v = silu(self.z_proj(context))[:, None], silu(self.v_proj(x))[:, None]
        q, k = normed(z * self.q_scale + self.q_shift), normed(z * self.k_scale + self.k_shift)
        codes = table = None
        if self.codebook is not None:
            valid = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            k, codes, table, self.auxiliary = self.codebook(k, valid)
        out, after = vq_attention(
            q, k, v, codes if strategy.cached else None, table, block=strategy.block, causal=self.config.causal,
            bias=self.bias, lengths=lengths, state=state,
        )  # fmt: skip
        return out[:, 0], after


def normed(x: Tensor) -> Tensor:
    """``x [..., d]`` without mean and of norm ``d^(1/4)``, so that no product of two is above ``d^(1/2)``."""
    y: Tensor = nn.functional.layer_norm(x, x.shape[-1:]) * x.shape[-1] ** -0.25
    return y
