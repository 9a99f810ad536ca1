# SPDX-License-Identifier: Apache-2.0
"""mLSTM in place of attention, with a sliding window beside it: for small training corpora.

"Sample-Efficient Language Modeling with Linear Attention and Lightweight Enhancements" (BLaLM), arXiv 2511.05560, on
the mLSTM of Beck et al., xLSTM, arXiv 2405.04517. Per head, with i and f linear in x and soft-capped, 15 tanh(. / 15):

    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T,   n_t likewise with k_t alone,   h_t = q_t C_t / max(|q_t n_t|, 1)

in the stabilised form that never overflows; q is scaled by 1/sqrt(d_qk). Then LayerNorm per head, a sigmoid gate, and
the output projection. That memory is a fixed size; what it blurs, a sliding window of softmax attention still sees.

mLSTM is xLSTM-7B's (equal to transformers' ``xLSTMLayer``). Of BLaLM's own parts only the abstract was at hand, so
these are our reading: the short convolution is depthwise, causal, followed by silu, and on q, k and v (``conv=4`` is
the usual width); Hedgehog (arXiv 2402.04347) is ``softmax([x W, -x W])`` per head on q and k, W starting at the
identity; the window has projections and rotary positions of its own, and its heads are mixed in before the output
projection,

    y = (a mLSTM + (1 - a) window) W_o,   a = sigmoid(x W_a + b) per token and head or channel, or one learned number.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.masks import zero_padding
from ..attention.positions import rope_tables
from ..attention.recurrence import DecayState, decay_attention, mlstm_gates
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import KVState, SoftmaxMixer, split_heads

__all__ = ["BlalmMLSTM", "MLSTM", "MLSTMState"]

Mix = Literal["token_head", "channel", "scalar"]


@dataclass(frozen=True, kw_only=True)
class BlalmMLSTM(Mixer):
    """mLSTM, optionally with short convolution, Hedgehog features and a sliding window.

    Attributes:
        qk_factor: channels of q and k per head, as a part of the head's.
        cap: soft cap of the gates' pre-activations.
        conv: width of the convolution on q, k and v; 0 for none.
        hedgehog: feature map on q and k.
        window: keys that the softmax branch sees; 0 for no branch.
        mix_by: how the branches are weighed: per token and head, per token and channel, or by one learned number.
        theta: base of the rotation in the softmax branch.
    """

    qk_factor: float = field(default=0.5, metadata={"help": "channels of q and k, as a part of the head's"})
    cap: float = field(default=15.0, metadata={"help": "soft cap of the gates' pre-activations"})
    conv: int = field(default=0, metadata={"help": "width of the convolution on q, k and v, usually 4; 0: none"})
    hedgehog: bool = field(default=False, metadata={"help": "Hedgehog feature map on q and k"})
    window: int = field(default=0, metadata={"help": "keys that the softmax branch sees; 0: no branch"})
    mix_by: Mix = field(default="token_head", metadata={"help": "weights of the branches: token_head, channel, scalar"})
    theta: float = field(default=10_000.0, metadata={"help": "base of the rotation in the softmax branch"})

    def __post_init__(self) -> None:
        if self.mix_by not in ("token_head", "channel", "scalar"):
            raise UserError(f"blalm_mlstm: mix_by is token_head, channel or scalar, not {self.mix_by!r}")
        for name in ("conv", "window"):
            if getattr(self, name) < 0:
                raise UserError(f"blalm_mlstm: {name} is at least 0, not {getattr(self, name)}")
        for name in ("qk_factor", "cap"):
            if not getattr(self, name) > 0:
                raise UserError(f"blalm_mlstm: {name} is above 0, not {getattr(self, name)}")

    def build(self, config: MixerConfig) -> nn.Module:
        return MLSTM(config, self)


@dataclass(frozen=True, slots=True)
class MLSTMState:
    """The state of the mixer; its size does not depend on the length.

    Attributes:
        decay: mLSTM's matrices, sums and running maxima.
        conv: ``[B, width - 1, channels]``, the last inputs of the convolution; None without one.
        window: of the softmax branch; None without one.
    """

    decay: DecayState
    conv: Tensor | None = None
    window: KVState | None = None

    def reorder(self, rows: Tensor) -> "MLSTMState":
        conv = None if self.conv is None else self.conv[rows]
        return MLSTMState(self.decay.reorder(rows), conv, None if self.window is None else self.window.reorder(rows))

    def detach(self) -> "MLSTMState":
        conv = None if self.conv is None else self.conv.detach()
        return MLSTMState(self.decay.detach(), conv, None if self.window is None else self.window.detach())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.decay, self.conv, self.window) if x is not None)


class MLSTM(nn.Module):
    """mLSTM with what BLaLM puts beside it; key/value heads are as many as query heads."""

    def __init__(self, config: MixerConfig, strategy: BlalmMLSTM) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        heads, wide = config.num_heads, config.num_heads * config.head_dim
        self.qk_dim = max(1, round(strategy.qk_factor * config.head_dim))
        self.sizes = (heads * self.qk_dim, heads * self.qk_dim, wide)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.dim, size, bias=False) for size in self.sizes)
        self.gate = nn.Linear(config.dim, wide, bias=False)
        self.i_gate = gate_linear(nn.Linear(config.dim, heads), torch.full((heads,), -10.0))
        self.f_gate = gate_linear(nn.Linear(config.dim, heads), torch.linspace(3.0, 6.0, heads))
        self.out_norm = nn.Parameter(torch.ones(wide))
        self.out_proj = nn.Linear(wide, config.dim, bias=False)
        self.conv = ShortConv(sum(self.sizes), strategy.conv) if strategy.conv else None
        self.features: nn.Parameter | None = None
        if strategy.hedgehog:
            self.features = nn.Parameter(torch.eye(self.qk_dim).expand(2, heads, -1, -1).clone())  # of q and of k
        self.window = Window(config, strategy) if strategy.window else None
        self.weigh: nn.Linear | nn.Parameter | None = None
        if strategy.window and strategy.mix_by == "scalar":
            self.weigh = nn.Parameter(torch.zeros(()))
        elif strategy.window:
            count = heads if strategy.mix_by == "token_head" else wide
            self.weigh = gate_linear(nn.Linear(config.dim, count), torch.zeros(count))

    @classmethod
    def from_transformers(cls, module: Any) -> "MLSTM":
        """The mixer with the weights of an ``xLSTMLayer`` (``weight_mode="single"``, no biases).

        Raises:
            UserError: the layer has fused weights, biases or widths that the mixer has not.
        """
        config, heads = module.config, module.config.num_heads
        if config.weight_mode != "single" or config.use_bias or module.v_dim != config.hidden_size:
            raise UserError("an xLSTMLayer is taken with weight_mode=single, use_bias=False and v_dim_factor=1")
        head = config.hidden_size // heads
        strategy = BlalmMLSTM(qk_factor=config.qk_dim_factor, cap=config.gate_soft_cap)
        mixer = cls(MixerConfig(config.hidden_size, heads, heads, head, 0, 1, 0), strategy).to(module.q.weight)
        names = {
            "q_proj": "q", "k_proj": "k", "v_proj": "v", "gate": "ogate_preact", "i_gate": "igate_preact",
            "f_gate": "fgate_preact", "out_proj": "out_proj",
        }  # fmt: skip
        held = module.state_dict()
        weights = {f"{mine}.{kind}": held[f"{name}.{kind}"] for mine, name in names.items() for kind in _kinds(mine)}
        mixer.load_state_dict({**weights, "out_norm": held["multihead_norm.weight"]})
        return mixer

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: MLSTMState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MLSTMState]:  # fmt: skip
        """``x [B, T, dim] -> [B, T, dim]``, see :mod:`manyheads.mixers._mixer`."""
        if cu_seqlens is None:
            return self._mixed(zero_padding(x, mask), mask, state)
        lengths = cu_seqlens.diff()  # packed sequences are laid side by side as rows, padded on the right
        real = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
        rows = x.new_zeros(*real.shape, x.shape[2]).masked_scatter(real[..., None], x[0])
        y, after = self._mixed(rows, real, state)
        return y[real][None], after

    def _mixed(self, x: Tensor, mask: Tensor | None, state: MLSTMState | None) -> tuple[Tensor, MLSTMState]:
        heads, conv = self.config.num_heads, None
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        if self.conv is not None:
            qkv, conv = self.conv(qkv, mask, None if state is None else state.conv)
        q, k, v = (split_heads(part, heads) for part in qkv.split(self.sizes, -1))
        if self.features is not None:
            q, k = (hedgehog(part, weight) for part, weight in zip((q, k), self.features, strict=True))
        out, decay = self._recurrent(x, q, k, v, mask, None if state is None else state.decay)
        out = nn.functional.layer_norm(out.transpose(1, 2), (self.config.head_dim,), eps=1e-6).flatten(2)
        out, window = out * self.out_norm * self.gate(x).sigmoid(), None
        if self.window is not None:
            near, window = self.window(x, mask=mask, state=None if state is None else state.window)
            a = self._weights(x)
            out = a * out + (1 - a) * near
        return self.out_proj(out), MLSTMState(decay, conv, window)

    def _recurrent(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: DecayState | None
    ) -> tuple[Tensor, DecayState]:
        """mLSTM itself: ``[B, H, T, d]``. Padding neither enters (i = -inf) nor forgets (f = inf)."""
        cap = self.strategy.cap
        i, f = (cap * torch.tanh(gate(x) / cap).transpose(1, 2) for gate in (self.i_gate, self.f_gate))
        if mask is not None:
            i, f = i.masked_fill(~mask[:, None], -torch.inf), f.masked_fill(~mask[:, None], torch.inf)
        g, factor, floor, top = mlstm_gates(i, f, state)
        k = (k * factor[..., None]).to(q.dtype)
        out, after = decay_attention(
            q, k, v, g, scale=self.qk_dim**-0.5, norm="mlstm", floor=floor,
            state=None if state is None else DecayState(state.kv, state.k),
        )  # fmt: skip
        return out, DecayState(after.kv, after.k, top)

    def _weights(self, x: Tensor) -> Tensor:
        """The weight a of mLSTM, broadcastable to ``[B, T, H * d]``."""
        if isinstance(self.weigh, nn.Linear):
            a: Tensor = self.weigh(x).sigmoid()
            return a if self.strategy.mix_by == "channel" else a.repeat_interleave(self.config.head_dim, -1)
        assert self.weigh is not None
        return self.weigh.sigmoid()


class ShortConv(nn.Module):
    """Depthwise causal convolution over the real tokens of a sequence, then silu."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x [B, T, channels]`` and the ``width - 1`` inputs before it; the same after it."""
        batch, length, channels = x.shape
        before = self.weight.shape[1] - 1
        if mask is not None:  # real tokens first, so that neighbours are neighbours
            order = (~mask).long().argsort(dim=1, stable=True)[..., None].expand_as(x)
            x = x.gather(1, order)
        past = x.new_zeros(batch, before, channels) if state is None else state.to(x.dtype)
        held = torch.cat([past, x], 1)
        y = nn.functional.conv1d(held.transpose(1, 2), self.weight[:, None].to(x.dtype), groups=channels)
        y = nn.functional.silu(y.transpose(1, 2))
        if mask is None:
            return y, held[:, length:]
        last = mask.sum(1, keepdim=True) + torch.arange(before, device=x.device)
        after = held.gather(1, last[..., None].expand(-1, -1, channels))
        return torch.zeros_like(y).scatter(1, order, y), after


class Window(SoftmaxMixer):
    """The softmax branch: its heads side by side ``[B, T, H * d]``, without a projection of its own."""

    def __init__(self, config: MixerConfig, strategy: BlalmMLSTM) -> None:
        super().__init__(config, window=strategy.window)
        self.theta = strategy.theta
        self.out_proj = nn.Identity()  # type: ignore[assignment]

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return rope.rotate(q, rope_tables(positions, q.shape[-1], self.theta)).to(q.dtype)

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self.transform_q(k, positions, length)


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """``softmax([x W, -x W])``: ``[B, H, T, d] -> [B, H, T, 2 d]``, positive and of sum 1; ``weight [H, d, d]``."""
    y = x @ weight.to(x.dtype)
    return torch.cat([y, -y], -1).softmax(-1)


def gate_linear(linear: nn.Linear, bias: Tensor) -> nn.Linear:
    """A gate: weights 0 and this bias, which the decoder leaves alone."""
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(bias)
    linear.skip_init = True  # type: ignore[assignment]
    return linear


def _kinds(name: str) -> tuple[str, ...]:
    return ("weight", "bias") if name in ("i_gate", "f_gate") else ("weight",)
