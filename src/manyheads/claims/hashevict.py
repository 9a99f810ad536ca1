# SPDX-License-Identifier: Apache-2.0
"""Does HashEvict hold the quality of the full cache at 30 to 70 % compression, and spare the attention matrix?

Quality is measured as the cache is meant to be used: the text streams in, and the cache replaces tokens from the moment
it is full. All arms hold the same number of slots per head (HashEvict one less, for the place in which its new token
waits) and are fed the same chunks. HashEvict replaces token by token within a chunk, the rivals after it, so a rival
sees up to a chunk more than its budget: an advantage of theirs, and small. The decisive rival is a random choice
under the same protection of first and recent tokens: what HashEvict gains over it is what its hashes know.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from manyheads.call import AttentionCall
    from manyheads.strategy import Strategy

KEEP = (0.7, 0.5, 0.3)
CLOSE_LOSS = 0.05  # nats per token above full that still count as "close to full": 5 % in perplexity
CLOSE_RECALL = 0.9  # share of full's recall, likewise
HASHEVICT = "hashevict"
CONTROL = "random, same protection"


def arms(slots: int) -> dict[str, str]:
    """Specs of equal bytes: HashEvict keeps one slot more than its budget, in which the new token waits."""
    return {
        HASHEVICT: f"hashevict:budget={slots - 1}",
        "hashevict, key probe": f"hashevict:budget={slots - 1},probe=key",
        CONTROL: f"random:budget={slots},schedule=chunk,sinks=4,recent=11",
        "random": f"random:budget={slots},schedule=chunk",
        "keydiff": f"keydiff:budget={slots},schedule=chunk",
        "streaming_llm": f"streaming_llm:budget={slots},schedule=chunk",
    }


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    length: int  # tokens per text
    texts: int
    pairs: int  # key-value pairs per sequence of the recall fixture
    sequences: int
    chunk: int
    prefill: int  # tokens of the timed prompt
    repeats: int


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, more on a GPU."""
    if setting.quick:
        return Scale(length=256, texts=4, pairs=100, sequences=8, chunk=32, prefill=1024, repeats=3)
    if setting.device == "cpu":
        return Scale(length=1024, texts=12, pairs=100, sequences=256, chunk=32, prefill=2048, repeats=5)
    return Scale(length=2048, texts=48, pairs=100, sequences=1024, chunk=32, prefill=8192, repeats=9)


def stream(
    model: "PreTrainedModel", ids: "torch.Tensor", strategy: "Strategy", start: int, chunk: int
) -> "tuple[torch.Tensor, int]":
    """Feed ``ids [B, T + 1]`` through a cache: logits for the T next tokens ``[B, T, V]``, bytes held."""
    import torch

    from manyheads.integrations import use
    from manyheads.integrations.transformers import new_cache

    cuts = [0, *range(start, ids.shape[1] - 1, chunk), ids.shape[1] - 1]
    with torch.no_grad(), use(model):
        cache = new_cache(model, strategy)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)]
        return torch.cat(parts, 1).float(), cache.bytes()


