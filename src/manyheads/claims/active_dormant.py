# SPDX-License-Identifier: Apache-2.0
"""Do sinks and drained values grow where a head has nothing to do, and does ReLU attention do without them?

Bigram-Backcopy (:mod:`manyheads.data.bigram_backcopy`): the one head of a small GPT-2 has work at the triggers only.
It is trained with softmax and with ReLU attention, equal in steps, sequences and rate. Then the head that was trained
with softmax is taken out, or turned wholly to the first token: a dormant row loses nothing by it, an active one what it
copied. Residual peaks need three layers and some thousand steps; they are looked at on a GPU, beside SGD.

The shipped model is looked at too, on the standard library's source, code beside comments and docstrings; each of its
heads is taken out, and what that costs is compared with the head's sink, on other files than the sink was measured on.
"""

import contextlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manyheads.claims._backcopy import Bed
from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.data.bigram_backcopy import BigramBackcopy
    from manyheads.strategy import Strategy

SOFTMAX, RELU, SGD = "softmax", "ReLU", "softmax trained by SGD"
Values = dict[str, list[float]]  # of each sequence


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained and read."""

    bed: Bed
    deep: Bed | None  # three layers, for residual peaks; trained with the first seed only
    sequences: int  # to judge the toys by
    windows: int  # of text for the shipped model
    tokens: int  # of a window
    ablate: bool  # whether each head of the shipped model is taken out


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in a few minutes, on a GPU in three."""
    if setting.quick:
        return Scale(Bed(64, 1, 64, 64, 500, 2e-3), None, 64, 4, 128, False)
    if setting.device == "cpu":
        return Scale(Bed(64, 1, 64, 64, 800, 2e-3), None, 128, 24, 192, True)
    return Scale(Bed(256, 1, 128, 256, 800, 1e-3), Bed(256, 3, 128, 256, 1500, 1e-3), 256, 64, 512, True)


def spans(mask: "Tensor") -> list[list[tuple[int, int]]]:
    """The True tokens of each row, as the roles of lenses take them."""
    return [[(int(t), int(t) + 1) for t in row.nonzero()] for row in mask.cpu()]


def judged(model: Any, task: "BigramBackcopy", ids: "Tensor", relu: bool) -> Values:
    """What is measured of a trained toy on sequences it has not seen."""
    import torch

    import manyheads
    from manyheads.claims._backcopy import losses
    from manyheads.lens import TokenSpans
    from manyheads.lenses.active_dormant.relu_attention import ReLUAttention

    used: tuple[Strategy, ...] = (ReLUAttention(),) if relu else ()
    copies = task.copies(ids)
    lens = "active_dormant:domains=triggers+others" + (",attention=relu" if relu else "")
    roles = TokenSpans({"triggers": spans(copies), "others": spans(~copies)})
    with contextlib.ExitStack() as stack, torch.no_grad():
        if used:
            stack.enter_context(manyheads.use(model, *used))
        seen = stack.enter_context(manyheads.watch(model, lens, roles=roles))
        model(ids[:, :-1])
    tables = seen.compute().tables
    loss, excess = losses(model, task, ids, *used)
    return {
        "sink at triggers": tables["sink of triggers"].values[:, 0, 0].tolist(),
        "sink elsewhere": tables["sink of others"].values[:, 0, 0].tolist(),
        "drain": tables["drain"].values[:, 0, 0].tolist(),
        "peak": tables["peak"].values[:, :, 0].max(1).tolist(),
        "loss at triggers": loss.tolist(),
        "excess loss elsewhere": excess.tolist(),
    }


def ablated(model: Any, task: "BigramBackcopy", ids: "Tensor") -> Values:
    """By how much the loss grows when the head is taken out, or turned to the first token."""
    from manyheads.claims._backcopy import losses

    plain = losses(model, task, ids)
    made: Values = {}
    for by, what in (("zero", "taken out"), ("bos", "turned to the first token")):
        changed = losses(model, task, ids, f"ablate:heads=0.0,by={by}")
        for where, before, after in zip(("at triggers", "elsewhere"), plain, changed, strict=True):
            made[f"loss added {where}, head {what}"] = (after - before).tolist()
    return made


