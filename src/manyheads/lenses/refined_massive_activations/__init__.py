# SPDX-License-Identifier: Apache-2.0
"""Massive activations: a few entries of the residual stream a thousand times as large as the rest.

Owen et al., "A Refined Analysis of Massive Activations in LLMs", arXiv 2503.22329. An entry ``h[t, j]`` of a block's
output ``h [B, T, D]`` (before the final norm, which hides them) is massive iff

    |h[t, j]| > threshold   and   |h[t, j]| >= ratio * median |h|,

the median over all entries of that block for that prompt. A block has massive activations iff both hold for its largest
magnitude and its median, each averaged over the prompts. They act as a bias that attention sinks feed on, overflow
float16, and make activations hard to quantise. Whether a model needs them is seen by taking them away, in the first
block that has them, wherever they are found in the text at hand:

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
over the mean norm of the others (paper 49 calls it the residual peak), for models too small for the thresholds.
Of a prompt's entries the ``keep`` largest of each block are at hand for spikes and means, an intervention sees all.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...lens import Lens, LensResult, Memory, PerToken, RunningMean, table
from ...strategy import Residual
from .dyt import with_dyt
from .extremes import Extremes, medians
from .kv_bias import KVBias
from .tvr import TargetVariance

if TYPE_CHECKING:
    from ...call import Site

__all__ = [
    "KVBias", "RefinedMassiveActivations", "TargetVariance", "massive", "means", "name_tokens", "with_dyt",
]  # fmt: skip

Means = dict[str, dict[str, dict[str, float]]]  # site -> start or other -> channel -> value


def massive(hidden: Tensor, valid: Tensor, median: Tensor, threshold: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """Which entries are massive: ``hidden [B, T, D]``, ``valid [B, T]``, ``median [B]`` -> bool ``[B, T, D]``."""
    size = hidden.abs()
    return (size > threshold) & (size >= ratio * median[:, None, None]) & valid[..., None]


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


@dataclass(frozen=True, kw_only=True)
class RefinedMassiveActivations(Lens, Residual):
    """Finds massive activations; replaces them in the blocks named, if asked to.

    Attributes:
        threshold: magnitude that an entry must exceed.
        ratio: multiple of the median magnitude that it must reach.
        keep: largest entries kept of each prompt and block.
        intervene: what massive entries become; anything but ``none`` needs ``layers``, the first affected one.
        means: for ``intervene=mean``: a file, or the value, made from :func:`means`.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    threshold: float = field(default=100.0, metadata={"help": "magnitude above which an entry is massive"})
    ratio: float = field(default=1000.0, metadata={"help": "multiple of the median magnitude that it must reach"})
    keep: int = field(default=64, metadata={"help": "largest entries kept of each prompt and block"})
    intervene: Literal["none", "zero", "mean"] = field(
        default="none", metadata={"help": "what massive entries become: none leaves them, zero, or their mean"}
    )
    means: str | Means = field(
        default="", compare=False, metadata={"help": "with intervene=mean: JSON file with the means"}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.keep < 1:
            raise UserError(f"keep={self.keep}: at least 1 entry must be kept")
        if self.edits_model and not self.layers:
            raise UserError(f"intervene={self.intervene} needs layers=, the first affected one: watch the model first")
        if self.intervene == "mean" and not self.means:
            raise UserError("intervene=mean needs means=, a JSON file made from findings of calibration texts")

    @property
    def edits_model(self) -> bool:
        return self.intervene != "none"

    def residual(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        history, length = memory["shared"]["valid"].to(hidden.device), hidden.shape[1]
        before = history.shape[1] - length
        valid, positions = history[:, before:], (history.long().cumsum(1) - 1)[:, before:]
        prompts: list[Extremes] = memory.setdefault("prompts", [])
        seen = hidden.detach()
        if before == 0 or not prompts:
            if prompts:
                prompts[-1].close()
            prompts.append(Extremes(self.keep))
        prompts[-1].add(seen, valid, torch.arange(before, before + length, device=hidden.device), positions)
        norm = torch.linalg.vector_norm(seen, dim=-1, dtype=torch.float32).masked_fill(~valid, torch.nan)
        memory.setdefault("norm", PerToken()).add(norm, before == 0)
        if not self.edits_model:
            return hidden
        median = medians(seen, valid) if before == 0 else prompts[-1].median()
        hits = massive(seen, valid, median, self.threshold, self.ratio)
        memory["detected"] = memory.get("detected", 0) + int(hits.sum())
        if self.intervene == "zero":
            return hidden.masked_fill(hits, 0.0) if hits.any() else hidden
        start, other = self._means(site, hidden, memory)
        by = torch.where((positions == 0)[..., None], start, other)
        hits &= by.isfinite()
        memory["replaced"] = memory.get("replaced", 0) + int(hits.sum())
        return torch.where(hits, by.to(hidden.dtype), hidden) if hits.any() else hidden

    def _means(self, site: Site, hidden: Tensor, memory: Memory) -> Tensor:
        """Values for starting and other tokens, float32 ``[2, D]``, NaN where there is none."""
        if "means" not in memory:
            made = torch.full((2, hidden.shape[2]), torch.nan)
            for row, kind in enumerate(("start", "other")):
                for channel, value in _read(self.means).get(site.name, {}).get(kind, {}).items():
                    made[row, int(channel)] = value
            memory["means"] = made.to(hidden.device)
        found: Tensor = memory["means"]
        return found

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        seen = [(site, memory) for site, memory in sites if memory.get("prompts")]
        if not seen:
            raise UserError("no block was seen: the model did not run, or its attention stands in no list of blocks")
        made, kept = LensResult(), [(site, _figures(memory)) for site, memory in seen]
        about = {"threshold": self.threshold, "ratio": self.ratio}
        for name in ("max", "median", "max / median", "first / others"):
            made.tables[name] = table(name, kept, name, **about)
        made.records["spikes"] = [spike for site, memory in seen for spike in self._spikes(site, memory)]
        largest, middle = (made.tables[name].mean[:, 0] for name in ("max", "median"))
        affected = np.flatnonzero((largest > self.threshold) & (largest >= self.ratio * middle))
        most = int(np.nanargmax(np.append(largest / middle, 0.0)[:-1])) if np.isfinite(largest / middle).any() else 0
        at = int(affected[0]) if len(affected) else most
        made.series[f"norm after {seen[at][0].name}"] = seen[at][1]["norm"].rows()
        made.notes = self._notes(made, affected, at)
        for site, memory in seen:
            if self.edits_model:
                count, done = memory.get("detected", 0), memory.get("replaced", memory.get("detected", 0))
                made.notes.append(f"{site.name}: {done} of {count} massive entries were set to {self.intervene}.")
        return made

    def _spikes(self, site: Site, memory: Memory) -> list[dict[str, Any]]:
        """The massive ones among the entries kept, prompt by prompt, greatest first."""
        made, prompt = [], 0
        layer = site.index if site.layer is None else site.layer
        for part in memory["prompts"]:
            median = part.median()
            size = part.values.abs()
            hits = (size > self.threshold) & (size >= self.ratio * median[:, None])
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

    def _notes(self, made: LensResult, affected: Any, at: int) -> list[str]:
        """What a reader should know, from the figures."""
        tables, layers = made.tables, made.tables["max"].layers
        largest, times, first = (tables[name].mean[at, 0] for name in ("max", "max / median", "first / others"))
        where = f"layer {layers[at]} ({tables['max'].sites[at]})"
        if len(affected):
            notes = [
                f"Massive activations in {len(affected)} of {len(layers)} layers, first in {where}: up to "
                f"{largest:.4g}, {times:,.0f} times the median."
            ]
        else:
            notes = [
                f"No layer has massive activations (above {self.threshold:g} and {self.ratio:g} times the median); "
                f"the greatest ratio is {times:,.0f} times the median, {largest:.4g} in {where}."
            ]
        if math.isfinite(first):
            notes.append(f"There the first token's norm is {first:.3g} times that of the others.")
        spikes = made.records["spikes"]
        if spikes:
            prompts = len({spike["prompt"] for spike in spikes})
            notes.append(
                f"{len(spikes)} massive entries in {prompts} prompts: positions {_most(spikes, 'position')}; channels "
                f"{_most(spikes, 'channel')}."
            )
        if not np.isfinite(tables["max"].values[:, :, 0]).all():
            notes.append("Some entries are not finite: run the model in bfloat16 or float32.")
        return notes


def _read(given: str | Means) -> Means:
    if not isinstance(given, str):
        return given
    try:
        made: Means = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"means={given} cannot be read ({error}); write json.dump(means(findings), file)") from error
    return made


def _figures(memory: Memory) -> Memory:
    """Tallies of one block, by the name of their table, a value for each prompt."""
    largest = torch.cat([part.values[:, 0].abs() for part in memory["prompts"]])
    median = torch.cat([part.median() for part in memory["prompts"]])
    largest = largest.masked_fill(median.isnan(), torch.nan)  # a prompt without tokens
    peaks = []
    for norms in memory["norm"].rows():
        known = norms[np.isfinite(norms)]
        peaks.append(known[0] / known[1:].mean() if len(known) > 1 and known[1:].mean() > 0 else math.nan)
    made = {"max": largest, "median": median, "max / median": largest / median, "first / others": torch.tensor(peaks)}
    tallies = {name: RunningMean() for name in made}
    for name, values in made.items():
        tallies[name].add(values, torch.ones((), device=values.device), fresh=True)
    return tallies


def _most(spikes: Sequence[dict[str, Any]], key: str, count: int = 5) -> str:
    """``0 (12), 5 (3) and 4 more``: the commonest values with how often they occur."""
    seen = Counter(spike[key] for spike in spikes).most_common()
    more = f" and {len(seen) - count} more" if len(seen) > count else ""
    return ", ".join(f"{value} ({times})" for value, times in seen[:count]) + more
