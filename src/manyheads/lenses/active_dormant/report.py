# SPDX-License-Identifier: Apache-2.0
"""What tables of attention sinks, drained values and residual peaks say, in sentences for a reader."""

from collections.abc import Sequence

import numpy as np

from ...heads import HeadTable, listed

__all__ = ["notes"]


def notes(tables: dict[str, HeadTable], threshold: float, domains: Sequence[str] = ()) -> list[str]:
    """Sentences about ``tables``; heads are dormant above ``threshold``, and ``switch`` is of two ``domains``."""
    means = {name: of.mean for name, of in tables.items() if np.isfinite(of.mean).any()}
    if "sink" not in means:
        return ["Nothing was counted: no token has another one before it. Give longer prompts."]
    sink, known = tables["sink"], np.isfinite(means["sink"])
    dormant = known & (sink.mean > threshold)
    text = (
        f"{int(dormant.sum())} of {int(known.sum())} heads are dormant here: they give more than {threshold:.0%} of "
        f"their attention to the first token. Most: {listed(sink, sink.top(3))}; "
        f"mean over heads {sink.mean[known].mean():.2f}"
    )
    if "gap" in means:
        gap = np.nanmedian(means["gap"])
        text += f"; its logit is {abs(gap):.1f} nats {'above' if gap >= 0 else 'below'} the others' in the median head"
    made = [text + "."]
    if "drain" in means:
        rest = "the other heads" if dormant.any() else "the median head"
        medians = [
            f"{np.nanmedian(means['drain'][where]):.2f} times that of the others in {what}"
            for where, what in ((dormant, "dormant heads"), (known & ~dormant, rest))
            if np.isfinite(means["drain"][where]).any()
        ]
        text = f"The norm of the first token's value is {', '.join(medians)}"
        if np.isfinite(related := sink.correlation(tables["drain"])):
            text += f"; over heads, sink and value have a rank correlation of {related:.2f}"
            text += " (a drain shows as a negative one)" if related < 0 else ""
        made.append(text + ".")
    if "peak" in means:
        peak, layers = means["peak"][:, 0], tables["peak"].layers
        at = int(np.nanargmax(peak))
        made.append(
            f"The first token's residual stream stands out most after layer {layers[at]}, where its norm is "
            f"{peak[at]:.1f} times that of the other tokens; in the median layer {np.nanmedian(peak):.1f} times."
        )
    if "learned" in means:
        learned = np.nanmean(means["learned"])
        made.append(f"Learned sinks take {learned:.0%} of the attention, beside what the first token gets.")
    if "switch" in tables:
        moved = tables["switch"]
        size = HeadTable("size", moved.sites, np.abs(moved.mean), layers=moved.layers)
        made.append(
            f"Between {domains[0]} and {domains[1]} these heads change most (sink on the first minus sink on the "
            f"second): {listed(moved, size.top(3))}. A large difference means a head that works on one and rests on "
            "the other; `ablate:heads=...` shows what it is worth on each."
        )
    return made