def toys(setting: Setting, size: Scale, figures: list[Figure]) -> "tuple[dict[str, Any], str]":
    """Train and judge both arms with every seed; estimates by name, and where the pairs of letters are from."""
    import torch

    from manyheads.claims._backcopy import pairs_of_text, toy, train
    from manyheads.claims._bytes import estimate
    from manyheads.lenses.active_dormant.relu_attention import ReLUAttention

    task, source = pairs_of_text()
    runs = 2 * len(setting.seeds)
    ids = task.draw(size.sequences, size.bed.length, torch.Generator().manual_seed(2**40)).to(setting.device)
    found: dict[str, list[Values]] = {SOFTMAX: [], RELU: []}
    for i, seed in enumerate(setting.seeds):
        for j, arm in enumerate(found):

            def progress(done: float, at: int = 2 * i + j, arm: str = arm) -> None:
                setting.progress(f"training with {arm}", 0.7 * (at + done) / runs)

            model = toy(task, size.bed, seed, setting.device)
            train(model, task, size.bed, seed, ReLUAttention() if arm == RELU else None, progress)
            values = judged(model, task, ids, arm == RELU)
            del values["peak"]  # of one layer it says nothing
            found[arm].append(values | (ablated(model, task, ids) if arm == SOFTMAX else {}))
    made = {
        f"{name}, {arm}": estimate(
            figures, f"{name}, {arm}", [v[name] for v in values], "nats" if "loss" in name else ""
        )
        for arm, values in found.items()
        for name in values[0]
    }
    for name in ("sink elsewhere", "drain"):
        pairs = [
            [a - b for a, b in zip(x[name], y[name], strict=True)]
            for x, y in zip(found[SOFTMAX], found[RELU], strict=True)
        ]
        made[f"{name}, difference"] = estimate(figures, f"{name}, softmax minus ReLU", pairs)
    return made, source


def peaks(setting: Setting, size: Scale, figures: list[Figure]) -> dict[str, Any]:
    """Three layers: the largest residual peak with softmax, with ReLU, and with softmax trained by SGD."""
    import torch

    from manyheads.claims._backcopy import pairs_of_text, toy, train
    from manyheads.claims._bytes import estimate
    from manyheads.lenses.active_dormant.relu_attention import ReLUAttention

    if size.deep is None:
        return {}
    task, _ = pairs_of_text()
    ids = task.draw(size.sequences, size.deep.length, torch.Generator().manual_seed(2**40)).to(setting.device)
    made = {}
    for arm in (SOFTMAX, RELU, SGD):
        setting.progress(f"training three layers with {arm}", 0.7)
        bed = replace(size.deep, lr=0.03, optimizer="sgd") if arm == SGD else size.deep
        model = toy(task, bed, setting.seeds[0], setting.device)
        train(model, task, bed, setting.seeds[0], ReLUAttention() if arm == RELU else None)
        values = judged(model, task, ids, arm == RELU)
        for name in ("peak", "loss at triggers"):
            label = f"{name} of three layers, {arm}"
            made[label] = estimate(figures, label, [values[name]], "nats" if "loss" in name else "")
    return made


def source_windows(size: Scale, device: str) -> "tuple[Any, Tensor, Tensor]":
    """The shipped model, windows ``[N, T + 1]`` of files of the standard library, and ``[N, T]`` what is prose in them.

    Prose is what stands in comments and in strings of three quotes.
    """
    import random

    import torch

    from manyheads.data.texts import standard_library
    from manyheads.models import load_default

    model, tokenizer = load_default(device)
    files = standard_library()
    random.Random(1).shuffle(files)
    rows: list[list[int]] = []
    prose: list[list[bool]] = []
    for text in files:
        made = tokenizer(text.content[: 12 * size.tokens], return_offsets_mapping=True)
        if len(made.input_ids) <= size.tokens or len(rows) == size.windows:
            continue
        inside = [m.span() for m in re.finditer(r'#[^\n]*|"""[\s\S]*?(?:"""|\Z)', text.content[: 12 * size.tokens])]
        middle = [(a + b) / 2 for a, b in made.offset_mapping[: size.tokens]]
        rows.append(made.input_ids[: size.tokens + 1])
        prose.append([any(a <= x < b for a, b in inside) for x in middle])
    return model, torch.tensor(rows, device=device), torch.tensor(prose, device=device)


