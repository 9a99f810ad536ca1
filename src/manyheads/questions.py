# SPDX-License-Identifier: Apache-2.0
"""One context, many questions: it is read and compressed once, and each question goes on from a copy of the cache."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import UserError
from .integrations import use
from .integrations.cache import SlotCache, StoreLayer, cache_arguments
from .integrations.transformers import new_cache, prefill
from .lens import device_of, max_positions
from .models.chat import chat_text, system_span
from .spec import parse, split_together
from .strategy import Cache, Strategy

__all__ = ["Answers", "ask", "split"]

_MARK = "\u2060QUESTION\u2060"  # stands where the question will, while the chat template is applied
_MEASURED = 8  # tokens from which the bytes of a whole cache are reckoned


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        questions, answers: in the order asked.
        tokens: of the context, with what the chat template puts around it.
        bytes: of its cache after compression, storages of every layer.
        full_bytes: that the whole cache of so many tokens takes.
        host_bytes: that a strategy which offloads holds in host memory beside ``bytes``.
    """

    questions: list[str]
    answers: list[str]
    tokens: int
    bytes: int
    full_bytes: int
    host_bytes: int = 0


def split(strategies: Sequence[Strategy]) -> tuple[list[Strategy], Cache]:
    """What acts while the model runs, and what says which tokens its cache keeps: ``full`` where none does."""
    keeping = [strategy for strategy in strategies if isinstance(strategy, Cache)]
    if len(keeping) > 1:
        raise UserError(f"{keeping[0].spec} and {keeping[1].spec} cannot hold together: each keeps the cache")
    return [s for s in strategies if not isinstance(s, Cache)], keeping[0] if keeping else cast(Cache, parse("full"))


def ask(
    model: nn.Module,
    tokenizer: Any,
    context: str,
    questions: Sequence[str],
    *,
    strategy: str | Strategy | Sequence[Strategy] = "full",
    max_new_tokens: int = 64,
    chat: bool = True,
    system: str = "",
) -> Answers:
    """Answer questions on one context, which is read and compressed once.

        found = manyheads.ask(model, tokenizer, report, ["Who wrote it?", "When?"], strategy="hedge:budget=0.25")

    All tokens of the context but the last are read and compressed before any question is known; a strategy that scores
    by the last queries scores by those of the context. Every question starts from the same compressed cache, and
    answers do not depend on the order of questions. Decoding is greedy. With a chat template, context and question are
    one message of the user; without one (or with ``chat=False``) the question follows the context after an empty line,
    and the answer begins on a new line.

    Args:
        model: a decoder-only transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        context: what the questions are about.
        questions: at least one.
        strategy: how the cache is kept, what else acts, or both: ``"snapkv:budget=0.5"``, several joined by `` + ``.
        max_new_tokens: most tokens of an answer.
        chat: use the tokenizer's chat template if it has one.
        system: a system message before the context, which ``protect=system`` keeps whole.

    Raises:
        UserError: there is no question, the model has no room for context, question and answer, or it refuses the
            strategy.
    """
    if not questions or not context.strip():
        raise UserError("give a context that is not empty, and at least one question")
    given = [parse(s) for s in split_together(strategy)] if isinstance(strategy, str) else strategy
    acting, keeping = split([given] if isinstance(given, Strategy) else list(given))
    before, after, span = _around(tokenizer, context, chat, system, keeping.protects_system)
    device = device_of(model)
    read = _encode(tokenizer, before, special=not chat or not _template(tokenizer)).to(device)
    asked = [_encode(tokenizer, f"{question}{after}", special=False).to(device) for question in questions]
    _check_room(model, read.shape[1], max(ids.shape[1] for ids in asked), max_new_tokens)
    with torch.inference_mode(), use(model, *acting):
        cache = new_cache(model, keeping.with_system(span))
        prefill(model, read, cache, chunk=read.shape[1])
        held, whole, host = cache.bytes(), _whole(model, read), cache.host_bytes()
        answers = [_answer(model, tokenizer, copy.deepcopy(cache), read, ids, max_new_tokens) for ids in asked]
    return Answers(list(questions), answers, read.shape[1], held, whole, host)


def _template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _around(
    tokenizer: Any, context: str, chat: bool, system: str, find: bool
) -> tuple[str, str, tuple[int, int] | None]:
    """The text before a question, the text behind it, and the tokens of the system message if asked for."""
    if not chat or not _template(tokenizer):
        if system:
            raise UserError("a system message needs a chat template: give a chat model, or leave it away")
        return f"{context}\n\n", "\n", None
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{context}\n\n{_MARK}"})
    text = chat_text(tokenizer, messages)
    before, mark, after = text.rpartition(_MARK)
    if not mark:
        raise UserError("the chat template changes what the user says; give chat=False")
    return before, after, system_span(tokenizer, messages) if find else None


def _encode(tokenizer: Any, text: str, special: bool) -> Tensor:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
    return torch.tensor([ids])


def _check_room(model: nn.Module, context: int, question: int, answer: int) -> None:
    room = max_positions(model.config)
    if room and context + question + answer > room:
        raise UserError(
            f"the model has {room:,} positions, and context ({context:,} tokens), question ({question:,}) and answer "
            f"({answer:,}) need more: give a shorter context"
        )


def _answer(
    model: Any, tokenizer: Any, cache: SlotCache, read: Tensor, question: Tensor, max_new_tokens: int
) -> str:  # fmt: skip
    """The greedy answer to a question that follows what ``cache``, which is used up, has read."""
    ids = torch.cat([read, question], 1)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad,
        **cache_arguments(model, cache),
    )  # fmt: skip
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _whole(model: nn.Module, ids: Tensor) -> int:
    """Bytes of the whole cache of ``ids``: those of its first tokens, as many times as a layer keeps so many."""
    cache = new_cache(model, parse("full"))
    prefill(model, ids[:, : _MEASURED + 1], cache)
    few = int(cache.get_seq_length())
    layers = [layer for layer in cache.layers if isinstance(layer, StoreLayer)]
    states = cache.bytes() - sum(layer.store.nbytes() for layer in layers)
    tokens = [min(ids.shape[1] - 1, (layer.site.window or math.inf) - 1) for layer in layers]
    return states + sum(int(each.store.nbytes() * n / few) for each, n in zip(layers, tokens, strict=True))
