# SPDX-License-Identifier: Apache-2.0
"""Does GraphKV improve what a scorer keeps, because it knows which tokens repeat each other?

Three scorers (SnapKV and Knorm, which the paper uses, and KeyDiff, which is about diversity already), each alone, under
GraphKV, and under a control in which the keys of the graph are shuffled among tokens: its edges are as strong, and mean
nothing. All arms hold the same number of slots and compress the same prefill, once. Measured on text as it stands, and
on text of which 60 % is one passage over and over:

- loss of the text that goes on;
- needles: planted constants found, the question being read before compression, as in the paper's needle test;
- recall of pairs in the RECALL fixture, 40 asked among 60 others, which are all different or four pairs repeated. The
  first eight questions are read before compression.

The rule, set before the first run, with 95 % intervals of paired differences, each context counting once, averaged over
keep rates: a base is helped if with GraphKV more needles are found than without and than under the control (intervals
above 0, both kinds of text together), and the loss does not rise (interval not wholly above 0). The claim holds if
SnapKV and Knorm are both helped. KeyDiff, recall and the two kinds of text apart are reported and do not decide.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from manyheads.compare.stats import Estimate
    from manyheads.strategy import Strategy
    from manyheads.tasks.text._contexts import Contexts

KEEP = (0.3, 0.15)
BASES = ("snapkv", "knorm", "keydiff")
DECIDING = ("snapkv", "knorm")
WAYS = ("alone", "graphkv", "shuffled graph")
PASSAGE, STRETCH = 48, 32  # tokens of the repeated passage, and of the text between two of it: 60 % of the whole
ASKED, OTHERS, REPEATED, WINDOW = 40, 60, 4, 16  # of the recall task: pairs; distinct others if repeated; window
KINDS = ("plain", "repeated")

Arm = tuple[str, str, float]  # base, way, keep rate
FULL: Arm = ("full", "alone", 1.0)
Samples = dict[str, dict[Arm, list[float]]]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    length: int  # tokens before compression, a multiple of PASSAGE + STRETCH
    more: int  # tokens that go on
    texts: int  # of each kind, for the loss
    needles: int  # of each kind
    sequences: int  # of each kind, for recall


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, more on a GPU."""
    if setting.quick:
        return Scale(length=320, more=32, texts=6, needles=12, sequences=24)
    if setting.device == "cpu":
        return Scale(length=960, more=64, texts=36, needles=72, sequences=384)
    return Scale(length=2080, more=128, texts=192, needles=384, sequences=3072)


def arms(length: int, seed: int, snapkv: str = "") -> "dict[Arm, Strategy]":
    """Every base, way and keep rate of ``length`` tokens; ``snapkv`` are fields of SnapKV."""
    from manyheads.spec import parse

    found = {FULL: parse("full")}
    for keep in KEEP:
        slots = round(keep * length)
        for base in BASES:
            fields = snapkv if base == "snapkv" else ""
            inside = f"{base}({fields})"
            found[base, "alone", keep] = parse(f"{base}:{f'{fields},' if fields else ''}budget={slots}")
            found[base, "graphkv", keep] = parse(f"graphkv:base={inside},budget={slots}")
            found[base, "shuffled graph", keep] = _shuffled(inside, slots, seed)
    return found


def _shuffled(base: str, slots: int, seed: int) -> "Strategy":
    """GraphKV whose graph has the keys of other tokens."""
    import torch

    from manyheads import catalog

    graph: Any = catalog.load("graphkv")

    def keys(self: Any, view: Any) -> torch.Tensor:
        own: torch.Tensor = graph.keys(self, view)
        generator = torch.Generator().manual_seed(1009 * seed + (view.site.layer or 0))
        order = torch.rand(own.shape[:3], generator=generator).argsort(-1).to(own.device)
        return own.gather(2, order[..., None].expand_as(own))

    control: Any = type("Shuffled", (graph,), {"keys": keys})
    return cast("Strategy", control(base=base, budget=slots))


def follow(
    model: "PreTrainedModel",
    read: "Sequence[torch.Tensor]",
    fed: "torch.Tensor",
    keep: int,
    strategies: "dict[Arm, Strategy]",
    tick: Callable[[], None],
) -> "Iterator[tuple[Arm, torch.Tensor]]":
    """Read tokens ``[B, T]`` of ``read`` one after the other, compress, and feed: logits of the last ``keep``."""
    import torch

    from manyheads.compare import arms as compare
    from manyheads.integrations import use

    here = {arm: compare.Arm(strategy, " ".join(map(str, arm))) for arm, strategy in strategies.items()}
    with torch.inference_mode(), use(model):
        prefix = compare.Prefix(model, read[0], here.values())
        for part in read[1:]:
            prefix.extend(part)
        for arm, strategy in here.items():
            tick()
            with prefix.open(strategy) as cache:
                yield arm, compare.forward_chunked(model, cache, fed, keep)


