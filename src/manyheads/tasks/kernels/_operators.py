# SPDX-License-Identifier: Apache-2.0
"""An operator of the library for each family of attention, on random tensors: what the cost model is held against.

Heads of keys are as many as those of queries. A family is here with the parameters that the operator runs with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...attention import mla, ragged
from ...attention.block_pattern import Rule
from ...attention.codec import kv_codec
from ...attention.local_global import block_sums, local_global_attention
from ...attention.masks import banded
from ...attention.patterns import dense, mean_scores, top_k
from ...attention.recurrence import decay_attention, mlstm_gates
from ...attention.sparse import block_sparse_attention
from ...attention.vq_attention import quantize, vq_attention
from ...costs.base import Family, Layer
from ...costs.clock import Clock
from ...costs.linear import Decay, VectorQuantised
from ...costs.sparse import LocalGlobal, MultiResolution, Softmax, Sparse
from ...costs.stored import Evicted, Latent, Quantised
from ...mixers.mra import mra_attention

__all__ = ["OPERATORS", "Operator"]

Work = Callable[[], object]
WINDOW, BLOCK, KEYS, CODES = 128, 64, 512, 64


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        family: what it computes, with its parameters.
        make: the work on the tensors of a layer that a clock draws.
        decodes: whether it makes one more token rather than read a whole sequence.
        causal: whether it sees the past only.
    """

    family: Family
    make: Callable[[Clock, Layer], Work]
    decodes: bool = False
    causal: bool = True

    def stages(self, layer: Layer, fused: bool) -> Any:
        """What the model says of it."""
        return (self.family.step if self.decodes else self.family.forward)(layer, fused)


def _qkv(clock: Clock, layer: Layer, channels: int = 0) -> list[torch.Tensor]:
    shape = (layer.batch, layer.heads, layer.length)
    return [clock.draw(*shape, width) for width in (*[channels or layer.head_dim] * 2, layer.head_dim)]


def _full(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer)
    return partial(scaled_dot_product_attention, q, k, v, is_causal=layer.causal)


def _window(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer)
    scale = layer.head_dim**-0.5
    if q.is_cuda:
        rule = Rule(layer.causal, WINDOW)
        pattern = dense(layer.length, layer.length, rule=rule, device=q.device)
        return partial(
            block_sparse_attention, q, k, v, pattern, scale=scale, causal=layer.causal, window=WINDOW
        )  # fmt: skip
    if layer.length <= 2 * WINDOW:
        return _full(clock, layer)
    return partial(banded, q, k, v, WINDOW, scale=scale, causal=layer.causal)


def _sparse(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer)
    scale, block = layer.head_dim**-0.5, 128 if q.is_cuda else BLOCK

    def work() -> object:
        scores = mean_scores(q, k, scale=scale, block_q=block, block_k=block)
        count = min(KEYS, layer.length) // block
        pattern = top_k(scores, count, layer.length, layer.length, block_q=block, block_k=block)
        return block_sparse_attention(q, k, v, pattern, scale=scale)

    return work


