# SPDX-License-Identifier: Apache-2.0
"""Massive entries of the residual stream: which they are, where they were found, and their means by channel."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ...call import Site
    from ...lens import LensResult
    from .extremes import Extremes

__all__ = ["Means", "massive", "means", "most_common", "name_tokens", "read_means", "spikes"]

Means = dict[str, dict[str, dict[str, float]]]  # site -> start or other -> channel -> value


def massive(hidden: Tensor, valid: Tensor, median: Tensor, threshold: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """Which entries are massive: ``hidden [B, T, D]``, ``valid [B, T]``, ``median [B]`` -> bool ``[B, T, D]``."""
    size = hidden.abs()
    return (size > threshold) & (size >= ratio * median[:, None, None]) & valid[..., None]


def spikes(site: Site, prompts: Sequence[Extremes], threshold: float, ratio: float) -> list[dict[str, Any]]:
    """The massive ones among the entries kept at a block, prompt by prompt, greatest first."""
    made, prompt = [], 0
    layer = site.index if site.layer is None else site.layer
    for part in prompts:
        median = part.median()
        size = part.values.abs()
        hits = (size > threshold) & (size >= ratio * median[:, None])
        for row, place in hits.nonzero().tolist():
            value = float(part.values[row, place])
            made.append({
                "prompt": prompt + row, "site": site.name, "layer": layer,
                "column": int(part.columns[row, place]), "position": int(part.positions[row, place]),
                "channel": int(part.channels[row, place]), "value": value,
                "ratio": abs(value) / max(float(median[row]), 1e-30),
            })  # fmt: skip
        prompt += len(median)
    return made


def means(found: LensResult) -> Means:
    """Mean of the massive entries of each channel, apart for starting and later tokens: what ``means`` takes.

    ``json.dump`` of it makes a file that the field ``means`` of a spec can name. Watch the calibration texts (the paper
    takes 100) with the thresholds of the intervention.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for spike in found.records["spikes"]:
        kind = "other" if spike["position"] else "start"
        values.setdefault((spike["site"], kind, str(spike["channel"])), []).append(spike["value"])
    made: Means = {}
    for (site, kind, channel), seen in values.items():
        made.setdefault(site, {}).setdefault(kind, {})[channel] = float(np.mean(seen))
    return made


def name_tokens(
    found: LensResult, rows: Sequence[Sequence[int]], decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the token of each spike into its record, and say which tokens have spikes, over prompts and blocks.

    Args:
        found: is added to: ``token`` in every spike.
        rows: token ids of each prompt, padding and decoded tokens included.
        decode: a tokenizer's.

    Returns:
        ``position``, ``token``, ``count`` of spikes and their ``channels``, most spikes first.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for spike in found.records["spikes"]:
        spike["token"] = decode([int(rows[spike["prompt"]][spike["column"]])])
        groups.setdefault((spike["position"], spike["token"]), []).append(spike["channel"])
    made = [
        {"position": at, "token": token, "count": len(channels), "channels": sorted(set(channels))}
        for (at, token), channels in groups.items()
    ]
    return sorted(made, key=lambda row: (-row["count"], row["position"], row["token"]))


def read_means(given: str | Means) -> Means:
    """The means of a JSON file, or ``given`` where it is no path."""
    if not isinstance(given, str):
        return given
    try:
        made: Means = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"means={given} cannot be read ({error}); write json.dump(means(result), file)") from error
    return made


def most_common(found: Sequence[dict[str, Any]], key: str, count: int = 5) -> str:
    """``0 (12), 5 (3) and 4 more``: the commonest values with how often they occur."""
    seen = Counter(spike[key] for spike in found).most_common()
    more = f" and {len(seen) - count} more" if len(seen) > count else ""
    return ", ".join(f"{value} ({times})" for value, times in seen[:count]) + more
