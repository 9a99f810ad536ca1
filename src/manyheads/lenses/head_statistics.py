# SPDX-License-Identifier: Apache-2.0
"""What every head does at every step of a generation: entropy, greatest logit, and where its weight goes.

    with manyheads.watch(model, "head_statistics") as seen:
        model.generate(**inputs, max_new_tokens=200)
    found = seen.compute("head_statistics")
    found.steps["entropy"]        # [L, H, steps], of the first prompt
    found.tables["logit"].top(5)  # heads with the greatest logits

A step is a token that is chosen: the first is chosen by the last token of the prompt. A text that is read with its
response, as ``manyheads inspect --generate`` does, has the steps of that. For each step and head,

- ``entropy``: ``-sum A log A`` of the weights ``A`` in nats;
- ``logit``: the greatest logit, scaled and capped, before the softmax: what overflows in low precision, and what
  clipping of queries and keys holds down (for MuonClip arXiv 2507.20534, for QK norm arXiv 2302.05442);
- ``first``: weight on the first token, the sink;
- ``last``: weight on the ``near`` newest tokens, the step's own token among them;
- ``top``: the place of the key with the greatest weight, padding not counted.

For the tokens of the prompt means over them stand in tables ``prompt entropy`` and so on, and the greatest logit.

Weights are those of the keys that the model has at the step. Where a cache dropped some, all five are of the kept ones:
entropy and weights of what is left (they sum to 1 over that), ``first`` is 0 where the first token was dropped, and
``top`` is the place that the key had in the text. Keys in front that an edit put there count as no token: they take
weight, and ``top`` is -1 where one of them has the most.

Shapes as in :mod:`manyheads.calls.statistics`. Memory: five numbers a step and head, of the latest ``keep`` steps, in
the host's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..attention.reference import repeat_kv
from ..call import Site
from ..calls.statistics import Band, Entropy, Peak, Rows, Statistic, WeightedSum
from ..errors import UserError
from ..heads import HeadTable
from ..lens import AttentionView, Lens, LensResult, Memory, table, table_of
from ..lens.steps import Steps

__all__ = ["MEASURES", "HeadStatistics"]

MEASURES = {
    "entropy": "entropy of the weights, nats",
    "logit": "greatest logit",
    "first": "weight on the first token",
    "last": "weight on the newest token",
    "top": "place of the key with the greatest weight",
}


_PLACES = 20  # that are listed


@dataclass
class OnSlots(Rows):
    """Weight on some slots, which differ between the heads of a compressed cache: ``[B, H, T, F]``.

    Attributes:
        masks: ``[B, Hkv, T or 1, S, F]``.
    """

    masks: Tensor

    def update(self, rows: Tensor, start: int, length: int) -> None:
        masks = self.masks if self.masks.shape[2] == 1 else self.masks[:, :, start : start + rows.shape[2]]
        masks = masks.to(rows.dtype).expand(-1, -1, rows.shape[2], -1, -1)
        grouped = rows.unflatten(1, (masks.shape[1], -1))
        self.put(torch.einsum("bkgts,bktsf->bkgtf", grouped, masks).flatten(1, 2), start, length)


@dataclass(frozen=True, kw_only=True)
class HeadStatistics(Lens):
    """Entropy, greatest logit, sink, recency and the most attended place of each head, step by step."""

    kinds = frozenset({"self"})
    reads_slots: ClassVar[bool] = True

    near: int = field(default=1, metadata={"help": "newest tokens whose weight counts as last"})
    keep: int = field(default=4096, metadata={"help": "latest steps that are kept"})

    def __post_init__(self) -> None:
        if self.near < 1 or self.keep < 1:
            raise UserError("head_statistics: near and keep are at least 1")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        asked: dict[str, Statistic] = {"entropy": Entropy(), "peak": Peak()}
        if view.slots is not None:
            asked["slots"] = OnSlots(self._slots(view))
            return asked
        device = view.call.q.device
        asked["first"] = WeightedSum(view.once("first feature", lambda: view.first().float()[..., None]))
        asked["last"] = Band(view.once(("near", self.near), lambda: torch.ones(self.near, device=device)), by="rows")
        return asked

    def _slots(self, view: AttentionView) -> Tensor:
        """Which slots hold the first token, and which the newest, as :class:`OnSlots` takes them."""
        assert view.slots is not None
        first = view.before.int().argmax(1)[:, None, None, None]
        own = view.query_positions[None, None, :, None]
        places = view.slots[:, :, None]
        near = (places > own - self.near) & (places <= own)
        return torch.stack([(places == first).expand_as(near), near], -1)

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        logit, column = found["peak"]
        rows = view.valid[:, None]
        if view.slots is not None:
            first, last = found["slots"].unbind(-1)
        else:
            first, last = found["first"][..., 0], found["last"][0]
        mine = {"entropy": found["entropy"], "first": first, "last": last}
        some = _steps(view)
        if not view.decoded:
            read = view.once("prompt", lambda: view.valid & ~view.rows("response") if view.roles.spans else view.valid)
            for name, x in mine.items():
                view.add_mean(f"prompt {name}", x.float(), read[:, None])
        place = self._places(view, column[..., some])
        values = [*(x[..., some].float() for x in (mine["entropy"], logit, first, last)), place.float()]
        steps = view.memory.setdefault("steps", Steps(self.keep))
        steps.add(torch.stack(values, -1).transpose(1, 2), view.fresh)  # [B, steps, H, 5]
        greatest = logit.float().masked_fill(~rows, -torch.inf).amax(-1)
        kept: list[Tensor] = view.memory.setdefault("greatest", [])
        if view.fresh or not kept:
            kept.append(greatest)
        else:
            kept[-1] = torch.maximum(kept[-1], greatest)

    @staticmethod
    def _places(view: AttentionView, column: Tensor) -> Tensor:
        """Places without padding, ``[B, H, t]``, of the keys in these columns; -1 for none."""
        if view.slots is not None:
            place = repeat_kv(view.slots, column.shape[1]).gather(2, column.clamp(min=0)).masked_fill(column < 0, -1)
        else:
            place = torch.where(column < 0, -1, column + (view.end - view.call.k.shape[2]))
        padding = view.once("padding", lambda: (~view.before).long().cumsum(1))  # up to each place
        before = padding[:, None].expand(-1, place.shape[1], -1).gather(2, place.clamp(min=0))
        return torch.where(place < 0, -1, place - before)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        places = [site for site, _ in sites]
        steps = [memory["steps"].rows() for _, memory in sites]  # [L][N] of [steps, H, 5]
        made = LensResult()
        for i, (name, title) in enumerate(MEASURES.items()):
            share = name in ("first", "last")
            if name == "logit":
                rows = [torch.cat(memory["greatest"]).double().cpu().numpy() for _, memory in sites]
                made.tables[name] = table_of("greatest logit of all tokens", places, rows)
            elif name != "top":
                rows = [np.stack([row[..., i].mean(0) for row in layer]) for layer in steps]
                made.tables[name] = table_of(f"{title}, mean over the steps", places, rows, share=share)
                if all(f"prompt {name}" in memory for _, memory in sites):
                    of_prompt = f"{title}, mean over the prompt"
                    made.tables[f"prompt {name}"] = table(of_prompt, sites, f"prompt {name}", share=share)
            made.steps[name] = _first_prompt([layer[0][..., i] for layer in steps])
        made.records["places that most heads attend to"] = _places(made.steps["top"])
        forgotten = max(max(memory["steps"].forgotten) for _, memory in sites)
        made.notes = _notes(made.tables, forgotten)
        return made


def _steps(view: AttentionView) -> slice:
    """Which queries choose a token: all that came alone; of a text with its response those before each token of that.

    Of any other text the last.
    """
    spans = view.roles.spans.get("response", ())
    if not view.decoded and len(spans) == 1 and len(spans[0]) == 1:
        start, stop = spans[0][0]
        if view.start < start < stop <= view.end:
            return slice(start - 1 - view.start, stop - 1 - view.start)
    return slice(None if view.decoded else -1, None)


def _first_prompt(rows: Sequence[Any]) -> Any:
    """``[L, H, steps]`` of values ``[steps, H]`` of each layer, NaN where a layer has fewer heads."""
    size = len(rows), max(row.shape[1] for row in rows), max(len(row) for row in rows)
    made = np.full(size, np.nan)
    for n, row in enumerate(rows):
        made[n, : row.shape[1], : len(row)] = row.T.round(6)
    return made


def _places(top: Any) -> list[dict[str, Any]]:
    """Which places ``top [L, H, steps]`` names most often."""
    known = top[top >= 0].astype(int)
    counts = np.bincount(known) if known.size else np.zeros(0, int)
    most = sorted(np.flatnonzero(counts), key=lambda place: -counts[place])[:_PLACES]
    return [{"prompt": 0, "column": int(p), "share of heads and steps": float(counts[p] / known.size)} for p in most]


def _notes(tables: dict[str, HeadTable], forgotten: int) -> list[str]:
    greatest = tables["logit"]
    head, top = greatest.top(1)[0], float(np.nanmax(greatest.mean))
    notes = [f"The greatest logit is {top:.1f}, of head {greatest.layers[head[0]]}.{head[1]}."]
    if forgotten:
        notes.append(f"The first {forgotten} steps are no longer held: keep more of them by keep=.")
    return notes
