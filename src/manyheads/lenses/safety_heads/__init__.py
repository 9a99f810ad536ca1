# SPDX-License-Identifier: Apache-2.0
"""Which heads write along a direction of the residual stream, such as the one that refusal hangs on.

Huang et al., "Safety Alignment Should Be Made More Than Just A Few Attention Heads", arXiv 2508.19697 (RDSHA and AHD).
A head adds ``O_h = W_O[h] z_h`` to the residual stream, ``z_h`` its output before the projection. For a direction r its
score at the last token of a prompt is

    s_h = |O_h . r| / |r|  =  |z_h . (W_O^T r)_h| / |r|.

The right side projects the direction back through ``W_O`` once, instead of the outputs of all heads forward: nothing of
size ``[B, T, H, D]`` is made. Heads are ranked prompt by prompt (:func:`ranked`); zeroing the first few shows whether
the behaviour hangs on them, and how few hold most of the score shows how thin the support is. In the paper a few dozen
of 1,024 heads carry the refusals of Llama 2, and jailbreaks work by lowering the sum of the eight largest scores
(:func:`strength`).

Nothing here is about safety alone: the direction may be the difference between any two sets of prompts (two languages,
two styles, true and false statements), :func:`find_direction` finds and saves one.

    find_direction(model, first, second, answers=[token], check=(more_first, more_second)).save("refusal.safetensors")
    with manyheads.watch(model, "safety_heads:direction=refusal.safetensors") as seen:
        model(**prompts)
    table = seen.compute().tables["score"]
    with manyheads.use(model, "ablate:heads=" + "+".join(table.names(table.top(8)))):
        model.generate(**prompts)

The paper's training strategy against it, dropping whole heads while it is tuned on safety data, is
:class:`HeadDropout` with :func:`ahd_loss`.

Shapes: z ``[B, T, H, dv]``, W_O ``[D, H * dv]`` (H * dv may differ from D), r ``[D]``. Left open by the paper, and done
here: a prompt is what a forward without earlier tokens holds, so that under ``generate`` its last token is scored and
decoded ones are not; biases of the projection belong to no head; where a norm follows the projection (Gemma 2 and 3,
OLMo 2) the score is of what goes into it. The paper's code has no part that ranks heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...call import Site
from ...errors import UserError
from ...heads import Head, HeadTable, listed
from ...lens import AttentionView, Lens, LensResult, Memory, RunningMean, table
from .ablate_rows import AblateRows
from .ahd import HeadDropout, ahd_loss
from .refusal_direction import Direction, difference_of_means, erased, find_direction, steered

__all__ = [
    "AblateRows", "Direction", "HeadDropout", "SafetyHeads", "difference_of_means", "erased", "find_direction",
    "ahd_loss", "ranked", "steered", "strength",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SafetyHeads(Lens):
    """How much each head writes along a direction at the last token of a prompt.

    Attributes:
        direction: safetensors file of the direction.
        top: heads that count as a prompt's first, for the table of how often a head is among them.
    """

    direction: str = field(default="", metadata={"help": "file of the direction, as find_direction(...).save wrote it"})
    top: int = field(default=50, metadata={"help": "heads that count as a prompt's first, at most a quarter of all"})

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"safety_heads: top counts heads and is at least 1, not {self.top}")

    def selects(self, site: Site) -> bool:
        """Everywhere but beside the decoder: an encoder, or a tower of pictures, has another residual stream."""
        beside = site.kind == "self" and not site.causal and bool(site.peers)
        return super().selects(site) and not beside

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        along = torch.einsum("bthd,hd->bth", view.out.float(), self._back(view))
        view.add_tokens("written", along.sum(-1), view.valid)
        if view.fresh:
            length = along.shape[1]
            last = length - 1 - view.valid.flip(1).long().argmax(1)
            signed = along[torch.arange(len(along), device=along.device), last]
            view.memory.setdefault("signed", RunningMean()).add(signed, view.valid.any(1, keepdim=True), fresh=True)

    def _back(self, view: AttentionView) -> Tensor:
        """The unit direction through ``W_O^T``: float32 ``[H, dv]``."""
        if "direction" not in view.memory:
            if not self.direction:
                raise UserError("safety_heads needs direction=FILE; make one with find_direction(...).save")
            view.memory["direction"] = Direction.load(self.direction)
        vector, site = view.memory["direction"].vector, view.call.site
        if site.output is None:
            raise UserError(f"{site.name}: its output projection is not known; leave its layer out with layers=...")
        weight, (heads, width) = site.output().detach().float(), view.out.shape[2:]
        if weight.shape != (len(vector), heads * width):
            raise UserError(
                f"{self.direction} has {len(vector)} channels; {site.name} writes {weight.shape[0]} from {heads} heads "
                f"of {width} (its weight takes {weight.shape[1]}); find the direction on this model"
            )
        back: Tensor = (vector / vector.norm()).to(weight) @ weight
        return back.view(heads, width)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        if not sites:
            return LensResult()
        direction = sites[0][1]["direction"]
        about = {"direction": self.direction, "layer": direction.layer, "position": direction.position}
        signed = table("written along the direction at the last token", sites, "signed", **about)
        score = replace(signed, name=f"{signed.name}, magnitude", values=np.abs(signed.values))
        top = max(1, min(self.top, int(np.isfinite(score.mean).sum()) // 4))
        among = np.where(np.isfinite(score.values), 0.0, np.nan)
        for row, heads in zip(among, _order(score, top), strict=True):
            for head in heads:
                row[head] = 1.0
        often = replace(score, name=f"among the {top} heads that write most along the direction", values=among)
        written = zip(*(memory["written"].rows() for _, memory in sites), strict=True)
        return LensResult(
            tables={"score": score, "signed": signed, "frequency": often},
            series={"written": [np.sum(rows, 0) for rows in written]},
            notes=_notes(score, often, top),
        )


def ranked(scores: HeadTable, count: int) -> list[tuple[str, ...]]:
    """For each prompt its ``count`` heads of greatest score, best first, as ``layer.head``."""
    return [scores.names(heads) for heads in _order(scores, count)]


def strength(scores: HeadTable, count: int = 8) -> "np.ndarray[Any, np.dtype[np.floating[Any]]]":
    """For each prompt the sum of its ``count`` greatest scores, ``[N]``: what a jailbreak lowers."""
    total: np.ndarray[Any, np.dtype[np.floating[Any]]] = _descending(scores)[:, :count].sum(1)
    return total


def _descending(scores: HeadTable) -> Any:
    """The scores of each prompt, greatest first: ``[N, L * H]``."""
    return -np.sort(-np.nan_to_num(scores.values.reshape(len(scores.values), -1)), axis=1)


def _order(scores: HeadTable, count: int) -> list[list[Head]]:
    return [replace(scores, values=values).top(count) for values in scores.values]


def _notes(score: HeadTable, often: HeadTable, top: int) -> list[str]:
    """How few heads hold half of what is written, and which they are."""
    known, flat = int(np.isfinite(score.mean).sum()), _descending(score)
    flat = flat[flat.sum(1) > 0]
    if not len(flat):
        return [f"No head of {known} writes anything along the direction."]
    half = int(np.median((flat.cumsum(1) < flat.sum(1, keepdims=True) / 2).sum(1) + 1))
    share = float(np.median(flat[:, :top].sum(1) / flat.sum(1)))
    return [
        f"Half of what {known} heads write along the direction at the last token comes from {half} of them; the first "
        f"{top} hold {share:.0%} (medians over {len(flat)} prompts).",
        f"Most often among the first {top}: {listed(often, often.top(4), '.0%')} of the prompts.",
    ]
