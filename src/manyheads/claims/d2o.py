# SPDX-License-Identifier: Apache-2.0
"""Does D2O lose less than H2O and StreamingLLM at the same number of slots, and do its mergers and layer budgets help?

A text is read whole, each arm compresses the same prefill, and the text goes on, 16 tokens at a time; after each piece
every arm evicts down to its slots again. All arms protect four first tokens; D2O, H2O and the random control keep the
last quarter of their slots for recent tokens. (D2O's bytes are a few per cent above: the rows of a batch, which have
layer budgets of their own, are stored as wide as the widest.) What D2O gains over itself without mergers is what
mergers are worth, and over itself with equal layers what its layer budgets are. RECALL is the case without redundancy:
every pair is needed once and no token stands for another, so a merger has nothing to gain and may blur what was kept.

The rule, set before the first run, with 95 % intervals of paired differences: the claim holds if at every keep rate
D2O's loss is below H2O's and below StreamingLLM's (interval below 0), and its recall is not below H2O's (interval not
wholly below 0). Mergers and layer budgets are judged by the sign of their intervals and reported; they do not decide.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from manyheads.compare.stats import Estimate

KEEP = (0.5, 0.2, 0.1)
PIECE = 16  # tokens of text that go on at once
ASKED = 20  # tokens of questions likewise
FULL = ("full", 1.0)
D2O, H2O, STREAMING = "d2o", "h2o, same split", "streaming_llm"
DROPPING, UNIFORM = "d2o without merging", "d2o, equal layers"

Arm = tuple[str, float]  # name and keep rate
Samples = dict[Arm, list[float]]


def arms(slots: int, seed: int) -> dict[str, str]:
    """Specs that hold ``slots`` tokens per head, D2O on the average of its layers."""
    return {
        D2O: f"d2o:budget={slots}",
        "d2o, released weights": f"d2o:budget={slots},weights=code",
        DROPPING: f"d2o:budget={slots},merging=False",
        UNIFORM: f"d2o:budget={slots},layer_alloc=uniform",
        H2O: f"h2o:budget={slots},sinks=4,recent_share=0.25",
        STREAMING: f"streaming_llm:budget={slots}",
        "random": f"random:budget={slots},schedule=step,sinks=4,recent={slots // 4},seed={seed}",
    }


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    length: int  # tokens read before compression
    more: int  # tokens that go on
    texts: int
    pairs: int  # of a sequence of the recall fixture
    sequences: int


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, more on a GPU."""
    if setting.quick:
        return Scale(length=256, more=48, texts=5, pairs=100, sequences=12)
    if setting.device == "cpu":
        return Scale(length=768, more=128, texts=18, pairs=100, sequences=192)
    return Scale(length=2048, more=256, texts=96, pairs=100, sequences=1536)


def follow(
    model: "PreTrainedModel",
    ids: "torch.Tensor",
    length: int,
    specs: dict[Arm, str],
    piece: int,
    tick: Callable[[Arm], None],
) -> "Iterator[tuple[Arm, torch.Tensor, float]]":
    """Read ``length`` tokens of ``ids [B, T + 1]`` once, then the rest in pieces under every arm.

    Yields:
        Arm, float32 logits ``[B, T - length, V]`` of what follows token ``length`` and later ones, and the bytes of a
        row right after compression.
    """
    import torch

    from manyheads.compare import arms as compare
    from manyheads.integrations import use
    from manyheads.spec import parse

    here = {arm: compare.Arm(parse(spec), arm[0]) for arm, spec in specs.items()}
    with torch.inference_mode(), use(model):
        prefix = compare.Prefix(model, ids[:, :length], here.values())
        for arm, strategy in here.items():
            tick(arm)
            with prefix.open(strategy) as cache:
                held = cache.bytes() / len(ids)
                yield (
                    arm,
                    compare.forward_chunked(model, cache, ids[:, length:-1], ids.shape[1] - 1 - length, piece),
                    held,
                )


def _texts(tokenizer: Any, size: Scale, number: int, seed: int) -> "torch.Tensor":
    """Stretches of the standard library, one to a file: ``[number, length + more + 1]``."""
    import numpy as np
    import torch

    from manyheads.data.texts import standard_library
    from manyheads.tasks.text._contexts import Contexts
    from manyheads.tasks.text._corpus import Corpus

    corpus = Corpus(standard_library(least=6 * (size.length + size.more)), tokenizer)
    drawn = Contexts(corpus, tokenizer, number, seed).plain("loss", size.length, number, size.more + 1)
    return torch.from_numpy(np.stack([ids for ids, _, _ in drawn]))


