# SPDX-License-Identifier: Apache-2.0
"""The rhythm of a trace: where a model attends back to plan, and which tokens later ones keep attending to.

"Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy Optimization" (no arXiv
id is known to us). With ``A`` the weights, ``T`` tokens and ``R`` the tokens of the role ``response``:

- head span ``d(l, h) = 1/|R| sum over t in R, s of A[t, s] (t - s)``. The 30 % of heads with the least are the local
  set, the 30 % with the greatest the global set; ``A_loc`` and ``A_glob`` are the means over them.
- ``WAAD_t = sum over s of A_loc[t, s] min(t - s, W)``: high where local heads look back, at the start of a phrase.
  It is ``W`` times the row's sum less a band of W diagonals.
- ``FAI_s = mean over t of A_glob[t, s]``, t in R with ``s + 10 <= t <= s + 50``: high for anchors. NaN where no such t
  exists (the last ten tokens; the paper is silent), and then out of every quantile.
- credit ``gamma [T]``: what RL multiplies the advantages of a response's tokens by, see :func:`credit`.

As in GRPO, after the rollout and before the update:

    roles = TokenSpans({"response": spans})
    with torch.no_grad(), manyheads.watch(model, "reasoning_rhythm:middle=5", roles=roles) as seen:
        model(**batch)
    gamma = torch.stack([torch.from_numpy(row) for row in seen.compute().series["gamma"]])  # [B, T]
    advantages = weigh(advantages, gamma)

``python -m manyheads.recipes.reasoning_rhythm`` trains so.

What a head puts on the first token counts as a long span, so sinks fill the global set; the span without it stands
beside, and ``sinks=false`` chooses by that one (what is left of each row, weighted by how much is left). Choices where
the paper is silent: the sets are those of the mean span over all prompts looked at (``per_prompt`` for each its own);
shares are rounded to a whole number of heads or tokens; ``alpha``, both thresholds and ``back``. With learned sinks
rows sum to less than 1, and what went to the sink counts as distance 0.

Spans, WAAD and FAI are kept per head until the sets are known: two numbers a token and head, ``middle=5`` for less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...call import Site
from ...calls.statistics import Band, Distance, Statistic, WeightedSum
from ...errors import UserError
from ...heads import Head, HeadTable
from ...lens import AttentionView, Lens, LensResult, Memory, PerToken, RunningMean, table
from .credit_assignment import By, credit, peaks, weigh

__all__ = ["ReasoningRhythm", "credit", "middle_layers", "peaks", "weigh"]


def middle_layers(peers: Sequence[int], count: int) -> tuple[int, ...]:
    """``count`` evenly spaced ones of the layers ``peers`` from a third to two thirds of the depth, as RL uses."""
    last = len(peers) - 1
    places = np.linspace(len(peers) // 3, min(last, 2 * len(peers) // 3), count).round().astype(int)
    return tuple(peers[i] for i in sorted(set(places.tolist())))


def _back_to_first(view: AttentionView) -> Tensor:
    """``[B, 1, T]``, by how many columns the first token of its row stands before each query."""
    length, size = view.call.q.shape[2], view.keys.shape[1]
    column = torch.arange(size - length, size, device=view.call.q.device)
    return (column - view.first().int().argmax(1)[:, None])[:, None]


@dataclass(frozen=True, kw_only=True)
class ReasoningRhythm(Lens):
    """WAAD and FAI of each token, the span of each head, and the credit of the tokens."""

    kinds = frozenset({"self"})

    window: int = field(default=10, metadata={"help": "W: distances count up to here in WAAD"})
    nearest: int = field(default=10, metadata={"help": "least distance from which a token is looked at in FAI"})
    farthest: int = field(default=50, metadata={"help": "greatest distance from which a token is looked at in FAI"})
    head_share: float = field(default=0.3, metadata={"help": "part of the heads in the local and in the global set"})
    middle: int = field(default=0, metadata={"help": "only so many layers of the middle third (RL: 5); 0 for all"})
    sinks: bool = field(default=True, metadata={"help": "whether weight on the first token counts as span"})
    per_prompt: bool = field(default=False, metadata={"help": "sets of heads from each prompt's spans, not their mean"})
    by: By = field(default="coupled", metadata={"help": "which credit: local, global or coupled"})
    share: float = field(default=0.4, metadata={"help": "part of the response's tokens that get credit"})
    amplify: float = field(default=1.5, metadata={"help": "gamma of a token with full credit"})
    back: int = field(default=3, metadata={"help": "how far before an anchor the token that introduces it may stand"})
    alpha: float = field(default=0.5, metadata={"help": "part of a dominated anchor's credit that goes to that token"})
    waad_quantile: float = field(default=0.4, metadata={"help": "WAAD up to which an anchor may be dominated"})
    change_quantile: float = field(default=0.6, metadata={"help": "change of WAAD from which a token may dominate"})

    def __post_init__(self) -> None:
        """Refuse bands and shares that name nothing."""
        if self.window < 1 or not 0 <= self.nearest <= self.farthest:
            raise UserError("reasoning_rhythm needs window >= 1 and 0 <= nearest <= farthest")
        if not 0 < self.head_share <= 0.5 or not 0 <= self.share <= 1:
            raise UserError("reasoning_rhythm needs head_share above 0, at most 0.5, and share from 0 to 1")

    def selects(self, site: Site) -> bool:
        return (
            super().selects(site)
            and site.causal
            and (self.middle < 1 or site.layer in middle_layers(site.peers, self.middle))
        )

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        near, far, masks = view.once(("rhythm", self.window, self.nearest, self.farthest), lambda: self._features(view))
        return {
            "mass": WeightedSum(masks), "distance": Distance(), "near": Band(near, by="rows"),
            "far": Band(far, view.rows("response"), by="columns"),
        }  # fmt: skip

    def _features(self, view: AttentionView) -> tuple[Tensor, Tensor, Tensor]:
        """Profiles of both bands, and indicators of all keys and of the first."""
        device = view.call.q.device
        near = self.window - torch.arange(self.window, device=device, dtype=torch.float32)
        far = (torch.arange(self.farthest + 1, device=device) >= self.nearest).float()
        return near, far, torch.stack([torch.ones_like(view.keys), view.first()], -1).float()

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        memory, fresh = view.memory, view.fresh
        (mass, on_first), distance = found["mass"].unbind(-1), found["distance"]
        length, size = view.call.q.shape[2], view.keys.shape[1]
        of_first = on_first * view.once("rhythm, back to the first", lambda: _back_to_first(view))
        rows = view.rows("response")[:, None]
        view.add_mean("span", distance, rows)
        view.add_mean("first", on_first, rows)
        others, _ = view.memo.counted(rows)
        spans, weights = (x.masked_fill(others, 0).sum(-1) for x in (distance - of_first, mass - on_first))
        memory.setdefault("beyond", RunningMean()).add(spans, weights, fresh)
        waad = (self.window * mass - found["near"][0]).masked_fill(view.memo.counted(view.valid)[0][:, None], torch.nan)
        memory.setdefault("waad", PerToken()).add(waad.transpose(1, 2), fresh)
        tokens = view.once("rhythm, tokens", lambda: torch.stack([view.valid, view.rows("response")], -1).float())
        memory.setdefault("tokens", PerToken()).add(tokens, fresh)
        parts, columns = memory.setdefault("received", []), found["far"][1]
        if fresh or not parts:
            parts.append(columns[..., -length:])
        else:  # keys that a sliding window has left behind keep what they had
            held = pad(parts[-1], (0, length))
            count = min(size, held.shape[-1])
            held[..., -count:] += columns[..., -count:]
            parts[-1] = held

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        span = table("head span, tokens", sites, "span", sinks=True)
        beyond = table("head span without the first token, tokens", sites, "beyond", sinks=False)
        first = table("weight on the first token", sites, "first", share=True)
        made = LensResult(tables={"span": span, "span_without_first": beyond, "first": first})
        chosen = span if self.sinks else beyond
        waad = [memory["waad"].rows() for _, memory in sites]
        received = [[row for part in memory["received"] for row in part.double().cpu().numpy()] for _, memory in sites]
        series = made.series = {"waad": [], "fai": [], "gamma": []}
        for n, tokens in enumerate(sites[0][1]["tokens"].rows()):
            valid, response = tokens[:, 0] > 0, tokens[:, 1] > 0
            local, world = self._sets(chosen.values[n] if self.per_prompt else chosen.mean)
            w = np.mean([waad[row][n][:, head] for row, head in local], 0)
            before = np.concatenate([[0], response.cumsum()])
            place = np.arange(len(response))
            stop = np.minimum(len(response), place + self.farthest + 1)
            count = before[stop] - before[np.minimum(stop, place + self.nearest)]
            f = np.mean([received[row][n][head] for row, head in world], 0)
            f = np.where(valid & (count > 0), f / np.maximum(count, 1), np.nan)
            gamma = credit(
                torch.from_numpy(w)[None], torch.from_numpy(f)[None], torch.from_numpy(response)[None], self.by,
                amplify=self.amplify, share=self.share, back=self.back, alpha=self.alpha,
                waad_quantile=self.waad_quantile, change_quantile=self.change_quantile,
            )[0].numpy()  # fmt: skip
            for name, row in (("waad", w), ("fai", f), ("gamma", np.where(response, gamma, np.nan))):
                series[name].append(row)
        made.notes = self._notes(made)
        return made

    def _sets(self, scores: Any) -> tuple[list[Head], list[Head]]:
        """The local and the global heads of scores ``[L, H]``."""
        spans = HeadTable("span", ("",) * len(scores), scores)
        count = max(1, round(self.head_share * int(np.isfinite(scores).sum())))
        return spans.top(count, largest=False), spans.top(count)

    def _notes(self, found: LensResult) -> list[str]:
        span, beyond = found.tables["span"], found.tables["span_without_first"]
        if not np.isfinite(span.mean).any():
            return ["No token has the role response, so no head has a span."]
        local, world = self._sets((span if self.sinks else beyond).mean)
        far, near = (np.mean([span.mean[head] for head in heads]) for heads in (world, local))
        weight = np.mean([found.tables["first"].mean[head] for head in world])
        kept = len(set(self._sets(span.mean)[1]) & set(self._sets(beyond.mean)[1]))
        notes = [
            f"The {len(local)} local heads look back {near:.1f} tokens on average, the {len(world)} global ones "
            f"{far:.1f}.",
            f"The global heads give {weight:.0%} of their weight to the first token; chosen without it, "
            f"{kept} of {len(world)} would be the same.",
        ]
        if not any(np.isfinite(row).any() for row in found.series["fai"]):
            notes.append(f"No response reaches {self.nearest} tokens past any token: there is no FAI.")
        return notes
