# SPDX-License-Identifier: Apache-2.0
"""KV bias, a mitigation of massive activations: a key and a value of its own for each head (paper 104, 2503.22329).

    Attention(Q, K, V; k', v') = softmax(Q [K; k']^T * scale) [V; v']

A head that has nothing to do needs somewhere to put its weight. With k' and v' learned it need not make a sink of the
first token, whose massive activations exist for that. The extra column costs one key, and no cache holds it.

    bias = KVBias.of(site for site, _ in find_sites(model))   # of manyheads.integrations.transformers
    optimizer = AdamW([*model.parameters(), *bias.parameters()])
    with manyheads.use(model, bias):   # in training and whenever the model is used
        model(**inputs)
    bias.save("kv_bias.safetensors")   # beside the model's own weights, which save_pretrained keeps

With grouped queries k' and v' are those of a key/value head. k' stands behind rotary positions, so that it is seen
alike from everywhere. Both start as normal draws of 0.02, the paper's initial weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...call import AttentionCall, Site
from ...calls.edits import append_kv
from ...errors import UserError
from ...strategy import AttentionEdit

__all__ = ["KVBias"]


@dataclass(frozen=True, kw_only=True)
class KVBias(AttentionEdit):
    """One learned key and value for each head of the sites that it knows.

    Attributes:
        weights: for each site ``{name}.k`` ``[Hkv, d]`` and ``{name}.v`` ``[Hkv, dv]``, parameters.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    weights: dict[str, nn.Parameter] = field(
        default_factory=dict, compare=False, metadata={"help": "k' and v' by site, made from Python only"}
    )

    @classmethod
    def of(cls, sites: Iterable[Site], *, std: float = 0.02, seed: int = 0) -> KVBias:
        """Draw them for the self-attention among the sites of a model.

        Args:
            sites: as ``manyheads.integrations.transformers.find_sites(model)`` gives them.
            std: of the draws; 0 adds one to the denominator of every softmax.
            seed: of the draws.

        Raises:
            UserError: the heads of a site, or their channels, are not known.
        """
        generator = torch.Generator().manual_seed(seed)
        return cls(
            weights={
                f"{site.name}.{kind}": nn.Parameter(std * torch.randn(*shape, generator=generator))
                for site in sites
                if site.kind in cls.kinds
                for kind, shape in zip("kv", _shapes(site), strict=True)
            }
        )

    def parameters(self) -> list[nn.Parameter]:
        """All of them, for an optimiser."""
        return list(self.weights.values())

    def to(self, device: torch.device | str) -> KVBias:
        """Move them, in place, so that an optimiser that holds them goes on."""
        for weight in self.parameters():
            weight.data = weight.data.to(device)
        return self

    def selects(self, site: Site) -> bool:
        return super().selects(site) and f"{site.name}.k" in self.weights

    def edit(self, call: AttentionCall) -> AttentionCall:
        k, v = (self.weights[f"{call.site.name}.{kind}"] for kind in "kv")
        return append_kv(call, k.to(call.k.device), v.to(call.v.device))

    def save(self, path: str | Path) -> None:
        """Write them as safetensors."""
        save_file({name: weight.detach().contiguous() for name, weight in self.weights.items()}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> KVBias:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: there is no such file, or it is damaged.
        """
        try:
            return cls(weights={name: nn.Parameter(tensor) for name, tensor in load_file(str(path)).items()})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} holds no KV bias ({error}); write one with KVBias.save") from error


def _shapes(site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
    """``[Hkv, d]`` and ``[Hkv, dv]`` of the keys and values as attention sees them."""
    if (latent := site.latent) is not None:
        return (latent.num_heads, latent.nope_dim + latent.rope_dim), (latent.num_heads, latent.v_dim)
    if site.num_heads is None or site.num_kv_heads is None or site.output is None:
        raise UserError(f"the heads of {site.name} are not known: give KVBias weights of your own, a k and a v by site")
    shape = site.num_kv_heads, site.output().shape[1] // site.num_heads
    return shape, shape
