# SPDX-License-Identifier: Apache-2.0
"""Heads as a spec names them; loads no torch."""

from typing import Annotated, Any

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


class _Named:
    """Read by pydantic when a spec is: its import is slow, and `manyheads --help` needs the kinds alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(_as_heads, handler(source))


Heads = Annotated[tuple[str, ...], _Named()]
