# SPDX-License-Identifier: Apache-2.0
"""What tables of attention sinks, drained values and residual peaks say, in sentences for a reader."""

from collections.abc import Sequence

import numpy as np

from ...heads import Head, HeadTable

__all__ = ["notes"]


def notes(tables: dict[str, HeadTable], threshold: float, domains: Sequence[str] = ()) -> list[str]:
    """Sentences about the tables of :class:`manyheads.lenses.active_dormant.ActiveDormant`.

    Args:
        tables: by name: ``sink``, ``drain``, and what else there is.
        threshold: sink from which on a head is called dormant.
        domains: what ``switch`` is a difference of.
    """
    sink = tables["sink"].mean
    known = np.isfinite(sink)
    if not known.any():
        return ["Nothing was counted: no token has another one before it. Give longer prompts."]
    dormant = known & (sink > threshold)
    made = [_sinks(tables, dormant, known, threshold)]
    if np.isfinite(tables["drain"].mean).any():
        made.append(_values(tables, dormant, known & ~dormant))
    if "peak" in tables and np.isfinite(tables["peak"].mean).any():
        peak, layers = tables["peak"].mean[:, 0], tables["peak"].layers
        at = int(np.nanargmax(peak))
        made.append(
            f"The first token's residual stream stands out most after layer {layers[at]}, where its norm is "
            f"{peak[at]:.1f} times that of the other tokens; in the median layer {np.nanmedian(peak):.1f} times."
        )
    if "learned" in tables:
        learned = np.nanmean(tables["learned"].mean)
        made.append(f"Learned sink logits take {learned:.0%} of the attention, beside what the first token gets.")
    if "switch" in tables:
        moved = tables["switch"]
        size = HeadTable("size", moved.sites, np.abs(moved.mean), layers=moved.layers)
        made.append(
            f"Between {domains[0]} and {domains[1]} these heads change most (sink on the first minus sink on the "
            f"second): {_named(moved, size.top(3))}. A large difference means a head that works on one and rests on "
            "the other; `ablate:heads=...` shows what it is worth on each."
        )
    return made


def _sinks(tables: dict[str, HeadTable], dormant: np.ndarray, known: np.ndarray, threshold: float) -> str:
    sink = tables["sink"]
    text = (
        f"{int(dormant.sum())} of {int(known.sum())} heads are dormant here: they give more than {threshold:.0%} of "
        f"their attention to the first token. Most: {_named(sink, sink.top(3))}; "
        f"mean over heads {sink.mean[known].mean():.2f}"
    )
    if "gap" in tables and np.isfinite(tables["gap"].mean).any():
        gap = np.nanmedian(tables["gap"].mean)
        text += f"; its logit is {abs(gap):.1f} nats {'above' if gap >= 0 else 'below'} the others' in the median head"
    return text + "."


def _values(tables: dict[str, HeadTable], dormant: np.ndarray, rest: np.ndarray) -> str:
    drain = tables["drain"]
    parts = [
        f"{np.nanmedian(drain.mean[where]):.2f} times that of the others in {what}"
        for where, what in (
            (dormant, "dormant heads"),
            (rest, "the other heads" if dormant.any() else "the median head"),
        )
        if np.isfinite(drain.mean[where]).any()
    ]
    related = tables["sink"].correlation(drain)
    text = f"The norm of the first token's value is {', '.join(parts)}"
    if np.isfinite(related):
        text += f"; over heads, sink and value have a rank correlation of {related:.2f}"
        text += " (a drain shows as a negative one)" if related < 0 else ""
    return text + "."


def _named(of: HeadTable, heads: Sequence[Head]) -> str:
    return ", ".join(f"{name} ({of.mean[head]:.2f})" for name, head in zip(of.names(heads), heads, strict=True))
