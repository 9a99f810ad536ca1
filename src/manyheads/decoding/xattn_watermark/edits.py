# SPDX-License-Identifier: Apache-2.0
"""Edits of a text that a watermark should survive, as where each token of the edited text comes from.

The extractor is trained on them and judged by them; -1 stands for a token that the editor brings.
"""

from collections.abc import Collection, Sequence

import numpy as np

from ...errors import UserError

__all__ = ["EDITS", "edited", "origins", "sentences"]

EDITS = ("none", "deletion", "insertion", "substitution", "swap", "reorder")
_PIECE = 16  # tokens of a piece where a text has no sentences
_Rng = np.random.Generator


def sentences(tokens: Sequence[int], ends: Collection[int]) -> list[tuple[int, int]]:
    """Stretches of tokens that end with one of ``ends``; pieces of 16 tokens where there are not two."""
    stops = [i + 1 for i, token in enumerate(tokens) if token in ends and i + 1 < len(tokens)]
    stops = stops or list(range(_PIECE, len(tokens), _PIECE))
    return list(zip([0, *stops], [*stops, len(tokens)], strict=True))


def origins(length: int, edit: str, rate: float, rng: _Rng, parts: Sequence[tuple[int, int]] = ()) -> list[int]:
    """Where each token of the edited text comes from in one of ``length`` tokens; -1 for a foreign one.

    Args:
        length: tokens.
        edit: one of :data:`EDITS`.
        rate: share of the tokens that are deleted, replaced or swapped with the next, or of foreign ones put between.
        rng: of the draws.
        parts: what ``reorder`` puts into another order, see :func:`sentences`.

    Raises:
        UserError: another edit, or a rate that is no share.
    """
    if edit not in EDITS or not 0 <= rate < 1:
        raise UserError(f"edits are {', '.join(EDITS)}, at a rate of 0 or more and below 1, not {edit!r} at {rate}")
    places, count = list(range(length)), round(rate * length)
    if edit == "none":
        return places
    if edit == "reorder":
        order = [int(place) for place in rng.permutation(len(parts))]
        if len(parts) > 1 and order == sorted(order):
            order = order[1:] + order[:1]
        return [place for part in order for place in range(*parts[part])]
    if edit == "swap":
        for left in rng.permutation(np.arange(0, length - 1, 2))[: round(rate * length / 2)].tolist():
            places[left], places[left + 1] = places[left + 1], places[left]
        return places
    chosen = set(rng.permutation(length)[:count].tolist())
    if edit == "deletion":
        return [place for place in places if place not in chosen]
    if edit == "substitution":
        return [-1 if place in chosen else place for place in places]
    return [source for place in places for source in ((-1, place) if place in chosen else (place,))]


def edited(
    tokens: Sequence[int], edit: str, rate: float, rng: _Rng, foreign: Sequence[int], ends: Collection[int] = ()
) -> list[int]:  # fmt: skip
    """The text after an edit; what is new in it is drawn from ``foreign``, tokens of other texts."""
    places = origins(len(tokens), edit, rate, rng, sentences(tokens, ends) if edit == "reorder" else ())
    return [foreign[int(rng.integers(len(foreign)))] if place < 0 else tokens[place] for place in places]