def shipped(setting: Setting, size: Scale, figures: list[Figure]) -> None:
    """Add what the shipped model shows: sinks, drains, peaks, and what its heads are worth on code and on prose."""
    import numpy as np
    import torch

    import manyheads
    from manyheads.heads import HeadTable
    from manyheads.lens import TokenSpans

    setting.progress("looking at the shipped model", 0.75)
    model, ids, prose = source_windows(size, setting.device)
    half = len(ids) // 2
    roles = TokenSpans({"code": spans(~prose[:half]), "prose": spans(prose[:half])})
    with torch.no_grad(), manyheads.watch(model, "active_dormant:domains=code+prose", roles=roles) as seen:
        model(ids[:half, :-1])
    tables = seen.compute().tables
    sink, drain, peak = (tables[name].mean for name in ("sink", "drain", "peak"))

    def add(name: str, value: Any, n: int) -> None:
        if np.isfinite(value):
            figures.append(Figure(f"shipped model: {name}", float(value), n))

    add("share of heads with a sink above one half", float((sink > 0.5).mean()), sink.size)
    add("largest sink of a head", sink.max(), half)
    add("mean sink", sink.mean(), half)
    add(
        "median drain of heads with a sink above one half",
        np.median(drain[sink > 0.5]) if (sink > 0.5).any() else np.nan,
        half,
    )
    add("median drain of the other heads", np.median(drain[sink <= 0.5]), half)
    add("rank correlation of sink and drain over heads", tables["sink"].correlation(tables["drain"]), sink.size)
    add("largest residual peak of a layer", np.nanmax(peak), half)
    add("largest sink on code minus sink on prose, of either sign", np.nanmax(np.abs(tables["switch"].mean)), half)
    if not size.ablate:
        return

    def nll(*strategies: str) -> "tuple[float, float, float]":
        with torch.no_grad(), manyheads.use(model, *strategies) if strategies else contextlib.nullcontext():
            logits = model(ids[half:, :-1]).logits.float()
        made = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[half:, 1:], reduction="none")
        return float(made.mean()), float(made[~prose[half:]].mean()), float(made[prose[half:]].mean())

    plain = np.array(nll())
    cost = np.zeros((*sink.shape, 3))
    for row, layer in enumerate(tables["sink"].layers):
        setting.progress("taking heads out of the shipped model", 0.75 + 0.25 * row / len(sink))
        for head in range(sink.shape[1]):
            cost[row, head] = np.array(nll(f"ablate:heads={layer}.{head}")) - plain
    every = HeadTable("cost", tables["sink"].sites, cost[..., 0])
    moved = HeadTable("cost on code minus on prose", tables["sink"].sites, cost[..., 1] - cost[..., 2])
    add("rank correlation of sink and loss added without the head", tables["sink"].correlation(every), sink.size)
    add("rank correlation of both on code minus on prose", tables["switch"].correlation(moved), sink.size)


def run(setting: Setting) -> Outcome:
    """Train, take out, look, and judge."""
    figures: list[Figure] = []
    size = scale(setting)
    made, source = toys(setting, size, figures)
    deep = peaks(setting, size, figures)
    shipped(setting, size, figures)

    def value(name: str) -> float:
        return float(made[name].value)

    sinks = value("sink elsewhere, softmax") > 0.5 and value("sink elsewhere, ReLU") < 0.1
    drains = value("drain, softmax") < 0.6 and value("drain, ReLU") > 0.8
    apart = made["sink elsewhere, difference"].low > 0 and made["drain, difference"].high < 0
    learned = all(value(f"loss at triggers, {arm}") < 0.1 for arm in (SOFTMAX, RELU))
    turned = "head turned to the first token, softmax"
    switches = value(f"loss added at triggers, {turned}") > 1 and value(f"loss added elsewhere, {turned}") < 0.1
    holds = sinks and drains and apart and learned and switches
    rest, forced = value("sink elsewhere, softmax"), value(f"loss added elsewhere, {turned}")
    added = value(f"loss added at triggers, {turned}")
    reason = (
        f"Pairs of {source}: off the triggers the softmax head rests on the first token with {rest:.2f} of its "
        f"attention ({value('sink at triggers, softmax'):.2f} on them), whose value has {value('drain, softmax'):.2f} "
        f"of the others' norm; with ReLU {value('sink elsewhere, ReLU'):.3f} and {value('drain, ReLU'):.2f}. Turned "
        f"wholly to the first token it loses {added:.2f} nats at triggers, {forced:.3f} elsewhere."
    )
    if deep:
        high, *others = (float(deep[f"peak of three layers, {arm}"].value) for arm in (SOFTMAX, RELU, SGD))
        holds = holds and high > 2 * max(others)
        reason += f" Residual peaks of three layers: {high:.1f}, with ReLU {others[0]:.1f}, by SGD {others[1]:.1f}."
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="active_dormant",
    statement=(
        "A softmax head that has work at triggers only turns to the first token everywhere else (sink above 0.5), "
        "whose value shrinks (below 0.6 of the others' norm), and loses nothing there when it is forced to; with ReLU "
        "attention the task is learned as well, without sink (below 0.1) and without drain (above 0.8)."
    ),
    paper_figure=(
        "One layer, 256 channels, 256 letters, 10 000 steps: rows off the triggers put nearly all attention on the "
        "first token, its value is near 0; with ReLU neither. Three layers: the first token's residual norm grows "
        "about linearly under Adam, not under SGD and not with ReLU"
    ),
    run=run,
)
