# SPDX-License-Identifier: Apache-2.0
"""Cross-attention of diffusers' UNets with trained branches in its place, see ``conditioning.AttentionAdaptor``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..conditioning import AdaptedSite, AttentionAdaptor
from ..errors import UserError

__all__ = ["adapted", "adaptor_of", "cross_attention"]


def cross_attention(denoiser: nn.Module) -> dict[str, Any]:
    """The attention modules of a denoiser that look at the caption, by path.

    Raises:
        UserError: there are none, or they do more than project and attend.
    """
    found = {name: m for name, m in denoiser.named_modules() if getattr(m, "is_cross_attention", False)}
    for name, module in found.items():
        more = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "residual_connection")
        if any(getattr(module, each, None) not in (None, False) for each in more):
            raise UserError(f"{name} does more than attention, which no adaptor is for")
    if not found:
        raise UserError(f"{type(denoiser).__name__} has no cross-attention of its own to adapt: give one of a UNet")
    return found


def adaptor_of(denoiser: nn.Module, strategy: AttentionAdaptor) -> nn.ModuleDict:
    """New branches for all cross-attention of a denoiser, on its device."""
    sites = {
        name: AdaptedSite(m.to_q.in_features, m.to_k.in_features, m.heads, m.to_q.out_features // m.heads)
        for name, m in cross_attention(denoiser).items()
    }
    made = nn.ModuleDict({_key(name): branch for name, branch in strategy.branches(sites).items()})
    weight = next(denoiser.parameters())
    return made.to(weight.device, weight.dtype)


def _key(path: str) -> str:
    """A module path as a name in a ModuleDict, in which torch has no dots."""
    return path.replace(".", "|")


@contextmanager
def adapted(denoiser: nn.Module, adaptor: nn.ModuleDict) -> Iterator[nn.Module]:
    """While open, cross-attention computes what its branch of ``adaptor`` does; the denoiser's weights stay.

    Raises:
        UserError: it was made for another denoiser.
    """
    modules = {_key(name): module for name, module in cross_attention(denoiser).items()}
    if modules.keys() != set(adaptor.keys()):
        raise UserError("the adaptor was made for a denoiser of other layers: make one for this")
    before = {name: module.processor for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.processor = _Branched(adaptor[name])
        yield denoiser
    finally:
        for name, module in modules.items():
            module.processor = before[name]


class _Frozen:
    """See ``conditioning.FrozenAttention``."""

    def __init__(self, attention: Any) -> None:
        self.attention, self.heads, self.scale = attention, int(attention.heads), float(attention.scale)

    def q(self, x: Tensor) -> Tensor:
        return self.attention.to_q(x)  # type: ignore[no-any-return]

    def k(self, context: Tensor) -> Tensor:
        return self.attention.to_k(context)  # type: ignore[no-any-return]

    def v(self, context: Tensor) -> Tensor:
        return self.attention.to_v(context)  # type: ignore[no-any-return]

    def out(self, y: Tensor) -> Tensor:
        return self.attention.to_out[1](self.attention.to_out[0](y))  # type: ignore[no-any-return]


class _Branched:
    """A processor of diffusers that has a branch compute."""

    def __init__(self, branch: nn.Module) -> None:
        self.branch = branch

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None or encoder_hidden_states is None or hidden_states.ndim != 3:
            raise UserError("an adapted attention looks at a caption without a mask, from tokens in a row")
        out: Tensor = self.branch(_Frozen(attn), hidden_states, encoder_hidden_states) / attn.rescale_output_factor
        return out
