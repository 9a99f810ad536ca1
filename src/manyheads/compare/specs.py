# SPDX-License-Identifier: Apache-2.0
"""Lists of strategy specs as they are typed: commas part specs, and the fields of a spec."""

import re

from ..strategy import split_outside

__all__ = ["split_specs"]


def split_specs(text: str) -> list[str]:
    """Split ``a,b:x=1,y=2,c`` into specs: a piece that reads ``name=value`` goes on with the spec before it."""
    specs: list[str] = []
    for piece in split_outside(text):
        if specs and re.match(r"\w+\s*=", piece):
            specs[-1] += ("," if ":" in specs[-1] else ":") + piece
        else:
            specs.append(piece)
    return specs
