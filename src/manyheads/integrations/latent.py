# SPDX-License-Identifier: Apache-2.0
"""Attention modules whose cache holds latents (MLA): which attributes say how keys and values are made of them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..call import Latent
from .weights import input_width, weight_of

__all__ = ["latent_of"]


@dataclass(frozen=True, slots=True)
class _Names:
    """Attributes of an attention module that caches latents and expands what its cache returns.

    Attributes:
        expand: the method that does it; a module without it does something else with its cache.
        weight: the linear layer ``latent -> heads of (key without rotary positions, value)``.
        rank, nope_dim, rope_dim, v_dim, num_heads: as in :class:`manyheads.call.Latent`.
        sparse: a sparse indexer; it needs the expanded keys in the module itself, so such a module is left alone.
    """

    expand: str
    weight: str
    rank: str
    nope_dim: str
    rope_dim: str
    v_dim: str
    num_heads: str
    sparse: str


_TABLE = (
    _Names(
        "expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_heads",
        "indexer",
    ),
)  # fmt: skip


def latent_of(module: nn.Module) -> Latent | None:
    """How ``module`` makes keys and values of cached latents; None where it does not, or in a way not known here.

    Known are modules with the attributes of one row of the table whose up-projection is linear without bias; adapted,
    quantised and offloaded ones count with what they do, see :mod:`.weights`. The module is held weakly.
    """
    for names in _TABLE:
        if not hasattr(module, names.expand) or hasattr(module, names.sparse):
            continue
        linear: Any = getattr(module, names.weight, None)
        sizes = [getattr(module, n, None) for n in (names.rank, names.nope_dim, names.rope_dim, names.v_dim)]
        heads = getattr(module, names.num_heads, None)
        rank, nope, rope, v = (size if isinstance(size, int) else 0 for size in sizes)
        if not isinstance(linear, nn.Module) or getattr(linear, "bias", None) is not None or not isinstance(heads, int):
            continue
        if rank and (input_width(linear), getattr(linear, "out_features", None)) == (rank, heads * (nope + v)):
            return Latent(rank, nope, rope, v, heads, weight_of(module, names.weight))
    return None
