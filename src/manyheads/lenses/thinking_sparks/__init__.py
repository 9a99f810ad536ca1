# SPDX-License-Identifier: Apache-2.0
"""Which heads post-training brought into a model's circuit: edge attribution of two checkpoints, compared.

"Thinking Sparks!: Emergent Attention Heads in Reasoning Models During Post Training". Both models begin to answer the
same questions. For each model its own beginning is the clean prompt and the other's the corrupted one, as long; edge
attribution patching with integrated gradients (:mod:`.attribution`) scores every edge from a head, an MLP or the
embeddings to a later head's q, k or v, a later MLP or the logits; the strongest edges are the circuit, and its heads
are compared (:mod:`.circuit`).

    manyheads inspect --model tuned/ --against smollm2-135m-instruct --lens thinking_sparks:edges=1000
    found = ThinkingSparks(edges=1000).compare(tuned, base, tokenizer, manyheads.use)
    heads = "+".join(row["head"] for row in found.records["emergent heads"][:8])
    manyheads.use(tuned, f"ablate:heads={heads}")  # also by=mean: does it need them?
    manyheads.use(base, f"ablate:heads={heads},by=scale,factor=1.3")

Of one model alone (no ``--against``) the corrupted prompt is another sum with the same beginning of an answer.
Checkpoints to compare are made by ``python -m manyheads.recipes.thinking_sparks``.

Left open by the paper, and done here: the longer beginning is cut to the shorter; circuits that say which heads are in
are by the mean magnitude over the prompts, importances by each prompt's own; the threshold, 0.1 in the paper in units
that it does not give, is a share of the greatest score, and none by default. The paper's experiments take 100 steps,
its text 5 to 8. No official code was found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ...causal_lens import ComparativeLens
from ...data.word_problems import worked_sum
from ...errors import UserError
from ...heads import HeadTable, listed
from ...lens import LensResult, device_of
from .._patching import frozen
from .attribution import Pair, PairRuns
from .circuit import Circuit, HeadChange, attribute, cohorts, compared, effect, strongest

__all__ = [
    "Circuit", "HeadChange", "Pair", "PairRuns", "ThinkingSparks", "attribute", "cohorts", "compared", "effect",
    "opening_pairs", "strongest",
]  # fmt: skip

_SHORTEST = 2  # tokens of an answer


@dataclass(frozen=True, kw_only=True)
class ThinkingSparks(ComparativeLens):
    """The circuit of a model that starts to answer sums, and what it has that another checkpoint has not.

    Attributes:
        prompts: how many sums are asked.
        tokens: of an answer's beginning, at most.
        steps: of the integrated gradients.
        edges: of a circuit, at most.
        threshold: share of the greatest score below which an edge is left out.
        seed: of the sums.
    """

    prompts: int = field(default=8, metadata={"help": "sums that are asked"})
    tokens: int = field(default=16, metadata={"help": "tokens of an answer's beginning, at most"})
    steps: int = field(default=5, metadata={"help": "m of the integrated gradients; 0 for EAP"})
    edges: int = field(default=5000, metadata={"help": "n, edges of a circuit at most"})
    threshold: float = field(default=0.0, metadata={"help": "share of the greatest score that an edge has at least"})
    seed: int = field(default=0, metadata={"help": "of the sums"})

    def __post_init__(self) -> None:
        if min(self.prompts, self.edges) < 1 or self.tokens < _SHORTEST or self.steps < 0 or self.threshold < 0:
            raise UserError("thinking_sparks: prompts and edges are 1 or more, tokens 2, steps and threshold 0")
        if self.layers is not None:
            raise UserError("thinking_sparks: a circuit goes through every layer; leave layers away")

    def locate(self, model: nn.Module, tokenizer: Any, use: Callable[..., Any]) -> LensResult:
        with exact(model) as mine:
            pairs = []
            others = [asked(tokenizer, question) for part in range(1, 5) for question in self._questions(part)]
            for question in self._questions():
                ids, begun = asked(tokenizer, question), opening(mine, tokenizer, question, self.tokens)
                there = next((other for other in others if len(other) == len(ids) and other != ids), None)
                if there is not None and len(begun) >= _SHORTEST:
                    pairs.append(Pair((*ids, *begun), (*there, *begun), len(ids)))
            found = self._attributed(mine, use, pairs)
        table = found.importance()
        return LensResult(
            tables={"importance": table, "worth": found.worth()},
            notes=[f"{_size(found)}. Its most important heads: {listed(table, table.top(5), '.1%')}."],
        )

    def compare(self, model: nn.Module, other: nn.Module, tokenizer: Any, use: Callable[..., Any]) -> LensResult:
        with exact(model) as post, exact(other) as base:
            pairs = opening_pairs(post, base, tokenizer, self._questions(), self.tokens)
            after = self._attributed(post, use, pairs)
            before = self._attributed(base, use, [Pair(p.corrupted, p.clean, p.start) for p in pairs])
        change = compared(before, after)
        tables = {"post": after.importance(), "base": before.importance(), "effect": change.effect}
        outlined = {"heads": list(change.emergent), "what": "in the circuit of the post-trained model alone"}
        tables["post"] = replace(tables["post"], about={**tables["post"].about, "outlined": outlined})
        return LensResult(tables=tables, records=_records(tables, change), notes=_notes(before, after, change, tables))

    def _questions(self, part: int = 0) -> list[str]:
        draws = np.random.default_rng([self.seed, part])
        return [worked_sum([int(n) for n in draws.integers(10, 100, 2)])[0] for _ in range(self.prompts)]

    def _attributed(self, model: nn.Module, use: Callable[..., Any], pairs: Sequence[Pair]) -> Circuit:
        return attribute(model, use, pairs, edges=self.edges, threshold=self.threshold, steps=self.steps)


@contextmanager
def exact(model: nn.Module) -> Iterator[nn.Module]:
    """The model with frozen weights in float32, a copy where it is in less; it is left as it was."""
    made = model
    if next(model.parameters()).dtype.itemsize < 4:
        made = copy.deepcopy(model).float()
    with frozen(made):
        yield made


def asked(tokenizer: Any, question: str) -> list[int]:
    """The tokens of a question that the model answers next, in its chat template where it has one."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        text = f"{tokenizer.bos_token or ''}{question}\n"
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def opening(model: Any, tokenizer: Any, question: str, count: int) -> list[int]:
    """The first tokens, at most ``count``, that a model answers greedily, its end of text among them."""
    ids = torch.tensor([asked(tokenizer, question)], device=device_of(model))
    pad = getattr(model.generation_config, "pad_token_id", None)
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1,
            pad_token_id=pad if pad is not None else 0,
        )  # fmt: skip
    answer: list[int] = made[0, ids.shape[1] :].tolist()
    return answer


