# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that edit a source by the difference of two prompts."""

from dataclasses import replace
from typing import Any, Self

from .strategy import DenoiserPrediction

__all__ = ["PromptEditor"]


class PromptEditor(DenoiserPrediction):
    """Makes a target beside its source, both told by prompts: first the prompts of the sources, then the targets'.

    Attributes:
        path: of a source that was not made by the pipeline, the latents ``[T + 1, B, ...]`` by which its steps lead to
            it, noise first; None where the pipeline makes the source itself.
    """

    path: Any

    def on_path(self, path: Any) -> Self:
        """The strategy for an inverted source."""
        return replace(self, path=path)  # type: ignore[call-arg]
