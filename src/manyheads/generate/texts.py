# SPDX-License-Identifier: Apache-2.0
"""Replies to the same prompts under several strategies: what each says, what it holds, and how long it took once."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from ..environment import environment
from ..errors import UserError
from ..integrations import use
from ..integrations.decoding import end_tokens, greedy
from ..integrations.transformers import new_cache, prefill
from ..models.chat import chat_text, chats, system_span
from ..spec import parse
from ..strategy import Cache

if TYPE_CHECKING:
    from ..experiment.arms import Arm
    from ..progress import Progress

__all__ = ["Reply", "differs", "facts", "pieces", "read", "run"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What an arm replied to a prompt.

    Attributes:
        arm: which.
        prompt: as it was given.
        text: of the reply.
        tokens: of it, how many.
        read: tokens of the prompt, template included.
        held: bytes of the cache when the prompt is read.
        at_end: bytes when the reply is written.
        reading, writing: seconds, measured once.
    """

    arm: str
    prompt: str
    text: str
    tokens: int
    read: int
    held: int
    at_end: int
    reading: float
    writing: float


def pieces(text: str) -> list[str]:
    """Words of ``text``, each with the space behind it, the first with that before it too; joined they are the text."""
    return re.findall(r"^\s*\S+\s*|\S+\s*", text) or [text]


def differs(text: str, base: str) -> int | None:
    """Number of the first word, from 0, in which ``text`` is not ``base``; None where all words are the same."""
    one, two = text.split(), base.split()
    for i, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return i
    return None if len(one) == len(two) else min(len(one), len(two))


def read(tokenizer: Any, prompt: str, chat: bool | None, system: str = "") -> list[int]:
    """Tokens of a prompt: in the chat template if there is one, or as it stands.

    Args:
        tokenizer: of the model.
        prompt: what the user says.
        chat: write it in the template; None for where there is one.
        system: a system message before it.

    Raises:
        UserError: a template is asked for and there is none, or there is too little to read.
    """
    if chat and not chats(tokenizer):
        raise UserError("the tokenizer has no chat template; leave --chat away")
    written = chats(tokenizer) if chat is None else chat
    if system and not written:
        raise UserError("--system writes a message in the chat template; give a chat model, or leave it away")
    text = chat_text(tokenizer, _messages(prompt, system)) if written else prompt
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not written)
    if len(ids) < 2:
        raise UserError(f"the prompt {prompt!r} has {len(ids)} token(s), and 2 are the least; say more")
    return ids


def _messages(prompt: str, system: str) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]


def run(
    model: Any, tokenizer: Any, arms: Sequence[Arm], prompts: Sequence[str], *, max_new_tokens: int,
    chat: bool | None, progress: Progress, system: str = "",
) -> list[list[Reply]]:  # fmt: skip
    """Reply to every prompt under every arm, greedily.

    A short forward that is not timed goes before, so that the first arm does not pay for what is done once; on a GPU a
    short reply of every arm, for which kernels are loaded and compiled.

    Returns:
        For each prompt the replies of the arms, in their order.

    Raises:
        UserError: a prompt or an arm does not fit the model.
    """
    given = [read(tokenizer, prompt, chat, system) for prompt in prompts]
    find = any(s.protects_system for arm in arms for s in arm.strategies if isinstance(s, Cache))
    most = int(getattr(model.config, "max_position_embeddings", 0) or 2**40)
    if (longest := max(map(len, given)) + max_new_tokens) > most:
        raise UserError(
            f"the model reads {most} tokens, and prompt and reply have up to {longest}: shorten one of them"
        )
    total, done = len(arms) * len(prompts), 0
    progress(0, total, "warming up")
    ends = end_tokens(model, tokenizer)
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(input_ids=torch.tensor([given[0][:2]], device=device))
    found: list[list[Reply]] = []
    for prompt, ids in zip(prompts, given, strict=True):
        replies = []
        span = system_span(tokenizer, _messages(prompt, system)) if find else None
        for arm in arms:
            if device.type == "cuda" and not found:
                _reply(model, tokenizer, arm, prompt, ids, min(2, max_new_tokens), ends, span)
            replies.append(_reply(model, tokenizer, arm, prompt, ids, max_new_tokens, ends, span))
            done += 1
            progress(done, total, arm.key)
        found.append(replies)
    return found


def _reply(
    model: Any, tokenizer: Any, arm: Arm, prompt: str, ids: list[int], most: int, ends: frozenset[int],
    span: tuple[int, int] | None,
) -> Reply:  # fmt: skip
    caches = [strategy for strategy in arm.strategies if isinstance(strategy, Cache)]
    keeping = caches[0] if caches else cast(Cache, parse("full"))
    acting = [strategy for strategy in arm.strategies if not isinstance(strategy, Cache)]
    device = next(model.parameters()).device
    whole = torch.tensor([ids], device=device)
    with ExitStack() as stack:
        stack.enter_context(use(model, *acting))
        cache = new_cache(model, keeping.with_system(span))
        started = _now(device)
        prefill(model, whole, cache)
        between = _now(device)
        held = cache.bytes()
        resumed = _now(device)
        made = greedy(model, cache, whole[:, -1:], most, ends=ends)
        ended = _now(device)
    return Reply(
        arm=arm.key, prompt=prompt, text=str(tokenizer.decode(made, skip_special_tokens=True)), tokens=len(made),
        read=len(ids), held=held, at_end=cache.bytes(), reading=between - started, writing=ended - resumed,
    )  # fmt: skip


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def facts(replies: Sequence[Sequence[Reply]], model: Any) -> dict[str, Any]:
    """What every arm replied and cost, of JSON's types; the first arm is what the others are compared with.

    ``differs_at`` is the first word, from 0, that is another than the first arm's; None where all are the same.
    ``held_ratio`` is of the bytes of the first arm when the prompt is read.
    """
    return {
        "model_class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "timing": "one measurement in this order: no benchmark",
        "prompts": [
            {
                "prompt": each[0].prompt, "prompt_tokens": each[0].read,
                "replies": [
                    {
                        "arm": reply.arm, "text": reply.text, "tokens": reply.tokens, "held_bytes": reply.held,
                        "held_ratio": reply.held / each[0].held, "end_bytes": reply.at_end,
                        "prompt_seconds": reply.reading, "reply_seconds": reply.writing,
                        "differs_at": differs(reply.text, each[0].text),
                    }
                    for reply in each
                ],
            }
            for each in replies
        ],
        "environment": environment(),
    }  # fmt: skip
