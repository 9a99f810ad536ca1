# SPDX-License-Identifier: Apache-2.0
"""Which attention modules of a denoiser are run, counted the same way for every implementation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["KINDS", "computed", "kind_of"]

KINDS = ("spatial", "temporal", "cross")


def kind_of(name: str) -> str:
    """The kind of a Latte's attention module, by its path: within a frame, over frames, or to the text."""
    if name.startswith("temporal_transformer_blocks"):
        return "temporal"
    return "cross" if name.endswith("attn2") else "spatial"


@contextmanager
def computed(model: Any) -> Iterator[Counter[str]]:
    """Count what attention modules are run inside, by kind, in queries: rows times tokens of every call.

    A module is counted at its query projection, which runs with it and with nothing else.
    """
    counts: Counter[str] = Counter()
    handles = []
    for name, module in model.named_modules():
        if not hasattr(module, "to_q"):
            continue

        def count(_: Any, given: tuple[Any, ...], __: Any, kind: str = kind_of(name)) -> None:
            counts[kind] += given[0].shape[0] * given[0].shape[1]

        handles.append(module.to_q.register_forward_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
