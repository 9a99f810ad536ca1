# SPDX-License-Identifier: Apache-2.0
"""Attention strategies of many papers, side by side on your own model.

    import manyheads

    with manyheads.use(model, "hashevict:budget=0.5"):
        model.generate(**inputs)

Importing the package loads no torch and no strategy: every public name is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyheads.call import AttentionCall, Site
    from manyheads.catalog import Paper, baselines, find, get, papers
    from manyheads.comparison import compare
    from manyheads.comparison_field import load, train
    from manyheads.comparison_rank import compare_rankers
    from manyheads.comparison_train import compare_trained
    from manyheads.errors import UserError
    from manyheads.generate.detect import detect
    from manyheads.generate.texts import reply
    from manyheads.head_selection import select_heads
    from manyheads.heads import HeadTable
    from manyheads.inspect import watch
    from manyheads.integrations import use
    from manyheads.lens import TokenSpans
    from manyheads.questions import ask
    from manyheads.shortening import shorten
    from manyheads.spec import parse
    from manyheads.strategy import Strategy

__version__ = "0.1.0"

__all__ = [
    "AttentionCall",
    "HeadTable",
    "Paper",
    "TokenSpans",
    "Site",
    "Strategy",
    "UserError",
    "ask",
    "baselines",
    "find",
    "get",
    "load",
    "compare",
    "compare_rankers",
    "compare_trained",
    "detect",
    "papers",
    "parse",
    "reply",
    "select_heads",
    "shorten",
    "train",
    "use",
    "watch",
]

_HOMES = {
    "manyheads.call": ("AttentionCall", "Site"),
    "manyheads.comparison": ("compare",),
    "manyheads.comparison_rank": ("compare_rankers",),
    "manyheads.comparison_train": ("compare_trained",),
    "manyheads.catalog": ("Paper", "baselines", "find", "get", "papers"),
    "manyheads.comparison_field": ("load", "train"),
    "manyheads.errors": ("UserError",),
    "manyheads.generate.detect": ("detect",),
    "manyheads.generate.texts": ("reply",),
    "manyheads.head_selection": ("select_heads",),
    "manyheads.heads": ("HeadTable",),
    "manyheads.lens": ("TokenSpans",),
    "manyheads.integrations": ("use",),
    "manyheads.inspect": ("watch",),
    "manyheads.questions": ("ask",),
    "manyheads.shortening": ("shorten",),
    "manyheads.spec": ("parse",),
    "manyheads.strategy": ("Strategy",),
}
_PARTS = (
    "attention",
    "call",
    "catalog",
    "claims",
    "errors",
    "models",
    "integrations",
    "inspect",
    "spec",
    "strategy",
)


def __getattr__(name: str) -> Any:
    """Import a public name or submodule on first use; a wrong name is answered with the nearest ones."""
    if name in _PARTS:
        return import_module(f"manyheads.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    if name.startswith("__"):
        raise AttributeError(f"module 'manyheads' has no attribute {name!r}")
    from difflib import get_close_matches

    known = [*__all__, *_PARTS]
    nearest = ", ".join(get_close_matches(name, known, n=3, cutoff=0.5)) or ", ".join(known)
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}; nearest: {nearest}")


def __dir__() -> list[str]:
    """Return every public name, loaded or not."""
    return sorted({*globals(), *__all__, *_PARTS})
