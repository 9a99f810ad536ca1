# SPDX-License-Identifier: Apache-2.0
"""What the figures of a model mean: each check with its figure, its threshold and a sentence; computed, not typed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..formatting import number
from .attention_breakdown import FIRST, PREVIOUS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..heads import HeadTable
    from .measures import Measures

__all__ = ["HealthCheck", "evaluate"]

Level = Literal["watch", "note", "fine", "unknown"]
_ORDER = ("watch", "note", "unknown", "fine")
SINK, EVEN, FAINT, NOTHING, DUPLICATE, LEAK = 0.5, 0.95, 0.02, 1e-3, 0.05, 1e-3
PREVIOUS_HEAD, MASSIVE, RATIO, CHANNEL, FLOAT16 = 0.5, 100.0, 1000.0, 5.0, 65504.0
WORSE = 0.02  # nats


@dataclass(frozen=True)
class HealthCheck:
    """One thing that was looked for.

    Attributes:
        key: its name in JSON.
        title: in words.
        level: ``watch`` for what can hurt, ``note`` for what one should know, ``fine``, or ``unknown``.
        figure: what was measured.
        threshold: from which on it is a check.
        message: what the figure says.
        advice: what it means for caches, quantisation, long context; empty where nothing.
        values: the numbers.
    """

    key: str
    title: str
    level: Level
    figure: str
    threshold: str
    message: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def evaluate(m: Measures) -> list[HealthCheck]:
    """All checks, the most pressing first."""
    checks = [
        _numbers(m), _padding(m), _sinks(m), _activations(m), _float16(m), _channels(m), _idle(m), _duplicates(m),
        _contexts(m),
    ]  # fmt: skip
    return sorted(checks, key=lambda check: _ORDER.index(check.level))


def _count(part: int, whole: int, what: str = "heads") -> str:
    return f"{part} of {whole} {what} ({part / whole:.0%})" if whole else f"no {what}"


def _names(made: HeadTable, heads: Sequence[tuple[int, int]], most: int = 6) -> str:
    shown = ", ".join(made.names(list(heads)[:most]))
    return shown + (f" and {len(heads) - most} more" if len(heads) > most else "")


def _above(made: HeadTable, least: float) -> list[tuple[int, int]]:
    return [head for head in made.top(made.mean.size) if made.mean[head] > least]


def _known(made: HeadTable) -> int:
    return int(np.isfinite(made.mean).sum())


def _sinks(m: Measures) -> HealthCheck:
    """Heads that put their attention on the first token."""
    sink = m.found["active_dormant"].tables["sink"]
    heads, total = _above(sink, SINK), _known(sink)
    share = len(heads) / max(1, total)
    by_prompt = (sink.values > SINK).sum((1, 2)) / max(1, total)
    top = sink.top(1)
    greatest = float(sink.mean[top[0]]) if top else math.nan
    level: Level = "watch" if share >= 0.2 else "note" if greatest >= SINK / 2 else "fine"
    spread = f", {by_prompt.min():.0%} to {by_prompt.max():.0%} by prompt" if len(by_prompt) > 1 else ""
    mean = float(np.nanmean(sink.mean))
    message = (
        f"On average a head gives {mean:.0%} of its attention to the first token, "
        f"{sink.names(top)[0] if top else 'none'} the most, {greatest:.0%}; more than half: {_count(len(heads), total)}"
        f"{spread}."
    )
    advice = (
        "A cache that drops old tokens has to keep the first ones, as streaming_llm does and snapkv learns from the "
        "prompt; do not quantise them coarsely, and keep them when you cut a long context."
        if level != "fine"
        else "No cache needs to keep the first token for its own sake."
    )
    return HealthCheck(
        "sinks", "attention sinks", level, f"{_count(len(heads), total)}, greatest {greatest:.2f}",
        f"more than {SINK:g} of the attention on the first token; watch from 20 % of the heads, note if one reaches "
        f"{SINK / 2:g}", message, advice,
        {"heads": list(sink.names(heads)), "share": share, "mean": mean, "greatest": greatest},
    )  # fmt: skip


def _idle(m: Measures) -> HealthCheck:
    """Heads that look everywhere, write next to nothing, or are not missed."""
    entropy, written = m.found["attention"].tables["entropy"], m.found["body"].tables["written"]
    even = _above(entropy, EVEN)
    typical = np.nanmedian(written.mean, 1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(typical > 0, written.mean / typical, 0.0)
    faint = [(int(r), int(h)) for r, h in np.argwhere(part < FAINT)]
    alone = m.alone
    tried = 0 if alone is None else _known(alone)
    spared = [] if alone is None else [h for h in alone.top(tried, largest=False) if alone.mean[h] < NOTHING]
    level: Level = "watch" if faint else "note" if even or spared else "fine"
    message = [f"{_count(len(even), _known(entropy))} look nearly evenly at all tokens" + _listed(entropy, even)]
    message.append(
        f"{_count(len(faint), _known(written))} write less than {FAINT:.0%} of their layer's median"
        + _listed(written, faint)
    )
    if alone is not None and tried:
        message.append(
            f"with one head ablated, the loss of a prompt gains less than {NOTHING:g} nats for "
            f"{_count(len(spared), tried, 'heads tried')}{_tried_in(alone)}{_listed(alone, spared)}; most for "
            f"{alone.names(alone.top(1))[0]}, {np.nanmax(alone.mean):+.3f}"
        )
    advice = []
    if even:
        advice.append("A head that looks evenly averages the text: a cache that keeps few tokens changes it most.")
    if faint or spared:
        advice.append(
            "Heads that write nothing or are not missed are the first to prune; ablate them together with "
            "manyheads.use(model, 'ablate:heads=...') before you believe it."
        )
    return HealthCheck(
        "idle", "dead or even heads", level,
        f"{len(even)} even, {len(faint)} nearly silent, {len(spared)} of {tried} not missed"
        f"{'' if alone is None else _tried_in(alone)}",
        f"entropy above {EVEN:g} of the greatest; output below {FAINT:g} of the median; loss {NOTHING:g} nats",
        "; ".join(message) + ".", " ".join(advice),
        {
            "even": list(entropy.names(even)), "silent": list(written.names(faint)),
            "not missed": [] if alone is None else list(alone.names(spared)), "tried": tried,
        },
    )  # fmt: skip


def _tried_in(alone: HeadTable) -> str:
    """The layers that the heads ablated alone are of, where they are not all."""
    layers = [str(alone.layers[row]) for row in np.flatnonzero(np.isfinite(alone.mean).any(1))]
    if not layers or len(layers) == len(alone.layers):
        return ""
    return f", of layer{'s' * (len(layers) > 1)} {', '.join(layers)} only"


def _listed(made: HeadTable, heads: Sequence[tuple[int, int]]) -> str:
    return f" (head{'s' * (len(heads) > 1)} {_names(made, heads)})" if heads else ""


def _activations(m: Measures) -> HealthCheck:
    """A few huge entries of the residual stream."""
    found = m.found["refined_massive_activations"]
    largest, middle = found.tables["max"], found.tables["median"]
    ratio = largest.mean[:, 0] / middle.mean[:, 0]
    if not np.isfinite(ratio).any():
        return HealthCheck(
            "activations", "massive activations", "unknown", "no finite activation", "", "Nothing was seen."
        )
    at = int(np.nanargmax(ratio))
    hit = (largest.mean[:, 0] > MASSIVE) & (ratio >= RATIO)
    level: Level = "watch" if hit.any() else "note" if ratio[at] >= RATIO / 10 else "fine"
    first = found.tables["first / others"].mean[:, 0]
    where = f"layer {largest.layers[at]}"
    message = (
        f"In {where} the greatest entry is {number(float(largest.mean[at, 0]))}, {ratio[at]:,.0f} times the median; "
        f"the first token's norm there is {number(float(first[at]))} times that of the others."
    )
    advice = (
        "Quantise activations by token or by channel, or keep such tokens in more bits: one scale for the whole tensor "
        "leaves the rest no resolution."
        if level != "fine"
        else "Activations can be quantised with ordinary scales."
    )
    return HealthCheck(
        "activations", "massive activations", level, f"{ratio[at]:,.0f} times the median, {where}",
        f"above {MASSIVE:g} and {RATIO:g} times the median; note from {RATIO / 10:g} times", message, advice,
        {"layers": [int(x) for x in np.asarray(largest.layers)[hit]], "ratio": float(ratio[at])},
    )  # fmt: skip


def _float16(m: Measures) -> HealthCheck:
    """Room that is left in float16."""
    largest = m.found["refined_massive_activations"].tables["max"]
    top = float(np.nanmax(largest.values)) if np.isfinite(largest.values).any() else math.nan
    part = top / FLOAT16
    level: Level = "unknown" if math.isnan(top) else "watch" if part >= 0.25 else "note" if part >= 0.05 else "fine"
    message = f"The residual stream reaches {number(top)}; float16 ends at {FLOAT16:,.0f}."
    advice = "Run it in bfloat16 or float32." if level == "watch" else ""
    if level == "note":
        advice = "float16 has room for this text; watch it on longer or other text, or use bfloat16."
    return HealthCheck(
        "float16", "overflow of float16", level, f"{part:.1%} of the range", "watch from 25 %, note from 5 %",
        message, advice, {"greatest": top},
    )  # fmt: skip


def _channels(m: Measures) -> HealthCheck:
    """Channels of queries and keys that are far larger than the others."""
    tables = m.found["massive_values"].tables
    peaks = {name: tables[f"peak {name}"] for name in "qkv"}
    heads = {name: _above(made, CHANNEL) for name, made in peaks.items()}
    tops = {name: float(np.nanmax(made.mean)) for name, made in peaks.items()}
    level: Level = "watch" if heads["k"] else "note" if heads["q"] or tops["k"] >= 0.7 * CHANNEL else "fine"
    message = "The greatest channel over the mean of its head: " + ", ".join(
        f"{name} {tops[name]:.1f} in {peaks[name].names(peaks[name].top(1))[0]}" for name in "qkv"
    )
    advice = (
        "INT4 keys need a scale for each channel, or rotary pairs scaled before: fireq does that."
        if level == "watch"
        else "Keys take INT4 with a scale for each channel and group of tokens, which is what fireq stores."
        if level == "note"
        else "Keys and values take INT4 without special care."
    )
    return HealthCheck(
        "channels", "massive channels of q and k", level,
        f"keys {tops['k']:.1f} times the mean, {_count(len(heads['k']), _known(peaks['k']), 'key heads')} above",
        f"norm of a channel above {CHANNEL:g} times the mean of its head; note from {0.7 * CHANNEL:g} in keys",
        message + ".", advice, {"greatest": tops, "heads": {n: list(peaks[n].names(h)) for n, h in heads.items()}},
    )  # fmt: skip


def _padding(m: Measures) -> HealthCheck:
    """Whether padding changes what a row gives."""
    exact = m.dtype in ("float32", "float64")
    noise = m.padding["none"]["change"]
    least = max(10 * noise, LEAK if exact else 100 * LEAK)
    leaks = {name: x for name, x in m.padding.items() if name != "none" and not x["change"] <= least}
    ordinary = [name for name in leaks if name in ("left", "right")]
    level: Level = "watch" if ordinary else "note" if leaks else "fine"
    words = {
        "right": "on the right",
        "left": "on the left",
        "left, no position ids": "on the left without position ids",
    }
    message = "A short row read beside a longer one, against the row alone: " + "; ".join(
        f"padded {words[name]}, logits change by {number(x['change'])} and {x['choices']:.0%} of the choices"
        for name, x in m.padding.items()
        if name in words
    )
    advice = ""
    if ordinary:
        advice = "Padding changes what this model says: read rows alone, or rows of equal length."
    elif leaks:
        advice = (
            "Give position ids with left padding, as generate does; with the attention mask alone the positions are "
            "those of the padding too."
        )
    worst = max((x["change"] for name, x in m.padding.items() if name != "none"), default=math.nan)
    return HealthCheck(
        "padding", "padding leaks", level, f"logits change by {number(worst)} of their spread at most",
        f"a change above {number(least)} (a batch without padding changes {number(noise)})", message + ".", advice,
        {"cases": m.padding, "leaks": sorted(leaks)},
    )  # fmt: skip


def _contexts(m: Measures) -> HealthCheck:
    """Whether the same tokens are better predicted after more text."""
    sizes, losses = m.contexts
    if len(sizes) < 2:
        why = m.refused.get("contexts", "there was nothing to read")
        return HealthCheck(
            "contexts", "long context", "unknown", "not measured", f"{WORSE:g} nats",
            f"Loss by length of the context was not measured: {why}.",
        )  # fmt: skip
    mean = losses.mean(1)
    best = int(mean.argmin())
    worse = losses[-1] - losses[best]
    inside = [i for i, size in enumerate(sizes) if size <= m.max_context]
    beyond = [size for size in sizes if size > m.max_context]
    level: Level = "fine"
    if mean[-1] - mean[best] > WORSE:
        level = "watch" if best in inside and sizes[-1] <= m.max_context else "note"
    shown = ", ".join(f"{size:,}: {value:.3f}" for size, value in zip(sizes, mean, strict=True))
    said = f"Loss of the same {len(worse)} × 128 tokens by the tokens read before: {shown}."
    if level != "fine":
        said += f" It is least at {sizes[best]:,} and {mean[-1] - mean[best]:+.3f} nats at {sizes[-1]:,}."
    said += (
        f" The config promises {m.max_context:,} tokens"
        + (f"; {beyond[-1]:,} were tried." if beyond else ", none beyond.")
        if m.max_context < 2**40
        else " The config names no greatest length."
    )
    if "beyond" in m.refused:
        said += f" Beyond it cannot read: {m.refused['beyond']}."
    advice = (
        f"Do not give it more than about {sizes[best]:,} tokens, or measure what t5_attention_alignment does beyond."
        if level != "fine"
        else "More text helps as far as was tried."
        if best == len(sizes) - 1
        else "More text does not hurt as far as was tried."
    )
    return HealthCheck(
        "contexts", "long context", level, f"{mean[-1] - mean[0]:+.3f} nats from {sizes[0]:,} to {sizes[-1]:,} tokens",
        f"the longest more than {WORSE:g} nats worse than the best", said, advice,
        {"tokens": sizes, "loss": mean.tolist(), "best": sizes[best]},
    )  # fmt: skip


def _numbers(m: Measures) -> HealthCheck:
    """NaN and infinity."""
    rows = m.found["body"].records["tokens with NaN or infinity"]
    outputs, hidden = (sum(row[name] for row in rows) for name in ("outputs", "hidden"))
    losses = sum(int((~np.isfinite(row[1:])).sum()) for row in m.losses)
    bad = sum(m.weights.values()) + outputs + hidden + losses
    first = next((row["site"] for row in rows if row["outputs"] or row["hidden"]), None)
    message = f"All {'' if m.unread else 'weights, '}activations and losses are finite."
    if bad:
        message = (
            f"{sum(m.weights.values())} weights, attention outputs of {outputs} and block outputs of {hidden} tokens, "
            f"and {losses} losses are NaN or infinite"
            + (f", first in {first}" if first else "")
            + (f"; weights of {next(iter(m.weights))}." if m.weights else ".")
        )
    if m.unread:
        message += f" {m.unread} offloaded weights were not read."
    return HealthCheck(
        "numbers", "NaN and infinity", "watch" if bad else "fine", f"{bad} found", "any", message,
        "Load it in bfloat16 or float32; if weights are bad, fetch them again." if bad else "",
        {"weights": m.weights, "outputs": outputs, "hidden": hidden, "losses": losses},
    )  # fmt: skip


def _duplicates(m: Measures) -> HealthCheck:
    """Heads that do the same: as another of their layer, or one of two well-known things."""
    own = m.found["attention"].tables
    previous, first = _above(own[PREVIOUS], PREVIOUS_HEAD), set(_above(own[FIRST], SINK))
    known = np.isfinite(m.head_distance)
    alike = [(int(r), int(h)) for r, h in np.argwhere(known & (np.nan_to_num(m.head_distance, nan=1.0) < DUPLICATE))]
    resting = [head for head in alike if head in first]
    grouped = [h for h in alike if h[1] // m.groups == int(m.most_similar[h]) // m.groups]
    level: Level = "note" if len(alike) - len(resting) > 0.05 * known.sum() else "fine"
    closest = float(np.nanmin(m.head_distance)) if known.any() else math.nan
    message = [
        f"{_count(len(alike), int(known.sum()))} attend like another of their layer" + _listed(own[FIRST], alike)
    ]
    if resting:
        message.append(f"{len(resting)} of them because both rest on the first token")
    if m.groups > 1 and alike:
        message.append(f"{len(grouped)} share the keys of their double")
    message.append(
        f"the two most alike differ in {closest:.0%} of their attention" if known.any() else "there is one head"
    )
    message.append(f"previous-token heads: {_names(own[PREVIOUS], previous) if previous else 'none'}")
    advice = (
        "Doubles are candidates for pruning or merging; those with the same keys cost compute, not cache."
        if level == "note"
        else ""
    )
    return HealthCheck(
        "duplicates", "heads that are alike", level, _count(len(alike), int(known.sum())),
        f"less than {DUPLICATE:.0%} of the attention elsewhere, in maps of 64 x 64 cells; previous-token above "
        f"{PREVIOUS_HEAD:g}",
        "; ".join(message) + ".", advice,
        {"alike": list(own[FIRST].names(alike)), "previous token": list(own[PREVIOUS].names(previous))},
    )  # fmt: skip