def _local_global(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer)
    size, count = 16, layer.length // 16
    at = (torch.arange(layer.length, device=q.device) // size)[None].expand(layer.batch * layer.heads, -1)
    side = [block_sums(x.flatten(0, 1), at, count).view(*x.shape[:2], count, -1).to(x.dtype) for x in (k, v)]
    bias, far = clock.draw(layer.heads, 2 * WINDOW - 1), clock.draw(layer.heads, 2 * count - 1)
    return partial(
        local_global_attention, q, k, v, *side, scale=layer.head_dim**-0.5, window=WINDOW, size=size, bias=bias,
        side_bias=far,
    )  # fmt: skip


def _multi(clock: Clock, layer: Layer) -> Work:
    return partial(mra_attention, *_qkv(clock, layer), scale=layer.head_dim**-0.5, per_row=4, block=32)


def _linear(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer)
    return partial(decay_attention, q, k, v, torch.linspace(-0.1, -0.01, layer.heads, device=q.device))


def _mlstm(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer, layer.head_dim // 2)
    i, f = (clock.draw(layer.batch, layer.heads, layer.length) for _ in range(2))

    def work() -> object:
        g, factor, floor, _ = mlstm_gates(i, f)
        return decay_attention(q, (k * factor[..., None]).to(k.dtype), v, g, norm="mlstm", floor=floor)

    return work


def _codes(clock: Clock, layer: Layer) -> Work:
    q, k, v = _qkv(clock, layer)
    book = clock.draw(layer.heads, CODES, layer.head_dim)

    def work() -> object:
        codes, near = quantize(k, book)
        return vq_attention(q, near, v, codes, book.to(q.dtype), block=WINDOW, scale=layer.head_dim**-0.5)

    return work


def _latent(clock: Clock, layer: Layer, way: str) -> Work:
    dims = Latent().dims(layer)
    new = 1 if way == "absorb" else layer.length
    q = clock.draw(layer.batch, layer.heads, new, dims.nope_dim + dims.rope_dim)
    cache = clock.draw(layer.batch, 1, layer.length, dims.rank + dims.rope_dim)
    up = clock.draw(layer.heads, dims.nope_dim + dims.v_dim, dims.rank) * dims.rank**-0.5
    return partial(getattr(mla, way), q, cache, up, dims, scale=layer.head_dim**-0.5)


def _token(clock: Clock, layer: Layer, slots: Callable[[Layer], int]) -> Work:
    q = clock.draw(layer.batch, layer.heads, 1, layer.head_dim)
    k, v = _qkv(clock, layer.at(slots(layer)))[1:]
    return partial(scaled_dot_product_attention, q, k, v)


def _token_of_codes(clock: Clock, layer: Layer, name: str) -> Work:
    k, v = _qkv(clock, layer)[1:]
    q = clock.draw(layer.batch, layer.heads, layer.head_dim)
    codec, scale = kv_codec(name), layer.head_dim**-0.5
    stored = [by.encode(x.flatten(0, 2)) for by, x in ((codec.keys, k), (codec.values, v))]
    (keys, k_scale), (values, v_scale) = stored
    heads = torch.arange(layer.batch * layer.heads, device=q.device).view(layer.batch, -1)
    lengths = torch.full_like(heads, layer.length, dtype=torch.int32)
    given: dict[str, Any] = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale, "capacity": layer.length}
    if q.is_cuda:
        from ...kernels.decode import decode_attention

        return partial(decode_attention, q, keys, values, heads * layer.length, lengths, **given)
    return partial(
        ragged.decode_attention, q, keys, values, heads * layer.length, lengths, codec=codec, **given
    )  # fmt: skip


def _token_linear(clock: Clock, layer: Layer) -> Work:
    decay = torch.linspace(-0.1, -0.01, layer.heads, device=clock.device)
    q, k, v = _qkv(clock, layer.at(65))
    _, state = decay_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], decay)
    return partial(decay_attention, q[:, :, :1], k[:, :, :1], v[:, :, :1], decay, state=state)


def _token_codes(clock: Clock, layer: Layer) -> Work:
    book, scale = clock.draw(layer.heads, CODES, layer.head_dim), layer.head_dim**-0.5

    def read(tokens: int, state: Any = None) -> Any:
        q, k, v = _qkv(clock, layer.at(tokens))
        codes, near = quantize(k, book)
        return partial(vq_attention, q, near, v, codes, book, block=WINDOW, scale=scale, state=state)

    return read(1, read(3 * WINDOW)()[1])  # type: ignore[no-any-return]


OPERATORS: dict[str, Operator] = {
    "full": Operator(Softmax(), _full),
    "window": Operator(Softmax(window=WINDOW), _window),
    "block_sparse": Operator(Sparse(block=BLOCK, keys=KEYS, chosen=True), _sparse),
    "local_global": Operator(LocalGlobal(window=WINDOW, block=16), _local_global, causal=False),
    "multiresolution": Operator(MultiResolution(per_row=4, block=32), _multi, causal=False),
    "linear": Operator(Decay(), _linear),
    "mlstm": Operator(Decay(normaliser=True, key_dim=0.5), _mlstm),
    "vector_quantised": Operator(VectorQuantised(codes=CODES, block=WINDOW), _codes),
    "latent": Operator(Latent(), partial(_latent, way="expand"), causal=False),
    "full, token": Operator(Softmax(), partial(_token, slots=Softmax().slots), True),
    "window, token": Operator(Softmax(window=WINDOW), partial(_token, slots=Softmax(window=WINDOW).slots), True),
    "evicted, token": Operator(Evicted(budget=0.25), partial(_token, slots=Evicted(budget=0.25).slots), True),
    "quantised, token": Operator(Quantised(bits=8), partial(_token_of_codes, name="fp8"), True),
    "quantised_4, token": Operator(Quantised(bits=4), partial(_token_of_codes, name="int4"), True),
    "linear, token": Operator(Decay(), _token_linear, True),
    "vector_quantised, token": Operator(VectorQuantised(codes=CODES, block=WINDOW), _token_codes, True),
    "latent, token": Operator(Latent(), partial(_latent, way="absorb"), True),
}
