# SPDX-License-Identifier: Apache-2.0
"""What a finished model can do with its context, measured on the standard library, which it never saw."""

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from manyheads.recipes._corpus import standard_library
from manyheads.recipes._planted import Ids, Planter

TARGET = 256  # tokens that every context is judged on
_NOT_PROSE = {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "idlelib", "distutils"}


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    length: int  # tokens of context, the judged ones included
    value: float
    error: float  # standard error
    n: int  # independent samples: files for losses, questions for recall
    unit: str


def stdlib_tokens(tokenizer: Tokenizer, least: int, files: int | None = None) -> dict[str, Ids]:
    """Return {module file: its tokens} for the standard-library files of at least ``least`` tokens, tests left out."""
    found: dict[str, Ids] = {}
    for path in standard_library():
        if _NOT_PROSE.intersection(path.parts) or path.stat().st_size < 2 * least:
            continue
        ids = np.array(tokenizer.encode(path.read_text("utf-8", errors="replace")).ids, np.int32)
        if len(ids) >= least:
            found["/".join(path.parts[-2:])] = ids
            if len(found) == files:
                break
    return found


def _batches(rows: Sequence[Ids], tokens: int) -> Iterable[Tensor]:
    size = max(1, tokens // len(rows[0]))
    for i in range(0, len(rows), size):
        yield torch.from_numpy(np.stack(rows[i : i + size]).astype(np.int64))


@torch.inference_mode()
def losses(model: PreTrainedModel, rows: Sequence[Ids], judged: int, batch_tokens: int = 32_768) -> Tensor:
    """Negative log-likelihoods (nats, float32, on the CPU) [rows, judged] of the last tokens of rows of one length."""
    out = []
    for x in _batches(rows, batch_tokens):
        ids = x.to(model.device)
        logits = model(input_ids=ids, logits_to_keep=judged + 1, use_cache=False).logits[:, :-1].float()
        out.append(F.cross_entropy(logits.transpose(1, 2), ids[:, -judged:], reduction="none").cpu())
    return torch.cat(out)


def context_curve(
    model: PreTrainedModel, files: dict[str, Ids], contexts: Sequence[int], windows: int, rng: Generator
) -> list[Figure]:
    """Loss on the same TARGET tokens with more and more of the file before them, and the gain of each doubling.

    ``windows`` windows are drawn from each file, which must hold max(contexts) tokens. The standard error is that of
    the mean over files. The gains are paired: loss at one context less the loss at the next longer one.
    """
    longest = max(contexts)
    spans = [ids[e - longest : e] for ids in files.values() for e in rng.integers(longest, len(ids) + 1, windows)]
    by_context = {}
    for context in sorted(contexts):
        nll = losses(model, [span[-context:] for span in spans], min(TARGET, context - 1))
        by_context[context] = nll.mean(1).reshape(len(files), windows).mean(1).numpy()  # [files]

    def figure(name: str, length: int, per_file: Any, unit: str = "nats/token") -> Figure:
        spread = per_file.std(ddof=1) / math.sqrt(len(per_file)) if len(per_file) > 1 else math.nan
        return Figure(name, length, float(per_file.mean()), float(spread), len(per_file), unit)

    curve = [figure("loss", context, values) for context, values in by_context.items()]
    steps = list(by_context.items())
    gains = [figure("gain over half the context", c, a - b) for (_, a), (c, b) in pairwise(steps)]
    return curve + gains


@torch.inference_mode()
def recall(
    model: PreTrainedModel, planter: Planter, files: dict[str, Ids], length: int, kind: str, n: int, rng: Generator
) -> Figure:
    """Share of ``n`` questions (see ``Planter.question``) of whose answer every token is the model's first choice."""
    stream = np.concatenate(list(files.values()))

    def take(size: int) -> Ids:
        start = rng.integers(0, len(stream) - size)
        return stream[start : start + size]

    rows, answers = zip(*(planter.question(take, length, kind, rng) for _ in range(n)), strict=True)
    judged, right = max(answers), []
    beyond = torch.arange(judged, 0, -1) > torch.tensor(answers)[:, None]  # [n, judged]: before the answer
    for x in _batches(rows, 32_768):
        ids = x.to(model.device)
        best = model(input_ids=ids, logits_to_keep=judged + 1, use_cache=False).logits[:, :-1].argmax(-1)
        right.append((best == ids[:, -judged:]).cpu())
    share = float((torch.cat(right) | beyond).all(1).float().mean())
    return Figure(f"recall: {kind}", length, share, math.sqrt(share * (1 - share) / n), n, "share")


def evaluate(
    model: PreTrainedModel, tokenizer: Tokenizer, words: Sequence[str], seed: int, quick: bool = False
) -> dict[str, Any]:
    """Return all figures as rows, with what they were measured on. ``words`` name the planted constants."""
    contexts = (32, 64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192)
    files = stdlib_tokens(tokenizer, max(contexts), 4 if quick else None)
    rng = np.random.default_rng(seed)
    rows = context_curve(model, files, contexts, 1 if quick else 4, rng)
    planter = Planter.build(tokenizer, words, seed, 200 if quick else 5_000)
    lengths, n = ((128,), 4) if quick else ((512, 1024, 2048, 4096, 8192), 200)
    for kind in ("one", "several", "chained", "reversed"):
        rows += [recall(model, planter, files, length, kind, n, rng) for length in lengths]
    pieces = np.concatenate(list(files.values()))
    widths = {
        i: len(token) for token, i in tokenizer.get_vocab().items()
    }  # a character of a byte-level token is a byte
    return {
        "figures": [asdict(row) for row in rows],
        "files": len(files),
        "bytes_per_token": sum(map(widths.__getitem__, pieces.tolist())) / len(pieces),
        "python": platform.python_version(),
    }
