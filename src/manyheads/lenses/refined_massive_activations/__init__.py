# SPDX-License-Identifier: Apache-2.0
"""Massive activations: a few entries of the residual stream a thousand times as large as the rest.

Owen et al., "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329. An entry ``h[t, j]`` of a block's
output ``h [B, T, D]`` (before the final norm, which hides them) is massive iff

    |h[t, j]| > threshold   and   |h[t, j]| >= ratio * median |h|,

the median over all entries of that block for that prompt. A block has massive activations iff both hold for its largest
magnitude and its median, each averaged over the prompts. They act as a bias that attention sinks feed on, overflow
float16, and make activations hard to quantise. Whether a model needs them is seen by taking them away, in the first
affected block, wherever they are found in the text at hand:

    with manyheads.watch(model, "refined_massive_activations") as seen:
        model(**inputs)
    found = seen.compute()  # tables, spikes, the first affected layer
    with manyheads.use(model, RefinedMassiveActivations(intervene="mean", means=means(found), layers=(2,))):
        model(**inputs)

The paper finds that zeroing destroys some models (Llama, Mistral) and hardly touches others (GPT-2, OPT), and that the
means do as well as the values themselves everywhere. Its mitigations for pretraining are beside it: a key and a value
learned for each head (:class:`KVBias`), target variance rescaling (:class:`TargetVariance`), and norms replaced by tanh
(:func:`with_dyt`).

Chosen where the paper is silent: means are kept for each block, channel, and starting or later tokens, over what was
detected in calibration, and a detected entry without one stays as it is; padding neither counts nor is changed; tokens
decoded with a cache are judged by the median of their prompt so far. ``first / others`` is the norm of the first token
over the mean norm of the others (paper 49's residual peak), for models too small for the thresholds. Spikes and means
are of the ``keep`` largest entries of each prompt and block; an intervention sees all.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...call import Site
from ...errors import UserError
from ...lens import Lens, LensResult, Memory, PerToken, table_of
from ...strategy import BlockParts
from .dyt import with_dyt
from .extremes import Extremes, Means, joined, massive, means, most_common, name_tokens, spikes
from .kv_bias import KVBias
from .tvr import TargetVariance
from .writers import writer_of

__all__ = [
    "KVBias", "RefinedMassiveActivations", "TargetVariance", "massive", "means", "name_tokens", "with_dyt",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RefinedMassiveActivations(Lens, BlockParts):
    """Finds massive activations; replaces them in the blocks named, the first affected one, if asked to."""

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    threshold: float = field(default=100.0, metadata={"help": "magnitude above which an entry is massive"})
    ratio: float = field(default=1000.0, metadata={"help": "multiple of the median magnitude that it must reach"})
    keep: int = field(default=64, metadata={"help": "largest entries kept of each prompt and block"})
    intervene: Literal["none", "zero", "mean"] = field(
        default="none", metadata={"help": "what massive entries become: none leaves them, zero, or their mean"}
    )
    means: str | Means = field(default="", compare=False, metadata={"help": "JSON file of means, for intervene=mean"})

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.keep < 1:
            raise UserError(f"keep={self.keep}: at least 1 entry must be kept")
        if self.edits_model and not self.layers:
            raise UserError(f"intervene={self.intervene} needs layers=, the first affected one: watch the model first")
        if self.intervene == "mean" and not self.means:
            raise UserError("intervene=mean needs means=, a JSON file made from the results on calibration texts")

    @property
    def edits_model(self) -> bool:
        return self.intervene != "none"

    @property
    def reads_parts(self) -> bool:
        return not self.edits_model

    @torch.no_grad()
    def parts(self, site: Site, before: Tensor, parts: dict[str, Tensor], hidden: Tensor, memory: Memory) -> None:
        """Keep which module wrote the largest entry of each prompt."""
        shared = memory["shared"]
        kept: list[list[tuple[float, str | None]]] = memory.setdefault("writers", [])
        if shared["fresh"] or not kept:
            kept.append([(0.0, None)] * len(hidden))
        valid = shared["valid"].to(hidden.device)[:, shared["start"] :]
        size, at = hidden.abs().masked_fill(~valid[..., None], 0).flatten(1).max(1)
        for row, (value, place) in enumerate(zip(size.tolist(), at.tolist(), strict=True)):
            if value > kept[-1][row][0]:
                token, channel = divmod(place, hidden.shape[2])
                given = {name: part[row, token] for name, part in parts.items()}
                kept[-1][row] = value, writer_of(before[row, token], hidden[row, token], given, channel)

    def residual(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        shared, seen = memory["shared"], hidden.detach()
        history, start, fresh = shared["valid"].to(hidden.device), shared["start"], shared["fresh"]
        valid, positions = history[:, start:], (history.long().cumsum(1) - 1)[:, start:]
        prompts: list[Extremes] = memory.setdefault("prompts", [])
        if fresh or not prompts:
            if prompts:
                prompts[-1].close()
            prompts.append(Extremes(self.keep))
        prompts[-1].add(seen, valid, torch.arange(start, history.shape[1], device=hidden.device), positions)
        exact = torch.promote_types(seen.dtype, torch.float32)
        norm = torch.linalg.vector_norm(seen, dim=-1, dtype=exact).masked_fill(~valid, torch.nan)
        memory.setdefault("norm", PerToken()).add(norm, fresh)
        if not self.edits_model:
            return hidden
        hits = massive(seen, valid, prompts[-1].median(), self.threshold, self.ratio)
        by = hidden.new_zeros(1)
        if self.intervene == "mean":
            start_mean, other_mean = self._means(site, hidden, memory)
            by = torch.where((positions == 0)[..., None], start_mean, other_mean)
        replaced = hits & by.isfinite()
        for name, which in (("detected", hits), ("replaced", replaced)):
            memory[name] = memory.get(name, 0) + int(which.sum())
        return torch.where(replaced, by.to(hidden.dtype), hidden) if replaced.any() else hidden

    def _means(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        """Values for starting and other tokens, float32 ``[2, D]``, NaN where there is none."""
        if "means" not in memory:
            given = self.means
            if isinstance(given, str):
                try:
                    given = json.loads(Path(given).read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    advice = "write json.dump(means(result), file)"
                    raise UserError(f"means={given} cannot be read ({error}); {advice}") from error
            made = torch.full((2, hidden.shape[2]), torch.nan)
            for row, kind in enumerate(("start", "other")):
                for channel, value in given.get(site.name, {}).get(kind, {}).items():
                    made[row, int(channel)] = value
            memory["means"] = made.to(hidden.device)
        found: Tensor = memory["means"]
        return found

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        sites = [(site, memory) for site, memory in sites if memory.get("prompts")]
        if not sites:
            raise UserError("no block was seen: the model did not run, or its attention stands in no list of blocks")
        made, blocks, scores = LensResult(), [site for site, _ in sites], [_scores(memory) for _, memory in sites]
        for name in scores[0]:
            rows = [each[name] for each in scores]
            made.tables[name] = table_of(name, blocks, rows, threshold=self.threshold, ratio=self.ratio)
        made.records["spikes"] = [
            spike
            for layer, (site, memory) in zip(made.tables["max"].layers, sites, strict=True)
            for spike in spikes(site.name, layer, memory["prompts"], self.threshold, self.ratio)
        ]
        largest, middle = (made.tables[name].mean[:, 0] for name in ("max", "median"))
        affected = np.flatnonzero((largest > self.threshold) & (largest >= self.ratio * middle))
        at = int(affected[0]) if len(affected) else int(np.nan_to_num(largest / middle, nan=-1.0).argmax())
        site, memory = sites[at]
        made.series[f"norm after {site.name}"] = memory["norm"].rows()
        writers = Counter(name for part in memory.get("writers", ()) for _, name in part if name).most_common(1)
        made.notes = self._notes(made, len(affected), at, f" (written by {writers[0][0]})" if writers else "")
        if self.edits_model:
            made.notes += [
                f"{site.name}: {memory['replaced']} of {memory['detected']} massive entries were set to "
                f"{self.intervene}."
                for site, memory in sites
                if "detected" in memory
            ]
        return made

    def _notes(self, made: LensResult, affected: int, at: int, writer: str) -> list[str]:
        """What a reader should know of the block ``at`` and of all, from the figures."""
        tables, layers = made.tables, made.tables["max"].layers
        largest, times, first = (tables[name].mean[at, 0] for name in ("max", "max / median", "first / others"))
        where = f"layer {layers[at]}{writer}"
        notes = [
            f"Massive activations in {affected} of {len(layers)} layers, first in {where}: up to {largest:.4g}, "
            f"{times:,.0f} times the median."
            if affected
            else f"No layer has massive activations (above {self.threshold:g} and {self.ratio:g} times the median); "
            f"the greatest ratio is {times:,.0f} times the median, {largest:.4g} in {where}."
        ]
        if math.isfinite(first):
            notes.append(f"There the first token's norm is {first:.3g} times that of the others.")
        if found := made.records["spikes"]:
            prompts = len({spike["prompt"] for spike in found})
            notes.append(
                f"{len(found)} massive entries in {prompts} prompts: positions {most_common(found, 'position')}; "
                f"channels {most_common(found, 'channel')}."
            )
        if not np.isfinite(tables["max"].values[:, :, 0]).all():
            notes.append("Some entries are not finite: run the model in bfloat16 or float32.")
        return notes


def _scores(memory: Memory) -> dict[str, Any]:
    """Scores of one block by the name of their table, ``[N]``, a value for each prompt."""
    median, values, *_ = joined(memory["prompts"])
    largest = values[:, 0].abs().masked_fill(median.isnan(), torch.nan)  # a prompt without tokens
    peaks = []
    for norms in memory["norm"].rows():
        known = norms[np.isfinite(norms)]
        others = known[1:].mean() if len(known) > 1 else 0.0
        peaks.append(known[0] / others if others > 0 else math.nan)
    scores = {"max": largest, "median": median, "max / median": largest / median}
    return {name: x.double().cpu().numpy() for name, x in scores.items()} | {"first / others": np.array(peaks)}
