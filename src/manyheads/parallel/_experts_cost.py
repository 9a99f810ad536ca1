# SPDX-License-Identifier: Apache-2.0
"""What each way of bringing tokens to experts sends, and which is the quickest by the alpha-beta model.

Rows of a token that leave its process, of n processes with E / n experts each, if all experts are chosen alike:

    all_to_all   k (n - 1) / n
    dedupe       r (n - 1) / n,  r = n (1 - C(E - E/n, k) / C(E, k)); for E much larger than k: n (1 - (1 - 1/n)^k)
    all_gather   n - 1

as many there and back. So the all-gather sends as much as the all-to-all where k = n, and never less than ``dedupe``.
What the volumes leave out decides near k = n: an all-gather needs no counts first, and every process sends and gets the
same, while an all-to-all waits for the one whose experts are chosen most. ``imbalance`` says how much more that one
gets than the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import comb

from ..errors import UserError
from ._cost import CLUSTERS, Cluster, all_gather, all_to_all
from ._experts import DISPATCHES, Dispatch

__all__ = ["attention_rows", "choose_dispatch", "crossover", "dispatch_rows", "dispatch_time"]

_COUNT = 8  # bytes of a count


def _ranks_chosen(experts: int, top_k: int, ranks: int) -> float:
    """Processes that have some of ``top_k`` experts, in the mean over all choices."""
    missed = 0.0
    for rank in range(ranks):
        own = experts * (rank + 1) // ranks - experts * rank // ranks
        missed += comb(experts - own, top_k) / comb(experts, top_k)
    return ranks - missed


def dispatch_rows(dispatch: Dispatch, experts: int, top_k: int, ranks: int) -> float:
    """Rows that a token sends to other processes, in the mean over all choices; as many come back."""
    if dispatch == "all_gather":
        return ranks - 1.0
    each = top_k if dispatch == "all_to_all" else _ranks_chosen(experts, top_k, ranks)
    return each * (ranks - 1) / ranks


def dispatch_time(
    dispatch: Dispatch, experts: int, top_k: int, ranks: int, *, tokens: int, row: int, cluster: Cluster,
    imbalance: float = 1.0,
) -> float:  # fmt: skip
    """Modelled seconds of both ways of one layer, forward.

    Args:
        dispatch: the way.
        experts, top_k, ranks: of the layer, of a token, processes.
        tokens: of each process.
        row: bytes of a token.
        cluster: what joins the processes.
        imbalance: rows of the busiest process over the mean.
    """
    link, beside = cluster.link(ranks), top_k * 8  # bytes of a token's weights and choices
    if dispatch == "all_gather":
        both = all_gather(link, ranks, tokens * row)
        return all_gather(link, ranks, _COUNT) + all_gather(link, ranks, tokens * beside) + 2 * both
    rows = tokens * imbalance * dispatch_rows(dispatch, experts, top_k, ranks) * ranks / (ranks - 1)
    wide = beside if dispatch == "dedupe" else 4
    counts = all_gather(link, ranks, _COUNT * (ranks if dispatch == "dedupe" else experts))
    return counts + all_to_all(link, ranks, rows * wide) + 2 * all_to_all(link, ranks, rows * row)


def choose_dispatch(
    experts: int, top_k: int, ranks: int, cluster: Cluster | str = "h100", *, tokens: int = 4096, row: int = 8192,
    imbalance: float = 1.0, among: Iterable[Dispatch] = DISPATCHES,
) -> Dispatch:  # fmt: skip
    """The way that :func:`dispatch_time` has as the quickest; of equals the first of ``among``.

    Raises:
        UserError: a cluster that is not known, or a choice of more experts than there are.
    """
    if isinstance(cluster, str):
        if cluster not in CLUSTERS:
            raise UserError(f"there is no cluster {cluster!r}; there are {', '.join(CLUSTERS)}, or give a Cluster")
        cluster = CLUSTERS[cluster]
    if not 0 < top_k <= experts:
        raise UserError(f"a token chooses between 1 and all {experts} experts, not {top_k}")
    if ranks == 1:
        return "all_to_all"
    given = {"tokens": tokens, "row": row, "cluster": cluster, "imbalance": imbalance}
    return min(among, key=lambda way: dispatch_time(way, experts, top_k, ranks, **given))  # type: ignore[arg-type]


def crossover(experts: int, ranks: int, cluster: Cluster | str = "h100", *, imbalance: float = 1.0) -> int | None:
    """The least ``top_k`` from which on the all-gather is quicker than the plain all-to-all, None where it never is."""
    both: tuple[Dispatch, Dispatch] = ("all_to_all", "all_gather")
    for top_k in range(1, experts + 1):
        if choose_dispatch(experts, top_k, ranks, cluster, imbalance=imbalance, among=both) == "all_gather":
            return top_k
    return None


def attention_rows(ranks: int, groups: int) -> tuple[float, float]:
    """Rows that a process sends for each of all tokens, forward: attention with split weights, and shared by heads.

    The first gathers tokens and scatters sums; the second sends queries, keys, values and outputs to where their heads
    are. The second is (1 + 1 / groups) / ranks of the first.

    Args:
        ranks: processes.
        groups: query heads of a key/value head.
    """
    part = (ranks - 1) / ranks
    return 2 * part, (2 + 2 / groups) / ranks * part
