# SPDX-License-Identifier: Apache-2.0
"""Rows of one metric from plain numbers."""

from manyheads.experiment.rows import Row


def rows(values, contexts=None, seeds=None, arm="a", **more):
    contexts = range(len(values)) if contexts is None else contexts
    seeds = [0] * len(values) if seeds is None else seeds
    return [
        Row(task="t", metric="m", arm=arm, value=float(v), sample=f"{i}", context=f"{c}", seed=int(s), **more)
        for i, (v, c, s) in enumerate(zip(values, contexts, seeds, strict=True))
    ]


def crossed(values, arm="a"):
    """Rows of values ``[S, C]``: every seed on the same contexts."""
    return [
        Row(task="t", metric="m", arm=arm, value=float(values[s, c]), sample=f"{c}", seed=s)
        for s in range(values.shape[0])
        for c in range(values.shape[1])
    ]
