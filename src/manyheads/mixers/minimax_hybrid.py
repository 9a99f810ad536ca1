# SPDX-License-Identifier: Apache-2.0
"""MiniMax-01's hybrid: seven layers of lightning attention, then one of softmax attention, again and again.

MiniMax, "MiniMax-01: Scaling Foundation Models with Lightning Attention", arXiv 2501.08313. Linear attention keeps a
state of fixed size and cannot look up what it has blurred; one softmax layer in eight can, and its cache is all that
grows:

    lightning:  q, k, v = silu(x W_qkv)     S_t = lambda S_{t-1} + k_t v_t^T     y = (sigmoid(x W_g) * RMSNorm(q S)) W_o
    softmax:    grouped queries, rotary positions on half of each head
    block:      h = norm(h); h = alpha h + beta sublayer(h), with alpha = (2 L)^(1/4) of L layers and beta = 1

alpha is the released 3.5565588200778455 for their 80 layers. Decay is the ALiBi table of
:mod:`manyheads.attention.decay`, not TransNormerLLM's. The norm is over all heads together and has a weight. The
channel mixer is the decoder's own, or with ``experts`` a mixture of them, transformers' ``MiniMaxSparseMoeBlock``: a
router sends every token to ``top`` experts, weighed by its softmax over those, and a loss in training balances them.
The released model has 32 experts, of which a token meets 2. ``theta`` is 10,000 here, for short
contexts; the released long-context model has 10^7. ``window`` makes the paper's rival, sliding-window attention in
place of lightning.

The state is an explicit argument and result, float32, and can be reordered by row: kept in a layer or in 16 bits it
goes wrong in servers. In :func:`manyheads.use` the strategy computes the lightning layers of transformers' own MiniMax
models: in chunks also where a cache goes on, with a float32 state in the model's own cache, where transformers steps
from token to token in Python with a state in the model's dtype. There padding in the middle is skipped; transformers
decays over it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.decay import lightning_attention, log_decay
from ..attention.masks import zero_padding
from ..attention.positions import rope_tables
from ..attention.recurrence import DecayState, SharedState
from ..call import AttentionCall, MixerConfig
from ..errors import UserError
from ..strategy import AttentionCompute, Mixer
from ._mixer import SoftmaxMixer

__all__ = ["HalfRotary", "MiniMaxHybrid", "MiniMaxLightning", "SparseExperts"]


@dataclass(frozen=True, kw_only=True)
class MiniMaxHybrid(AttentionCompute, Mixer):
    """Lightning attention with a softmax layer at the end of every group.

    Attributes:
        every: layers of a group; 1 is softmax throughout, 0 lightning throughout.
        rotary: part of a head's channels that rotary positions turn, in softmax layers.
        theta: base of the rotation.
        alpha: factor on the residual; ``(2 L)^(1/4)`` when None.
        window: sliding-window attention over so many keys in place of lightning; None for lightning.
        experts: of each channel mixer; 0 for the decoder's own.
        top: experts that a token meets.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    every: int = field(default=8, metadata={"help": "layers of a group; the last of each is softmax, 0: none is"})
    rotary: float = field(default=0.5, metadata={"help": "part of a head that rotary positions turn"})
    theta: float = field(default=10_000.0, metadata={"help": "base of the rotation"})
    alpha: float | None = field(default=None, metadata={"help": "factor on the residual; (2 L)^(1/4) when not given"})
    window: int | None = field(
        default=None, metadata={"help": "sliding-window attention over so many keys in place of lightning"}
    )

    experts: int = field(default=0, metadata={"help": "experts of each channel mixer; 0: the decoder's own"})
    top: int = field(default=2, metadata={"help": "experts that a token meets"})

    def __post_init__(self) -> None:
        if self.experts < 0 or (self.experts and not 1 <= self.top <= self.experts):
            raise UserError(
                f"minimax_hybrid: a token meets {self.top} of {self.experts} experts; give 1 of them or more"
            )
        if self.every < 0:
            raise UserError(f"minimax_hybrid: every counts layers and is at least 0, not {self.every}")
        if not 0 <= self.rotary <= 1:
            raise UserError(f"minimax_hybrid: rotary is a part of a head, from 0 to 1, not {self.rotary}")
        if self.window is not None and self.window < 1:
            raise UserError(f"minimax_hybrid: window counts keys and is at least 1, not {self.window}")

    def build(self, config: MixerConfig) -> nn.Module:
        mixer: MiniMaxLightning | HalfRotary
        if self.every and (config.layer + 1) % self.every == 0:
            mixer = HalfRotary(config, self, None)
        else:
            mixer = MiniMaxLightning(config) if self.window is None else HalfRotary(config, self, self.window)
        mixer.residual = ((2 * config.num_layers) ** 0.25 if self.alpha is None else self.alpha, 1.0)
        if self.experts:
            gain = (8 * config.num_layers) ** -0.25  # as the decoder starts what writes to a post-norm stream
            mixer.channel_mixer = partial(SparseExperts, experts=self.experts, top=self.top, gain=gain)
        return mixer

    def attend(self, call: AttentionCall) -> Tensor:
        """The lightning layers of a transformers model."""
        assert call.recurrence is not None
        mask = None if call.mask is None else call.mask[:, 0, 0]
        kv = call.recurrence.state
        before = None if kv is None else DecayState(kv)
        out, after = lightning_attention(call.q, call.k, call.v, call.recurrence.decay, mask=mask, state=before)
        call.recurrence.state = after.kv
        return out.transpose(1, 2)