def _repeating(contexts: "Contexts", ids: Any, number: int) -> Any:
    """``ids`` with a passage before every stretch of it, at the nearest line end: 5/2 of their length."""
    count = len(ids) // STRETCH
    passage = contexts.plain("passage", PASSAGE, contexts.samples, 0)[number][0].tolist()
    return contexts.inserter.insert(ids, [passage] * count, [i / count for i in range(count)])


def _text(
    setting: Setting, size: Scale, seed: int, note: Callable[[str, Arm, list[float]], None], tick: Callable[[], None]
) -> None:
    """Loss and needles on the default model, both kinds of text."""
    import numpy as np
    import torch

    from manyheads.data.texts import standard_library
    from manyheads.models import load_default
    from manyheads.tasks.text._contexts import Contexts
    from manyheads.tasks.text._corpus import Corpus

    model, tokenizer = load_default(setting.device, torch.float32)
    corpus = Corpus(standard_library(least=6 * (size.length + size.more)), tokenizer)
    each = len(setting.seeds)
    strategies = arms(size.length, seed)

    def tensor(rows: Iterable[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(row, np.int64) for row in rows])).to(setting.device)

    for kind in KINDS:
        length = size.length if kind == "plain" else size.length * STRETCH // (STRETCH + PASSAGE)
        contexts = Contexts(corpus, tokenizer, size.texts // each, seed)
        rows = [ids for ids, _, _ in contexts.plain("loss", length, contexts.samples, size.more + 1)]
        heads = [
            ids[:length] if kind == "plain" else _repeating(contexts, ids[:length], i) for i, ids in enumerate(rows)
        ]
        tails = tensor(ids[length:] for ids in rows)
        for arm, logits in follow(model, [tensor(heads)], tails[:, :-1], size.more, strategies, tick):
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tails[:, 1:], reduction="none")
            note(f"loss, {kind} text", arm, nats.mean(1).tolist())

        contexts = Contexts(corpus, tokenizer, size.needles // each, seed)
        planted = contexts.single(length)
        heads = [c.ids if kind == "plain" else _repeating(contexts, c.ids, i) for i, c in enumerate(planted)]
        asked = tensor(c.questions[0].question for c in planted)
        answers = tensor(c.questions[0].answer for c in planted)
        fed = torch.cat([asked[:, -1:], answers[:, :-1]], 1)
        for arm, logits in follow(model, [tensor(heads), asked[:, :-1]], fed, answers.shape[1], strategies, tick):
            note(f"needles, {kind} text", arm, (logits.argmax(-1) == answers).all(1).float().tolist())


def crowd(batch: int, kind: str, seed: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Pairs in random order and the asked ones again: tokens ``[batch, 2 (ASKED + OTHERS)]`` and ``[batch, 2 ASKED]``.

    ``kind``: the others are all different (plain), or REPEATED of them over and over (repeated).
    """
    import torch

    from manyheads.recipes.recall import pairs

    generator = torch.Generator().manual_seed(seed)
    drawn = pairs(batch, ASKED + OTHERS, generator, "cpu")[0][:, : 2 * (ASKED + OTHERS)].unflatten(1, (-1, 2))
    asked, others = drawn[:, :ASKED], drawn[:, ASKED:]
    if kind == "repeated":
        others = others[:, :REPEATED].repeat(1, OTHERS // REPEATED, 1)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        order = torch.rand(x.shape[:2], generator=generator).argsort(1)
        return x.gather(1, order[..., None].expand_as(x)).flatten(1)

    return mixed(torch.cat([asked, others], 1)), mixed(asked)


def _recall(
    setting: Setting, size: Scale, seed: int, note: Callable[[str, Arm, list[float]], None], tick: Callable[[], None]
) -> None:
    """Recall of the pairs asked after compression."""
    import torch

    from manyheads.models import load_recall

    fixture = load_recall(setting.device, torch.float32)
    for kind in KINDS:
        context, asked = (x.to(setting.device) for x in crowd(size.sequences // len(setting.seeds), kind, seed))
        head = torch.cat([context, asked[:, :WINDOW]], 1)
        fed, targets = asked[:, WINDOW:-1], asked[:, WINDOW + 1 :: 2]
        strategies = arms(head.shape[1], seed, f"window_size={WINDOW}")
        for arm, logits in follow(fixture, [head], fed, fed.shape[1], strategies, tick):
            right = logits[:, ::2].argmax(-1) == targets  # a key stands here, its value comes next
            note(f"recall, {kind} pairs", arm, right.float().mean(1).tolist())


def run(setting: Setting) -> Outcome:
    """Measure, and judge."""
    import numpy as np

    from manyheads.compare import stats

    size, samples, done = scale(setting), dict[str, dict[Arm, list[float]]](), 0
    todo = 6 * len(setting.seeds) * (1 + len(BASES) * len(WAYS) * len(KEEP))

    def note(measure: str, arm: Arm, values: list[float]) -> None:
        samples.setdefault(measure, {}).setdefault(arm, []).extend(values)

    def tick() -> None:
        nonlocal done
        setting.progress("reading and compressing", done / todo)
        done += 1

    for seed in setting.seeds:
        _text(setting, size, seed, note, tick)
        _recall(setting, size, seed, note, tick)

    figures: list[Figure] = []

    def estimate(label: str, values: Any) -> "Estimate":
        found = stats.mean(values, np.arange(len(values), dtype=float), 0, label)
        figures.append(Figure(label, found.value, found.n, found.low, found.high, "nats" if "loss" in label else ""))
        return found

    def mean(measure: str, base: str, way: str) -> Any:
        return np.mean([samples[measure][base, way, keep] for keep in KEEP], 0)

    differences: dict[tuple[str, str, str], Estimate] = {}
    for measure in samples:
        estimate(f"{measure}: full", np.array(samples[measure][FULL]))
        for base in BASES:
            for way in WAYS:
                estimate(f"{measure}: {base} {way}", mean(measure, base, way))
    for base in BASES:
        for rival in ("alone", "shuffled graph"):
            parts = {m: mean(m, base, "graphkv") - mean(m, base, rival) for m in samples}
            for task in ("loss", "needles", "recall"):
                both = [m for m in parts if m.startswith(task)]
                for name, chosen in ((task, both), *((m, [m]) for m in both)):
                    label = f"{name}: graphkv minus {rival}, over {base}"
                    differences[name, base, rival] = estimate(label, np.concatenate([parts[m] for m in chosen]))
    levels = {
        (task, base, way): float(np.concatenate([mean(m, base, way) for m in samples if m.startswith(task)]).mean())
        for task in ("loss", "needles", "recall")
        for base in BASES
        for way in WAYS
    }
    return _judge(levels, differences, tuple(figures))


def _judge(
    levels: dict[tuple[str, str, str], float],
    differences: "dict[tuple[str, str, str], Estimate]",
    figures: tuple[Figure, ...],
) -> Outcome:
    """Holds if both of the paper's bases find more needles with the graph, than alone and shuffled, at no more loss."""
    helped, parts = [], []
    for base in BASES:
        alone, shuffled = differences["needles", base, "alone"], differences["needles", base, "shuffled graph"]
        loss, recall = differences["loss", base, "alone"], differences["recall", base, "alone"]
        if alone.low > 0 and shuffled.low > 0 and loss.low <= 0:
            helped.append(base)
        found = [f"{levels['needles', base, way]:.0%}" for way in ("graphkv", "alone", "shuffled graph")]
        parts.append(
            f"over {base} {found[0]} of the needles are found ({_told(alone)} {found[1]} alone, {_told(shuffled)} "
            f"{found[2]} with the graph shuffled), and {loss.value:+.3f} nats of loss ({_told(loss)} 0) and "
            f"{recall.value:+.1%} of recall ({_told(recall)} 0) are added"
        )
    reason = f"At {' and '.join(f'{keep:.0%}' for keep in KEEP)} of the cache {'; '.join(parts)}."
    return Outcome("holds" if set(DECIDING) <= set(helped) else "does not hold here", reason, figures)


def _told(found: "Estimate") -> str:
    """What the interval of a difference says of its sign."""
    return "above" if found.low > 0 else "below" if found.high < 0 else "not told from"


claim = Claim(
    slug="graphkv",
    statement=(
        "At the same number of slots, lowering the scores of tokens whose keys resemble the best-scored ones finds "
        "more needles than SnapKV or Knorm alone, at no more loss, and it is the resemblance that does it."
    ),
    paper_figure=(
        "Needle test at 8k with 128 slots: SnapKV 87.7 to 95.9, PyramidKV 90.3 to 96.9. LongBench average, "
        "Llama-3-8B: SnapKV 39.97 to 40.35, PyramidKV 39.58 to 40.09, Knorm 20.64 to 29.76."
    ),
    run=run,
)