def opening_pairs(
    post: nn.Module, base: nn.Module, tokenizer: Any, questions: Sequence[str], tokens: int = 16
) -> list[Pair]:  # fmt: skip
    """For each question the beginning of ``post``'s answer as clean, of ``base``'s as corrupted, cut to the shorter.

    Questions that both begin to answer alike, or with fewer than two tokens, are left out.
    """
    made = []
    for question in questions:
        ids = asked(tokenizer, question)
        both = [opening(model, tokenizer, question, tokens) for model in (post, base)]
        shorter = min(map(len, both))
        clean, corrupted = (answer[:shorter] for answer in both)
        if shorter >= _SHORTEST and clean[:-1] != corrupted[:-1]:
            made.append(Pair((*ids, *clean), (*ids, *corrupted), len(ids)))
    return made


def _records(tables: dict[str, HeadTable], change: HeadChange) -> dict[str, list[dict[str, Any]]]:
    """The heads of each kind with their importances and E."""
    post = tables["post"]
    place = {name: head for head in np.ndindex(post.mean.shape) for name in post.names([head])}

    def row(name: str) -> dict[str, Any]:
        return {"head": name} | {key: float(tables[key].mean[place[name]]) for key in ("base", "post", "effect")}

    kinds = {"emergent": change.emergent, "retained": change.retained, "lost": change.lost}
    return {f"{kind} heads": [row(name) for name in names] for kind, names in kinds.items()}


def _size(found: Circuit) -> str:
    return (
        f"{int(found.kept.sum())} of {int(found.graph.edges.sum())} edges and {len(found.heads)} heads are in the "
        f"circuit of {len(found.losses)} prompts, whose corruption costs {np.mean(found.losses):.2f} nats"
    )


def _notes(before: Circuit, after: Circuit, change: HeadChange, tables: dict[str, HeadTable]) -> list[str]:
    counts = f"{len(change.emergent)} heads are emergent, {len(change.retained)} retained, {len(change.lost)} lost"
    names = ", ".join(change.emergent[:8]) or "none"
    alike = tables["post"].correlation(tables["base"])
    return [
        f"Post-trained: {_size(after)}. Base: {_size(before)}.",
        f"{counts}. Emergent, most important first: {names}.",
        f"Importances of the two models correlate by {alike:.2f} (Spearman).",
    ]