def losses(
    model: "PreTrainedModel", ids: "torch.Tensor", strategy: "Strategy", chunk: int
) -> "tuple[list[float], int]":
    """Nats per token over the second half of each text, and the bytes of the cache at its end."""
    import torch

    logits, held = stream(model, ids, strategy, 64, chunk)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return nll[:, nll.shape[1] // 2 :].mean(1).tolist(), held


def recalls(model: "PreTrainedModel", ids: "torch.Tensor", strategy: "Strategy", pairs: int, chunk: int) -> list[float]:
    """Share of the queried values recalled per sequence: ``k v`` pairs, then every key with its value again."""
    logits, _ = stream(model, ids, strategy, 32, chunk)
    asked = slice(2 * pairs, 4 * pairs, 2)  # a key stands here, its value comes next
    right = logits[:, asked].argmax(-1) == ids[:, 1:][:, asked]
    found: list[float] = right.float().mean(1).tolist()
    return found


def prefill_seconds(setting: Setting, size: Scale) -> "dict[str, list[float]]":
    """Seconds of a prompt, round by round: HashEvict's, and that of a cache which must sum attention weights (H2O)."""
    import torch

    from manyheads.integrations import use
    from manyheads.spec import parse

    model = _timed_model(setting)
    ids = torch.randint(8, model.config.vocab_size, (1, size.prefill), device=model.device)
    ways = {HASHEVICT: parse("hashevict:budget=0.5"), "attention scores": _column_sums()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(size.repeats + 1):
        for name, strategy in ways.items():
            with torch.no_grad(), use(model, strategy):
                _wait(setting)
                begin = perf_counter()
                model(ids, use_cache=True, logits_to_keep=1)
                _wait(setting)
            if turn:  # the first turn warms up
                times[name].append(perf_counter() - begin)
    return times


def _column_sums() -> "Strategy":
    """What a cache that ranks tokens by attention received must do in the prompt: weights in full, summed per key."""
    from manyheads.attention import reference
    from manyheads.strategy import AttentionCompute

    class ColumnSums(AttentionCompute):
        def attend(self, call: "AttentionCall") -> "torch.Tensor":
            x = reference.logits(call.q, call.k, scale=call.scale, bias=call.bias, softcap=call.softcap)
            weights = reference.softmax(x, call.allowed(), call.sinks)
            call.state["scores"] = weights.sum(2)
            return (weights @ reference.repeat_kv(call.v, call.q.shape[1])).transpose(1, 2)

    return ColumnSums()


def _timed_model(setting: Setting) -> "PreTrainedModel":
    """The default model on a CPU; four layers of Llama-3-8B's shape with random weights on a GPU."""
    import torch

    from manyheads.models import load_default

    if setting.device == "cpu":
        return load_default()[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072,
    )  # fmt: skip
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(shape)
        model = model.to(torch.bfloat16).eval()
    return cast("PreTrainedModel", model)


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        import torch

        torch.cuda.synchronize()


def _texts(tokenizer: Any, length: int, number: int, seed: int) -> "torch.Tensor":
    """Stretches of ``length + 1`` tokens of the standard library, one to a file: ``[number, length + 1]``."""
    import random

    import torch

    from manyheads.data.texts import standard_library

    files = standard_library(least=6 * length)
    random.Random(seed).shuffle(files)
    rows: list[list[int]] = []
    for text in files:
        if len(rows) == number:
            break
        ids = tokenizer(text.content, verbose=False)["input_ids"]
        if len(ids) > length:
            at = random.Random(f"{seed} {text.name}").randrange(len(ids) - length)
            rows.append(ids[at : at + length + 1])
    return torch.tensor(rows)


def _seeded(spec: str, seed: int) -> "Strategy":
    """The strategy of ``spec`` under a seed, where it draws anything."""
    from manyheads.spec import parse

    strategy = parse(spec)
    drawn = any(field.name == "seed" for field in fields(strategy))
    return cast("Strategy", replace(cast("Any", strategy), seed=seed)) if drawn else strategy


def _quality(setting: Setting, size: Scale) -> dict[str, dict[tuple[str, float], list[float]]]:
    """Samples of each measure by arm and keep rate: ``loss`` per text, ``recall`` per sequence, ``bytes`` once."""
    import torch

    from manyheads.models import load_default, load_recall
    from manyheads.recipes.recall import pairs

    model, tokenizer = load_default(setting.device, torch.float32)
    fixture = load_recall(setting.device, torch.float32)
    each = len(setting.seeds)
    texts = {seed: _texts(tokenizer, size.length, max(1, size.texts // each), seed) for seed in setting.seeds}
    asked = {
        seed: pairs(max(1, size.sequences // each), size.pairs, torch.Generator().manual_seed(seed), "cpu")[0]
        for seed in setting.seeds
    }
    samples: dict[str, dict[tuple[str, float], list[float]]] = {"loss": {}, "recall": {}, "bytes": {}}
    todo = [("full", 1.0, "full", "full")]
    for keep in KEEP:
        long, short = arms(round(keep * size.length)), arms(round(keep * 4 * size.pairs))
        todo += [(name, keep, long[name], short[name]) for name in long]
    for number, (name, keep, long_spec, short_spec) in enumerate(todo):
        setting.progress(f"{name} at {keep:.0%}", 0.8 * number / len(todo))
        for kind in samples:
            samples[kind][name, keep] = []
        for seed in setting.seeds:
            here = texts[seed].to(setting.device)
            found, held = losses(model, here, _seeded(long_spec, seed), size.chunk)
            samples["loss"][name, keep] += found
            samples["bytes"][name, keep] = [held / len(here)]
            samples["recall"][name, keep] += recalls(
                fixture, asked[seed].to(setting.device), _seeded(short_spec, seed), size.pairs, size.chunk
            )
    return samples


def run(setting: Setting) -> Outcome:
    """Measure quality by keep rate and the cost of the prompt, and judge."""
    import numpy as np

    from manyheads.compare import stats

    size = scale(setting)
    samples = _quality(setting, size)
    setting.progress("prompt", 0.8)
    times = prefill_seconds(setting, size)

    figures: list[Figure] = []

    def estimate(label: str, values: Sequence[float], unit: str) -> stats.Estimate:
        each = np.array(values, dtype=float)
        found = stats.mean(each, np.arange(len(each), dtype=float), 0, label)
        figures.append(Figure(label, found.value, found.n, found.low, found.high, unit))
        return found

    def difference(kind: str, a: tuple[str, float], b: tuple[str, float], unit: str) -> stats.Estimate:
        label = f"{kind} of {a[0]} minus {b[0]} at {a[1]:.0%}"
        return estimate(label, np.subtract(samples[kind][a], samples[kind][b]).tolist(), unit)

    full = ("full", 1.0)
    estimate("loss of full", samples["loss"][full], "nats")
    best = estimate("recall of full", samples["recall"][full], "").value
    close, less_loss, more_recall = [], [], []
    for keep in KEEP:
        ours, control = (HASHEVICT, keep), (CONTROL, keep)
        figures.append(Figure(f"bytes of {HASHEVICT} at {keep:.0%}", samples["bytes"][ours][0], 1, unit="bytes"))
        figures.append(Figure(f"bytes of {CONTROL} at {keep:.0%}", samples["bytes"][control][0], 1, unit="bytes"))
        more = {name: difference("loss", (name, keep), full, "nats") for name in arms(2**20)}
        recall = {name: estimate(f"recall of {name} at {keep:.0%}", samples["recall"][name, keep], "") for name in more}
        near = more[HASHEVICT].high <= CLOSE_LOSS and recall[HASHEVICT].low >= CLOSE_RECALL * best
        close.append(near)
        less_loss.append(difference("loss", ours, control, "nats").high < 0)
        more_recall.append(difference("recall", ours, control, "").low > 0)
    ratio = estimate(
        f"seconds of a prompt of {size.prefill} tokens, attention scores over {HASHEVICT}",
        [slow / fast for slow, fast in zip(times["attention scores"], times[HASHEVICT], strict=True)],
        "x",
    )
    for name, seconds in times.items():
        figures.append(Figure(f"prompt with {name}", median(seconds), len(seconds), min(seconds), max(seconds), "s"))
    return _judge(close, less_loss, more_recall, ratio.low, tuple(figures))


def _judge(
    close: Sequence[bool],
    less_loss: Sequence[bool],
    more_recall: Sequence[bool],
    ratio_low: float,
    figures: tuple[Figure, ...],
) -> Outcome:
    """Holds if the cache stays close to full and beats the protected random control at every rate, and is cheaper."""

    def where(holds: Sequence[bool]) -> str:
        rates = [f"{keep:.0%}" for keep, yes in zip(KEEP, holds, strict=True) if yes]
        return " and ".join(rates) or "no rate"

    cheap = ratio_low > 1 and not math.isinf(ratio_low)
    reason = (
        f"Close to full (loss at most {CLOSE_LOSS} nats more, recall at least {CLOSE_RECALL:.0%} of full's) when "
        f"keeping {where(close)}; better than a random choice under the same protection "
        f"in loss at {where(less_loss)}, in recall at {where(more_recall)}; "
        f"prompt {'cheaper than' if cheap else 'not shown cheaper than'} with summed attention weights."
    )
    return Outcome("holds" if all([*close, *less_loss, *more_recall, cheap]) else "does not hold here", reason, figures)


claim = Claim(
    slug="hashevict",
    statement=(
        "With 30 to 70 % of the cache dropped, HashEvict stays close to the full cache because its hashes choose "
        "better than chance, and its prompt costs less than that of a cache which must sum attention weights."
    ),
    paper_figure=(
        "Llama-3-8B-Instruct on GSM8K, MedQA, RULER, LongBench tasks: 30-70 % compression at close to full quality; "
        "prefill 1.5-2x faster than H2O and Scissorhands, up to 17x faster than FastGen."
    ),
    run=run,
)
