# SPDX-License-Identifier: Apache-2.0
"""Whether the cost model's FLOPs are those that are counted, and its state the bytes that caches hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from ...attention.recurrence import decay_attention, quadratic
from ...call import MixerConfig
from ...costs import Layer, family, total
from ...costs.base import Family
from ...costs.clock import Clock
from ...costs.linear import Decay
from ...costs.sparse import MultiResolution
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ...mixers.mra import mra_attention
from ...spec import parse
from ._operators import OPERATORS, Operator

__all__ = ["STATES", "FamilyCounts", "counted"]

_ROWS, _HEADS, _CHANNELS = 2, 4, 16


def _all_fine(clock: Clock, layer: Layer) -> Callable[[], object]:
    q, k, v = (clock.draw(layer.batch, layer.heads, layer.length, layer.head_dim) for _ in range(3))
    return partial(mra_attention, q, k, v, scale=1.0, per_row=layer.length / 32)


def _one_token(clock: Clock, layer: Layer) -> Callable[[], object]:
    q, k, v = (clock.draw(layer.batch, layer.heads, 65, layer.head_dim) for _ in range(3))
    _, state = decay_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    return partial(quadratic, q[:, :, 64:], k[:, :, 64:], v[:, :, 64:], state=state)


# What stands in where torch does the work in no matrix product, or in as much as the numbers ask for: all blocks of two
# resolutions are read exactly, a step of linear attention is its definition.
_COUNTED = OPERATORS | {
    "multiresolution": Operator(MultiResolution(per_row=1 << 20, skew=1.0), _all_fine, causal=False),
    "linear, token": Operator(Decay(), _one_token, True),
}


def counted(name: str, length: int) -> tuple[float, float]:
    """FLOPs of the model, and those that torch's counter sees, of an operator of :data:`.._operators.OPERATORS`.

    The counter knows no kernel of torch's for a CPU and counts what a mask hides: attention is run without that kernel,
    and full attention from both sides.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    operator = _COUNTED[name]
    layer = Layer(
        length=length, batch=_ROWS, heads=_HEADS, kv_heads=_HEADS, head_dim=2 * _CHANNELS, itemsize=4,
        causal=operator.causal and name != "full",
    )  # fmt: skip
    work = operator.make(Clock(torch.device("cpu")), layer)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
        work()
    return total(operator.stages(layer, False))[0], found.get_total_flops()


def _llama(spec: str, length: int) -> tuple[Layer, int]:
    """A layer of a small model, and what a cache strategy holds of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=_HEADS * _CHANNELS, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=_HEADS, num_key_value_heads=2, head_dim=_CHANNELS, max_position_embeddings=4096,
    )  # fmt: skip
    return _layer(length, 2), _stored(LlamaForCausalLM(config), spec, length)


def _deepseek(spec: str, length: int) -> tuple[Layer, int]:
    """Likewise of one with latent attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    d = _CHANNELS
    config = DeepseekV3Config(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS, kv_lora_rank=4 * d, q_lora_rank=None, qk_rope_head_dim=d // 2, qk_nope_head_dim=d,
        v_head_dim=d, first_k_dense_replace=1, max_position_embeddings=4096,
    )  # fmt: skip
    return _layer(length), _stored(DeepseekV3ForCausalLM(config), spec, length)


def _stored(model: Any, spec: str, length: int) -> int:
    ids = torch.arange(_ROWS * length).view(_ROWS, -1) * 7 % 31
    with torch.no_grad(), use(model.eval(), spec):
        cache = model(ids, use_cache=True).past_key_values
    return sum(layer.store.nbytes() for layer in cache.layers)


def _mixer(spec: str, length: int, layers: int = 2) -> tuple[Layer, int]:
    """The states of the last layers of a mixer, all of them where there are many; per layer."""
    dim, found = _HEADS * _CHANNELS, []
    x = torch.randn(_ROWS, length, dim)
    for layer in range(1 if layers == 2 else 0, layers):
        config = MixerConfig(dim, _HEADS, _HEADS, _CHANNELS, layer, layers, length)
        with torch.no_grad():
            found.append(parse(spec).build(config)(x)[1].nbytes)  # type: ignore[attr-defined]
    return _layer(length), sum(found) // len(found)


def _codes(spec: str, length: int) -> tuple[Layer, int]:
    """The state of attention over codewords, of the operator: in ``longvq`` its one head has channels of its own."""
    from ...attention.vq_attention import quantize, vq_attention

    q, k, v = (torch.randn(_ROWS, _HEADS, length, _CHANNELS) for _ in range(3))
    book = torch.randn(_HEADS, 128, _CHANNELS)
    codes, near = quantize(k, book)
    state = vq_attention(q, near, v, codes, book, block=128)[1]
    assert state is not None
    return _layer(length), state.nbytes


def _layer(length: int, kv_heads: int = _HEADS) -> Layer:
    return Layer(length=length, batch=_ROWS, heads=_HEADS, kv_heads=kv_heads, head_dim=_CHANNELS, itemsize=4)


def _budget(name: str, **changed: Any) -> Family:
    import dataclasses

    return dataclasses.replace(family(name).formula, **changed)


# By family: its formula, the spec of a strategy of it, and who says what that holds.
STATES: dict[str, tuple[Family, str, Callable[[str, int], tuple[Layer, int]]]] = {
    "full": (_budget("full"), "full", _llama),
    "window": (_budget("window", window=48), "softmax:window=48", _mixer),
    "sinks_window": (_budget("sinks_window", budget=48), "streaming_llm:budget=48", _llama),
    "block_sparse": (_budget("block_sparse"), "full", _llama),
    "linear": (_budget("linear"), "tnl_lightning", _mixer),
    "mlstm": (_budget("mlstm"), "blalm_mlstm", _mixer),
    "vector_quantised": (_budget("vector_quantised"), "longvq", _codes),
    "hybrid": (_budget("hybrid"), "minimax_hybrid:every=8", partial(_mixer, layers=8)),
    "evicted": (_budget("evicted"), "snapkv:budget=0.25", _llama),
    "quantised": (_budget("quantised"), "fp8", _llama),
    "quantised_4": (_budget("quantised_4"), "fireq", _llama),
    "latent": (_budget("latent"), "mla_hw", _deepseek),
    "offloaded": (_budget("offloaded"), "hcattention", _llama),
}


@dataclass(frozen=True, kw_only=True)
class FamilyCounts(Task):
    """Relative errors, of FLOPs by operator and of bytes by family, for the first arm: the others change no count.

    Attributes:
        lengths: tokens, more than two windows of 128.
    """

    alone: ClassVar[bool] = False
    subject: ClassVar[str] = "machine"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("flops", "FLOPs, relative error"),
        Metric("state", "state, relative error of bytes"),
    )

    lengths: tuple[int, ...] = (600, 1024)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{n}", float(n), f"{n} tokens", {"length": n}) for n in self.lengths]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length = unit.params["length"]
        for name in OPERATORS:
            said, found = counted(name, length)
            yield self.row("flops", run.baseline, abs(said / found - 1), f"{name}.{length}", context=name)
        for name, (formula, spec, make) in STATES.items():
            layer, held = make(spec, length)
            error = abs(formula.state(layer) / held - 1)
            yield self.row("state", run.baseline, error, f"{name}.{length}", context=name, about={"spec": spec})
