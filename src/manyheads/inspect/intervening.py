# SPDX-License-Identifier: Apache-2.0
"""Lenses that ask a model prompts of their own, with something changed, or compare two checkpoints of it."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..causal_lens import CausalLens, ComparativeLens
from ..errors import UserError
from ..integrations import use
from ..lens import Lens, LensResult

__all__ = ["check_intervening", "intervened"]

Other = tuple[nn.Module, str] | None  # a checkpoint and its name


def check_intervening(lenses: Sequence[Lens | CausalLens], against: Other, mute: str | None = None) -> None:
    """Refuse another checkpoint that no lens looks at, and any lens that asks where ``mute`` predicts no token."""
    if against is not None and not any(isinstance(lens, ComparativeLens) for lens in lenses):
        raise UserError("no lens compares two checkpoints: name thinking_sparks, or leave --against away")
    if mute and (asking := [lens.slug for lens in lenses if isinstance(lens, CausalLens)]):
        raise UserError(f"{asking[0]} asks for the next token, and {mute} predicts none: take a decoder")


def intervened(
    model: nn.Module, tokenizer: Any, lenses: Sequence[Lens | CausalLens], against: Other
) -> dict[str, LensResult]:  # fmt: skip
    """What those of ``lenses`` find that intervene, by their specs."""
    return {
        lens.spec: lens.compare(model, against[0], tokenizer, use)
        if against is not None and isinstance(lens, ComparativeLens)
        else lens.locate(model, tokenizer, use)
        for lens in lenses
        if isinstance(lens, CausalLens)
    }
