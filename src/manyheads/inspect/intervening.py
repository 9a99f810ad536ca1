# SPDX-License-Identifier: Apache-2.0
"""Lenses that ask a model prompts of their own, with something changed, or compare two checkpoints of it."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..causal_lens import CausalLens, ComparativeLens
from ..errors import UserError
from ..integrations import use
from ..lens import Lens, LensResult

__all__ = ["check_against", "intervened"]

Other = tuple[nn.Module, str] | None  # a checkpoint and its name


def check_against(lenses: Sequence[Lens | CausalLens], against: Other) -> None:
    """Refuse another checkpoint that no lens looks at."""
    if against is not None and not any(isinstance(lens, ComparativeLens) for lens in lenses):
        raise UserError("no lens compares two checkpoints: name thinking_sparks, or leave --against away")


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
