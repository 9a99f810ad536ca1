# SPDX-License-Identifier: Apache-2.0
"""Answers of a language model, judged, with what tells of each whether it is made up.

The model answers greedily; one forward over prompt and answer then gives, for every token of the answer, the entropy
and the log-probability from the logits, and the attention of every head from the lens ``hallucination_risk``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.known_answers import Question, right
from ..errors import UserError
from ..lens import TokenSpans, device_of
from ..models.chat import chats
from ..tasks.lenses._chat import greedy, rendered
from . import watch

__all__ = ["Answer", "Judge", "read_answers"]

Judge = Callable[[Question, str], bool]
_WIDEST = 16  # answers made at once
_FORWARD = 256  # answers looked at before what was seen is put together


@dataclass(frozen=True)
class Answer:
    """An answer and what was seen of it.

    Attributes:
        question: what was asked.
        text: of the answer as it was judged, behind the question's opening.
        tokens: the same, token by token.
        right: what the judge says.
        entropy: ``[R]`` of the prediction of each token, nats.
        logprob: ``[R]`` of each token, nats.
        mass, lookback: ``[R]`` means over layers and heads.
        heads: ``[2, L, H]`` source mass and lookback ratio of each head, means over the answer.
    """

    question: Question
    text: str
    tokens: list[str]
    right: bool
    entropy: Any
    logprob: Any
    mass: Any
    lookback: Any
    heads: Any

    @property
    def confidence(self) -> float:
        """Probability of the whole answer."""
        return float(np.exp(self.logprob.sum()))


def read_answers(
    model: Any, tokenizer: Any, questions: Sequence[Question], judge: Judge = right, *, tokens: int = 8,
    say: Callable[[float], None] = lambda done: None,
) -> list[Answer]:  # fmt: skip
    """Ask ``questions`` and look at the answers.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer, which tells where tokens stand in a text.
        questions: in a chat template where the tokenizer has one.
        judge: whether an answer, without its opening, is right.
        tokens: of an answer, at most.
        say: is told how many questions are done; one that is answered and not looked at yet counts half.

    Raises:
        UserError: the tokenizer does not tell where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("this tokenizer does not tell where its tokens stand in a text; take a fast one")
    prompts = [_prompt(tokenizer, question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))  # alike in length, so little is padding
    said: dict[int, list[int]] = {}
    for start in range(0, len(order), _WIDEST):
        some = order[start : start + _WIDEST]
        made = greedy(model, tokenizer, [prompts[i][0] for i in some], tokens)
        said |= {i: _cut(tokenizer, ids, questions[i].words) for i, ids in zip(some, made, strict=True)}
        say(len(said) / 2)
    told = [i for i in range(len(questions)) if said[i]]
    found: list[Answer] = []
    for start in range(0, len(told), _FORWARD):
        some = told[start : start + _FORWARD]
        rows = [(questions[i], *prompts[i], said[i]) for i in some]
        for answer in _looked_at(model, tokenizer, rows, judge):
            found.append(answer)
            say((len(questions) + len(found)) / 2)
    say(float(len(questions)))
    return found


def _prompt(tokenizer: Any, question: Question) -> tuple[list[int], tuple[int, int]]:
    """Tokens of the prompt, and where its source stands."""
    text = rendered(tokenizer, [{"role": "user", "content": question.text}])
    source = question.source or question.text
    opening = question.opening if chats(tokenizer) or not question.opening else f" {question.opening}"
    coded = tokenizer(text + opening, add_special_tokens=False, return_offsets_mapping=True)
    first = text.find(source.strip())
    places = [
        i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < first + len(source.strip()) and b > max(a, first)
    ]
    if first < 0 or not places:
        raise UserError(f"the chat template does not write the source {source[:40]!r} as it stands")
    return list(coded["input_ids"]), (places[0], places[-1] + 1)


def _cut(tokenizer: Any, ids: list[int], words: int) -> list[int]:
    """The tokens before the one that ends word number ``words``; all where that is 0, at least one if any."""
    if not words:
        return ids
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop]).lstrip()
        if len((text + "x").split()) > words and text:
            return ids[: max(1, stop - 1)]
    return ids


@torch.no_grad()
def _looked_at(model: Any, tokenizer: Any, rows: Sequence[Any], judge: Judge) -> Iterator[Answer]:
    """One forward for each of ``rows``: question, prompt, span of the source, answer."""
    device, kept = device_of(model), []
    with watch(model, "hallucination_risk") as seen:
        for _, prompt, source, answer in rows:
            end = len(prompt) + len(answer)
            seen.roles = TokenSpans({"source": [[source]], "response": [[(len(prompt), end)]]})
            ids = torch.tensor([[*prompt, *answer]], device=device)
            logits = model(ids[:, :-1], logits_to_keep=len(answer), use_cache=False).logits[0, -len(answer) :].float()
            logs = logits.log_softmax(-1)
            chosen = logs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            kept.append((-(logs.exp() * logs.clamp(min=-1e4)).sum(-1).cpu().numpy(), chosen.cpu().numpy()))
    found = seen.compute()
    heads = np.stack([found.tables[name].values for name in ("source mass", "lookback")], 1)  # [N, 2, L, H]
    for i, ((question, prompt, _, answer), (entropy, logprob)) in enumerate(zip(rows, kept, strict=True)):
        rows_of = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        mass, lookback = (found.series[name][i][rows_of] for name in ("source mass", "lookback"))
        text = tokenizer.decode(answer)
        yield Answer(
            question, text, [tokenizer.decode([t]) for t in answer], judge(question, text), entropy, logprob, mass,
            lookback, heads[i],
        )  # fmt: skip