class SparseExperts(nn.Module):
    """A mixture of SwiGLU experts: transformers' ``MiniMaxSparseMoeBlock``, with the loss that balances it.

    Attributes:
        active_share: of its parameters, those that a token meets.
        auxiliary: 0.001, the release's factor, times transformers' ``load_balancing_loss_func``; None unless training.
    """

    def __init__(self, dim: int, hidden: int, experts: int, top: int, gain: float = 1.0) -> None:
        from transformers import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxSparseMoeBlock

        super().__init__()
        config = MiniMaxConfig(
            hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=top
        )
        config._experts_implementation = "eager"  # the grouped product computes in bfloat16 alone
        self.block = MiniMaxSparseMoeBlock(config)
        self.factor, self.active_share = config.router_aux_loss_coef, top / experts
        self.auxiliary: Tensor | None = None
        held = self.block.experts
        nn.init.xavier_normal_(self.block.gate.weight)
        for into, out in zip(held.gate_up_proj, held.down_proj, strict=True):  # each expert as layers of its own
            for weight in into.data.chunk(2):
                nn.init.xavier_normal_(weight)
            nn.init.xavier_normal_(out.data, gain)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, dim] -> [B, T, dim]``."""
        from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

        self.auxiliary = None
        if self.training:
            gate = self.block.gate
            logits = nn.functional.linear(x.flatten(0, 1), gate.weight)
            loss: Any = load_balancing_loss_func((logits,), gate.num_experts, gate.top_k)
            self.auxiliary = self.factor * loss
        y: Tensor = self.block(x)
        return y


class MiniMaxLightning(nn.Module):
    """MiniMax-01's lightning mixer; key/value heads are as many as query heads."""

    residual: tuple[float, float] | None = None
    channel_mixer: Callable[[int, int], nn.Module] | None = None

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        wide = config.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.dim, 3 * wide, bias=False)  # per head q, k and v
        self.gate = nn.Linear(config.dim, wide, bias=False)
        self.out_norm = nn.RMSNorm(wide, eps=1e-6)
        self.out_proj = nn.Linear(wide, config.dim, bias=False)
        self.decay: Tensor
        table = log_decay("alibi", config.num_heads, config.layer, config.num_layers)
        self.register_buffer("decay", table, persistent=False)

    @classmethod
    def from_transformers(cls, module: Any, length: int = 0) -> "MiniMaxLightning":
        """The mixer with the weights of a ``MiniMaxLightningAttention``."""
        heads, dim = module.num_attention_heads, module.qkv_proj.in_features
        config = MixerConfig(dim, heads, heads, module.head_dim, module.layer_idx, module.num_hidden_layers, length)
        mixer = cls(config).to(module.qkv_proj.weight)
        with torch.no_grad():
            for mine, other in (
                (mixer.qkv_proj, module.qkv_proj), (mixer.gate, module.output_gate), (mixer.out_norm, module.norm),
                (mixer.out_proj, module.out_proj),
            ):  # fmt: skip
                mine.weight.copy_(other.weight)
        return mixer

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: DecayState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, DecayState]:  # fmt: skip
        """``x [B, T, dim] -> [B, T, dim]``, see :mod:`manyheads.mixers._mixer`."""
        x = zero_padding(x, mask)
        heads = nn.functional.silu(self.qkv_proj(x)).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, -1)
        out, after = lightning_attention(q, k, v, self.decay, mask=mask, state=state, cu_seqlens=cu_seqlens)
        out = self.out_norm(out.transpose(1, 2).flatten(2)) * self.gate(x).sigmoid()
        y: Tensor = self.out_proj(out)
        return y, after

    def shared_state(self, before: SharedState, seen: Tensor) -> DecayState:
        """The state of a sequence of which other processes have the first ``seen [B]`` tokens."""
        return before


class HalfRotary(SoftmaxMixer):
    """Softmax attention whose rotary positions turn the first channels of each head."""

    residual: tuple[float, float] | None = None
    channel_mixer: Callable[[int, int], nn.Module] | None = None

    def __init__(self, config: MixerConfig, strategy: MiniMaxHybrid, window: int | None) -> None:
        super().__init__(config, window=window)
        self.turned, self.theta = 2 * round(strategy.rotary * config.head_dim / 2), strategy.theta

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        if not self.turned:
            return q
        return rope.rotate(q, rope_tables(positions, self.turned, self.theta)).to(q.dtype)

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self.transform_q(k, positions, length)
