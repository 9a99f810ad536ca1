# SPDX-License-Identifier: Apache-2.0
"""Heads as a spec names them; loads no torch."""

from typing import Annotated

from pydantic import BeforeValidator

__all__ = ["Heads"]


def _as_heads(value: object) -> object:
    """``"3.1+4.2"`` -> ``("3.1", "4.2")``, checked."""
    names = tuple(value.split("+")) if isinstance(value, str) else value
    if isinstance(names, tuple):
        for name in names:
            layer, dot, head = str(name).partition(".")
            if not (dot and layer.isdecimal() and head.isdecimal()):
                raise ValueError(f"write heads as layer.head, joined by +, not {name!r}")
    return names


Heads = Annotated[tuple[str, ...], BeforeValidator(_as_heads)]