def _measure(setting: Setting, size: Scale) -> dict[str, Samples]:
    """Samples of each measure: ``loss`` per text, ``recall`` per sequence, ``bytes`` of a text once per seed."""
    import torch

    from manyheads.models import load_default, load_recall
    from manyheads.recipes.recall import pairs

    model, tokenizer = load_default(setting.device, torch.float32)
    fixture = load_recall(setting.device, torch.float32)
    samples: dict[str, Samples] = {"loss": {}, "recall": {}, "bytes": {}}
    each, context, done = len(setting.seeds), 2 * size.pairs, 0

    def note(kind: str, arm: Arm, values: list[float]) -> None:
        samples[kind].setdefault(arm, []).extend(values)

    def tick(arm: Arm) -> None:
        nonlocal done
        setting.progress(f"{arm[0]} at {arm[1]:.0%}", done / (2 * each * (1 + len(KEEP) * len(arms(0, 0)))))
        done += 1

    for seed in setting.seeds:
        text = _texts(tokenizer, size, size.texts // each, seed).to(setting.device)
        for arm, logits, held in follow(model, text, size.length, _specs(size.length, seed), PIECE, tick):
            target = text[:, size.length + 1 :]
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            note("loss", arm, nats.mean(1).tolist())
            note("bytes", arm, [held])
        asked = pairs(size.sequences // each, size.pairs, torch.Generator().manual_seed(seed), "cpu")[0]
        asked = asked.to(setting.device)
        for arm, logits, _ in follow(fixture, asked, context, _specs(context, seed), ASKED, tick):
            right = logits[:, ::2].argmax(-1) == asked[:, context + 1 :: 2]  # a key stands here, its value is next
            note("recall", arm, right.float().mean(1).tolist())
    return samples


def _specs(length: int, seed: int) -> dict[Arm, str]:
    """Every arm at every keep rate of ``length`` tokens."""
    specs: dict[Arm, str] = {FULL: "full"}
    for keep in KEEP:
        specs |= {(name, keep): spec for name, spec in arms(round(keep * length), seed).items()}
    return specs


def run(setting: Setting) -> Outcome:
    """Measure loss and recall by keep rate, and judge."""
    import numpy as np

    from manyheads.compare import stats

    samples = _measure(setting, scale(setting))
    figures: list[Figure] = []

    def estimate(label: str, values: Sequence[float], unit: str) -> "Estimate":
        each = np.array(values, dtype=float)
        found = stats.mean(each, np.arange(len(each), dtype=float), 0, label)
        figures.append(Figure(label, found.value, found.n, found.low, found.high, unit))
        return found

    def difference(kind: str, a: str, b: str, keep: float, unit: str = "nats") -> "Estimate":
        values = np.subtract(samples[kind][a, keep], samples[kind][b, keep]).tolist()
        return estimate(f"{kind} of {a} minus {b} at {keep:.0%}", values, unit)

    estimate("loss of full", samples["loss"][FULL], "nats")
    estimate("recall of full", samples["recall"][FULL], "")
    rates: dict[str, list[float]] = {}

    def holds(what: str, keep: float, yes: bool) -> None:
        rates.setdefault(what, []).extend([keep] if yes else [])

    for keep in KEEP:
        for name in arms(0, 0):
            more = np.subtract(samples["loss"][name, keep], samples["loss"][FULL]).tolist()
            estimate(f"loss of {name} minus full at {keep:.0%}", more, "nats")
            estimate(f"recall of {name} at {keep:.0%}", samples["recall"][name, keep], "")
            held = samples["bytes"][name, keep]
            figures.append(Figure(f"bytes of {name} at {keep:.0%}", float(np.mean(held)), len(held), unit="bytes"))
        for rival in (H2O, STREAMING, "random"):
            holds(f"less loss than {rival}", keep, difference("loss", D2O, rival, keep).high < 0)
        recall = difference("recall", D2O, H2O, keep, "")
        holds(f"no less recall than {H2O}", keep, recall.high >= 0)
        for part, without in (("mergers", DROPPING), ("layer budgets", UNIFORM)):
            loss, recall = difference("loss", D2O, without, keep), difference("recall", D2O, without, keep, "")
            holds(f"{part} lower the loss", keep, loss.high < 0)
            holds(f"{part} raise the loss", keep, loss.low > 0)
            holds(f"{part} raise recall", keep, recall.low > 0)
            holds(f"{part} lower recall", keep, recall.high < 0)
    return _judge(rates, tuple(figures))


def _judge(rates: dict[str, list[float]], figures: tuple[Figure, ...]) -> Outcome:
    """Holds if D2O beats both rivals in loss at every rate and is nowhere behind H2O in recall."""

    def at(what: str) -> str:
        return f"{what} at {' and '.join(f'{keep:.0%}' for keep in rates[what]) or 'no rate'}"

    decisive = (f"less loss than {H2O}", f"less loss than {STREAMING}", f"no less recall than {H2O}")
    parts = [at(what) for what in rates if what.startswith(("mergers", "layer")) and rates[what]]
    reason = (
        f"D2O has {'; '.join(at(what) for what in (*decisive, 'less loss than random'))}. "
        f"Its parts: {'; '.join(parts) or 'neither mergers nor layer budgets change anything that can be told'}."
    )
    everywhere = all(len(rates[what]) == len(KEEP) for what in decisive)
    return Outcome("holds" if everywhere else "does not hold here", reason, figures)


claim = Claim(
    slug="d2o",
    statement=(
        "Keeping 10 to 50 % of the cache, D2O loses less than H2O and StreamingLLM with the same number of slots, "
        "because it gives layers budgets of their own and merges what it drops into what it keeps."
    ),
    paper_figure=(
        "Llama-2/3, Mistral and Falcon on GSM8K, CoQA, TruthfulQA, LongBench and needle tests: above H2O and "
        "StreamingLLM at equal budgets of 20 % and below; more than 3x the throughput of the full cache."
    ),
    run=run,
)
