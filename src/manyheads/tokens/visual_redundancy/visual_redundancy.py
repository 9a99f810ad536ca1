# SPDX-License-Identifier: Apache-2.0
"""VMTC: image tokens that matter stay, the others are clustered, and each cluster becomes one token.

With ``IPS_i`` the attention that patch i receives from the class token in the tower's last layer but one, mean over
heads (where there is no class token, from all patches), of V tokens behind the projector:

    primary     the round(primary V) of the greatest IPS, as they are
    clusters    the rest by K-Means under the cosine, round(clusters V) of them
    merged      sum of IPS_i x_i over sum of IPS_i, in the place of the member of the greatest IPS

All tokens stand in raster order at the positions that they had. Inferred: the layer, the weights of the mean, the
places and both shares (defaults .25 and .06); K-Means begins with k-means++ by a fixed seed, has at most 10 rounds, and
gives an empty cluster the token that fits worst. With ``choose=random`` primary tokens are drawn, ``merge=false`` drops
the rest. ``source=patches`` is for towers whose class token was not trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...attention.merging import Grouping
from ...call import AttentionCall
from ...calls.weights import weights as rows_of
from ...errors import UserError
from ...reducing import ImageReducer

__all__ = ["VMTC", "cosine_clusters"]

_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class VMTC(ImageReducer):
    """Keeps and merges image tokens between tower and decoder.

    Attributes:
        primary: share of the tokens that stay as they are.
        clusters: share of the tokens that the rest becomes.
        choose: primary tokens by ``attention``, or ``random`` ones, alike for all images.
        source: whose attention that is: of the ``class`` token, where there is one, or the mean of all ``patches``.
        merge: else the rest is dropped.
        seed: of K-Means and of ``choose=random``.
    """

    primary: float = field(default=0.25, metadata={"help": "share of the tokens that stay"})
    clusters: float = field(default=0.06, metadata={"help": "share of the tokens that the rest is merged into"})
    choose: Literal["attention", "random"] = field(default="attention", metadata={"help": "random: a control"})
    source: Literal["class", "patches"] = field(default="class", metadata={"help": "whose attention weighs patches"})
    merge: bool = field(default=True, metadata={"help": "merge the rest, else drop it"})
    seed: int = field(default=0, metadata={"help": "of K-Means and random choice"})

    def __post_init__(self) -> None:
        if not (0 <= self.primary <= 1 and 0 <= self.clusters <= 1 and 0 < self.primary + self.clusters <= 1):
            raise UserError(
                f"{self.slug}: primary and clusters are shares of the tokens, together above 0 and at most 1"
            )

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Keep what each patch receives; nothing is changed."""
        first, total = None, None
        for _, rows in rows_of(call):
            mean = rows.mean(1)
            first = mean[:, 0] if first is None else first
            total = mean.sum(1) if total is None else total + mean.sum(1)
        call.state["received"] = first, total
        return call

    def importance(self, count: int, seen: Sequence[dict[str, Any]]) -> Tensor:
        """IPS of V patches ``[N, V]``: those of the last layer but one, or the only one."""
        kept = [state["received"] for state in seen if "received" in state]
        if not kept:
            raise UserError(f"{self.spec} weighs patches by the tower's attention, and the tower did not run")
        first, total = kept[-2] if len(kept) > 1 else kept[-1]
        prefix = int(first.shape[1]) - count
        chosen: Tensor = first if prefix and self.source == "class" else total
        return chosen[:, prefix:]

    def group(self, features: Tensor, grid: tuple[int, int], seen: Sequence[dict[str, Any]]) -> tuple[Grouping, Tensor]:
        images, count, _ = features.shape
        stay, merged = round(self.primary * count), round(self.clusters * count)
        if stay + merged < 1 or (not stay and not self.merge):
            raise UserError(f"{self.spec} leaves no token of {count}; give larger shares")
        weights = self.importance(count, seen).to(features.device).clamp(min=torch.finfo(torch.float32).tiny)
        score = weights
        if self.choose == "random":
            noise = torch.rand(count, generator=torch.Generator().manual_seed(self.seed))
            score = noise.to(features.device).expand(images, -1)
        order = score.argsort(dim=1, descending=True, stable=True)
        primary = torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :stay], True)
        total = stay + (min(merged, count - stay) if self.merge else 0)
        into = torch.full((images, count), total, dtype=torch.long, device=features.device)
        into[primary] = torch.arange(stay, device=features.device).repeat(images)
        if total > stay:
            rest = (~primary).nonzero()[:, 1].view(images, -1)
            others = features.gather(1, rest[..., None].expand(-1, -1, features.shape[2]))
            labels = torch.stack([cosine_clusters(x, total - stay, self.seed) for x in others])
            into.scatter_(1, rest, stay + labels)
        return Grouping(into, total), weights


def cosine_clusters(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """K-Means of ``x [N, D]`` by the cosine: the cluster of each, ``[N]`` int64; none of ``count <= N`` is empty."""
    x = normalize(x.float(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    while len(centres) < count:  # k-means++: far from all so far
        far = (1 - (x @ centres.T).amax(1)).clamp(min=0).square().cpu().double() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=generator).to(x.device)]])
    labels = torch.full((len(x),), -1, device=x.device)
    for _ in range(_ROUNDS):
        likeness, found = (x @ centres.T).max(1)
        for empty in (torch.bincount(found, minlength=count) == 0).nonzero()[:, 0].tolist():
            sizes = torch.bincount(found, minlength=count)
            worst = int(torch.where(sizes[found] > 1, likeness, torch.inf).argmin())
            found[worst], likeness[worst] = empty, torch.inf
        if torch.equal(found, labels):
            break
        labels = found
        sums = torch.zeros_like(centres).index_add(0, labels, x)
        centres = normalize(sums, dim=1)
    return labels
