# SPDX-License-Identifier: Apache-2.0
"""Attention modules whose cache holds latents (MLA): which attributes say how keys and values are made of them."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..call import Latent

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

    Known are modules with the attributes of one row of the table whose up-projection is a plain ``nn.Linear`` without
    bias, not a quantised or adapted one: merge adapters first. The module is held weakly.
    """
    for names in _TABLE:
        if not hasattr(module, names.expand) or hasattr(module, names.sparse):
            continue
        linear: Any = getattr(module, names.weight, None)
        sizes = [getattr(module, n, None) for n in (names.rank, names.nope_dim, names.rope_dim, names.v_dim)]
        heads = getattr(module, names.num_heads, None)
        rank, nope, rope, v = (size if isinstance(size, int) else 0 for size in sizes)
        if type(linear) is not nn.Linear or getattr(linear, "bias", None) is not None or not isinstance(heads, int):
            continue
        if rank and linear.weight.shape == (heads * (nope + v), rank):
            return Latent(rank, nope, rope, v, heads, _weight_of(module, names.weight))
    return None


def _weight_of(module: nn.Module, name: str) -> Callable[[], Tensor]:
    """Gives the current weight of the linear layer ``name`` of ``module``, which it does not keep alive."""
    owner = weakref.ref(module)

    def weight() -> Tensor:
        here = owner()
        if here is None:
            raise RuntimeError("the model of this cache is gone")
        current: Tensor = getattr(here, name).weight
        return current

    return weight
