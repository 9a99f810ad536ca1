# SPDX-License-Identifier: Apache-2.0
"""Does scaling keys by rotary pair make a 4-bit cache nearly lossless where plain 4 bits fail?

The models that ship have no such outlying key channels as large models have, so they are planted: in every layer and
key/value head one rotary pair of W_k is made 32 times larger and of W_q 32 times smaller. A power of two: the planted
model computes bit for bit what it did, which is checked. Both models are then read with every cache, planted and plain.
The prompt is the first half of the text; the second half streams in behind it, so that every prediction that counts
reads tokens as they are stored.

Equal bits: every 4-bit arm holds 4 bits per channel and one 16-bit scale per d channels. ``fireq`` and plain INT4 are
the real packed cache; the two rivals (one scale per channel over d tokens, as KIVI has it for keys; a Hadamard rotation
before INT4, as QuaRot has it) are computed by rounding the keys of a full cache in the same way. The rival with a scale
per channel leaves up to d - 1 tokens more unrounded, an advantage of its own, and small.

The paper's headline is the speed of its INT4-FP8 kernels and is not what its cache half claims; this is.
"""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from manyheads.call import AttentionCall
    from manyheads.strategy import Strategy

CLOSE_LOSS = 0.02  # nats per token above full that still count as "nearly lossless": 2 % in perplexity
CLOSE_RECALL = 0.98  # share of full's recall, likewise
FACTOR = 32.0
WINDOW = 64  # last tokens in the model's dtype, in every arm
CHUNK = 64
FULL, PLAIN, OURS = "full", "int4", "int4, fireq"
SPECS = {
    FULL: "full",
    PLAIN: "fireq:scaling=none",
    OURS: "fireq",
    "int4, pre alone": "fireq:scaling=pre",
    "int4, post alone": "fireq:scaling=post",
    "int4, post alone, top_k=8, beta=8": "fireq:scaling=post,top_k=8,beta=8",
    "fp8": "fireq:bits=fp8,scaling=none",
}
RIVALS = ("int4, scale per channel", "int4, hadamard")
QUICK = (FULL, PLAIN, OURS, "fp8", RIVALS[0])


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    length: int  # tokens per text
    texts: int
    pairs: int  # key-value pairs per sequence of the recall fixture
    sequences: int


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, more on a GPU."""
    if setting.quick:
        return Scale(length=384, texts=8, pairs=100, sequences=16)
    if setting.device == "cpu":
        return Scale(length=1024, texts=12, pairs=100, sequences=96)
    return Scale(length=4096, texts=48, pairs=100, sequences=1024)


def rounded(x: "Tensor", dim: int) -> "Tensor":
    """``x`` as symmetric INT4 with one bfloat16 scale for all channels (``dim=-1``) or tokens (``dim=-2``) reads it."""
    step = (x.float().abs().amax(dim, keepdim=True) / 7).bfloat16().float()
    return ((x / step.masked_fill(step == 0, 1.0)).round().clamp(-7, 7) * step).to(x.dtype)


def rotation(size: int, device: "torch.device") -> "Tensor":
    """Orthogonal Hadamard matrix of a power of two."""
    import torch

    h = torch.ones(1, 1, device=device)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


def rival(name: str) -> "Strategy":
    """An edit that rounds keys and values older than the window."""
    from manyheads.strategy import AttentionEdit

    class Rounding(AttentionEdit):
        def edit(self, call: "AttentionCall") -> "AttentionCall":
            import torch

            old = call.k.shape[2] - call.q.shape[2] - WINDOW  # the last are those that the packed cache leaves alone
            if old <= 0:
                return call
            k, v, width = call.k[:, :, :old], call.v[:, :, :old], call.k.shape[3]
            if name == "int4, hadamard":
                turn = rotation(width, k.device).to(k.dtype)
                k = rounded(k @ turn, -1) @ turn.T
            else:
                whole = old // width * width
                groups = rounded(k[:, :, :whole].unflatten(2, (-1, width)), -2).flatten(2, 3)
                k = torch.cat([groups, k[:, :, whole:]], 2)
            return call.replace(
                k=torch.cat([k, call.k[:, :, old:]], 2), v=torch.cat([rounded(v, -1), call.v[:, :, old:]], 2)
            )

    return Rounding()


def planted(model: "PreTrainedModel", seed: int) -> "PreTrainedModel":
    """A copy with one outlying rotary pair in every layer and key/value head."""
    import torch

    other, draw = copy.deepcopy(model), random.Random(f"fireq {seed}")
    config: Any = other.config
    dim, heads = config.head_dim, config.num_key_value_heads
    layers: Any = other.get_decoder().layers
    with torch.no_grad():
        for layer in layers:
            k = layer.self_attn.k_proj.weight.unflatten(0, (heads, dim))
            q = layer.self_attn.q_proj.weight.unflatten(0, (heads, -1, dim))
            for head in range(heads):
                pair = draw.randrange(dim // 2)
                k[head, [pair, pair + dim // 2]] *= FACTOR
                q[head, :, [pair, pair + dim // 2]] /= FACTOR
    return other


def stream(model: "PreTrainedModel", ids: "Tensor", arm: str, start: int) -> "tuple[Tensor, int]":
    """Feed ``ids [B, T + 1]`` through the cache of ``arm``: logits ``[B, T - start, V]`` after the prompt, bytes."""
    import torch

    from manyheads.integrations import use
    from manyheads.integrations.transformers import new_cache
    from manyheads.spec import parse

    cuts = [*range(start, ids.shape[1] - 1, CHUNK), ids.shape[1] - 1]
    edits = [rival(arm)] if arm in RIVALS else []
    with torch.no_grad(), use(model, *edits):
        cache = new_cache(model, parse(SPECS.get(arm, FULL)))
        model(ids[:, :start], past_key_values=cache, logits_to_keep=1)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(cuts)]
        return torch.cat(parts, 1).float(), cache.bytes()


def losses(model: "PreTrainedModel", ids: "Tensor", arm: str) -> tuple[list[float], int]:
    """Nats per token over the second half of each text, and the bytes of the cache at its end."""
    import torch

    start = ids.shape[1] // 2
    logits, held = stream(model, ids, arm, start)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, start + 1 :], reduction="none")
    return nll.mean(1).tolist(), held


def recalls(model: "PreTrainedModel", ids: "Tensor", arm: str, pairs: int) -> list[float]:
    """Share of the queried values recalled per sequence: ``k v`` pairs, then every key with its value again."""
    logits, _ = stream(model, ids, arm, 2 * pairs)
    right = logits[:, ::2].argmax(-1) == ids[:, 2 * pairs + 1 :: 2]
    found: list[float] = right.float().mean(1).tolist()
    return found


def _texts(tokenizer: Any, length: int, number: int, seed: int) -> "Tensor":
    """Stretches of ``length + 1`` tokens of the standard library, one to a file: ``[number, length + 1]``."""
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


def _arms(setting: Setting) -> list[str]:
    return list(QUICK) if setting.quick else [*SPECS, *RIVALS]


Samples = dict[tuple[str, str, str], list[float]]  # (measure, model, arm) -> a value per text or sequence


def _measure(setting: Setting, size: Scale) -> Samples:
    """``loss`` per text and ``recall`` per sequence of every arm on the plain and the planted models; ``bytes``."""
    import torch

    from manyheads.models import load_default, load_recall
    from manyheads.recipes.recall import pairs

    model, tokenizer = load_default(setting.device, torch.float32)
    fixture = load_recall(setting.device, torch.float32)
    each, arms = len(setting.seeds), _arms(setting)
    samples: Samples = {}
    for number, seed in enumerate(setting.seeds):
        texts = _texts(tokenizer, size.length, max(1, size.texts // each), seed).to(setting.device)
        drawn = torch.Generator().manual_seed(seed)
        asked = pairs(max(1, size.sequences // each), size.pairs, drawn, "cpu")[0].to(setting.device)
        for kind, make in (("plain", lambda m, _: m), ("planted", planted)):
            reader, recaller = make(model, seed), make(fixture, seed)
            for turn, arm in enumerate(arms):
                done = (number + (turn / len(arms) + (kind == "planted")) / 2) / each
                setting.progress(f"{arm}, {kind}", done)
                loss, held = losses(reader, texts, arm)
                samples.setdefault(("loss", kind, arm), []).extend(loss)
                samples.setdefault(("recall", kind, arm), []).extend(recalls(recaller, asked, arm, size.pairs))
                if arm in SPECS:
                    samples["bytes", kind, arm] = [held / len(texts)]
    return samples


def run(setting: Setting) -> Outcome:
    """Measure loss and recall of every arm on both models, and judge."""
    import numpy as np

    from manyheads.compare import stats

    samples = _measure(setting, scale(setting))
    figures: list[Figure] = []

    def estimate(label: str, values: Sequence[float], unit: str = "") -> stats.Estimate:
        each = np.array(values, dtype=float)
        found = stats.mean(each, np.arange(len(each), dtype=float), 0, label)
        figures.append(Figure(label, found.value, found.n, found.low, found.high, unit))
        return found

    def difference(measure: str, kind: str, arm: str, other: str, unit: str = "") -> stats.Estimate:
        values = np.subtract(samples[measure, kind, arm], samples[measure, kind, other]).tolist()
        return estimate(f"{measure} of {arm} minus {other}, {kind}", values, unit)

    same = [samples[m, "plain", FULL] == samples[m, "planted", FULL] for m in ("loss", "recall")]
    estimate("loss of full", samples["loss", "plain", FULL], "nats")
    best = estimate("recall of full", samples["recall", "plain", FULL]).value
    arms = [arm for arm in _arms(setting) if arm != FULL]
    held = {arm: found[0] for (measure, kind, arm), found in samples.items() if (measure, kind) == ("bytes", "plain")}
    figures += [Figure(f"bytes of {arm}", found, 1, unit="bytes") for arm, found in held.items()]
    close = {}
    for kind in ("plain", "planted"):
        for arm in arms:
            loss = difference("loss", kind, arm, FULL, "nats")
            recall = estimate(f"recall of {arm}, {kind}", samples["recall", kind, arm])
            close[kind, arm] = loss.high <= CLOSE_LOSS and recall.low >= CLOSE_RECALL * best
            if (kind, arm) == ("planted", PLAIN):
                fails = loss.low > CLOSE_LOSS and recall.high < CLOSE_RECALL * best
    less_loss = difference("loss", "planted", OURS, PLAIN, "nats").high < 0
    more_recall = difference("recall", "planted", OURS, PLAIN).low > 0
    difference("loss", "plain", OURS, PLAIN, "nats")
    for arm in set(RIVALS) & set(arms):
        difference("loss", "planted", OURS, arm, "nats")
    return _judge(all(same), fails, less_loss and more_recall, close, tuple(figures))


def _judge(
    same: bool, fails: bool, better: bool, close: dict[tuple[str, str], bool], figures: tuple[Figure, ...]
) -> Outcome:
    """Holds if with outliers plain INT4 fails, and FireQ is better and nearly lossless, as it must be without them."""

    def where(kind: str) -> str:
        return "; ".join(arm for (at, arm), yes in close.items() if at == kind and yes) or "none"

    reason = (
        f"Nearly lossless (loss at most {CLOSE_LOSS} nats above full, recall at least {CLOSE_RECALL:.0%} of full's) "
        f"with planted outliers: {where('planted')}; without: {where('plain')}. "
        f"With outliers plain INT4 {'fails' if fails else 'is not shown to fail'}, "
        f"and FireQ is {'better' if better else 'not shown to be better'} in loss and recall."
    )
    if not same:
        return Outcome("not testable here", "Planting outliers changed what the full cache computes.", figures)
    holds = fails and better and close["planted", OURS] and close["plain", OURS]
    return Outcome("holds" if holds else "does not hold here", reason, figures)


claim = Claim(
    slug="fireq",
    statement=(
        "Where a rotary pair of the keys is an outlier, scaling keys by rotary pair makes an INT4 cache nearly "
        "lossless and plain INT4 is not; where none is, it does no harm."
    ),
    paper_figure=(
        "Llama-3-8B, WikiText perplexity 6.13 in FP16 and 7.03 with INT4 weights, FP8 activations and INT4 cache, "
        "zero-shot average 70.61 and 67.92. (The paper's headline, FFN 1.68x and prefill 1.26x over QServe, is of its "
        "INT4-FP8 kernels, not of the cache.)"
    ),
    run=run,
)
