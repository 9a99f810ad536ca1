# SPDX-License-Identifier: Apache-2.0
"""Replies to the same prompts under several strategies: what each says, what it holds, and how long it took once."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from ..environment import environment
from ..errors import UserError
from ..experiment.arms import Arm
from ..inspect import watch
from ..inspect.document import document_of
from ..integrations import use
from ..integrations.decoding import end_tokens, greedy, write
from ..integrations.masked_diffusion import mask_token
from ..integrations.transformers import new_cache, prefill
from ..lens import Lens, TokenSpans, device_of, max_positions
from ..models.chat import chat_text, chats, system_span
from ..questions import split
from ..spec import parse, split_together
from ..strategy import Cache, Strategy
from ..writing import BatchedLoop, Decoding, DecodingLoop, Request, Written
from . import pictures

if TYPE_CHECKING:
    from ..lens import LensResult
    from ..progress import Progress

__all__ = ["Reply", "differs", "facts", "looking", "pieces", "read", "reply", "run"]


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
        reading, writing: seconds, measured once; with lenses theirs among them.
        seed: of what was drawn; None where nothing is.
        forwards: of the model while the reply was written, one after the other.
        notes: other figures that the strategy has to tell.
        found: what lenses saw in it, by their specs.
        words: the text of every token that was read or written, where lenses looked.
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
    seed: int | None = None
    forwards: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    found: dict[str, LensResult] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def looking(texts: Sequence[str]) -> list[Lens]:
    """The lenses of ``--lens``, comma-separated specs or short names.

    Raises:
        UserError: one of them asks prompts of its own, acts on the model, or looks at a role that no reply has.
    """
    from ..inspect.naming import check_roles, parse_lenses

    lenses, roles = parse_lenses(texts)
    if roles:
        raise UserError(f"a reply has the roles prompt, system and response: leave {next(iter(roles))}= away")
    looking = [lens for lens in lenses if isinstance(lens, Lens) and not lens.edits_model]
    if len(looking) < len(lenses):
        other = next(lens for lens in lenses if lens not in looking)
        raise UserError(f"{other.spec} does not only look on: it is for `manyheads inspect`, or a --strategy")
    check_roles(looking, ("prompt", "system"))
    return looking


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
    chat: bool | None, progress: Progress, system: str = "", seeds: Sequence[int] = (0,),
    lenses: Sequence[Lens] = (), image: Any = None,
) -> list[list[Reply]]:  # fmt: skip
    """Reply to every prompt under every arm, with the likeliest token unless a strategy of the arm chooses others.

    A masked diffusion language model fills blocks of masks, as ``block_diffusion`` does, where an arm chooses nothing.

    A short forward that is not timed goes before, so that the first arm does not pay for what is done once; on a GPU a
    short reply of every arm, for which kernels are loaded and compiled.

    Args:
        model, tokenizer: a causal language model; with an image one that reads it, and its processor.
        arms: what replies.
        prompts: at least one.
        max_new_tokens: of a reply, at most.
        chat: write prompts in the template; None for where there is one.
        progress: told after each reply.
        system: a system message before every prompt.
        seeds: a reply of every arm for each; arms that draw nothing reply once, and the same for all.
        lenses: that look on.
        image: what every prompt is about, as the processor takes it.

    Returns:
        For each prompt and each seed the replies of the arms, in their order.

    Raises:
        UserError: a prompt or an arm does not fit the model.
    """
    if image is None:
        given = [(read(tokenizer, prompt, chat, system), dict[str, Any]()) for prompt in prompts]
    else:
        given = [pictures.read(model, tokenizer, prompt, image, chat, system) for prompt in prompts]
        tokenizer = tokenizer.tokenizer
    find = image is None and (
        bool(system and lenses)
        or any(s.protects_system for arm in arms for s in arm.strategies if isinstance(s, Cache))
    )
    most = max_positions(model.config) or 2**40
    if (longest := max(len(ids) for ids, _ in given) + max_new_tokens) > most:
        raise UserError(
            f"the model reads {most} tokens, and prompt and reply have up to {longest}: shorten one of them"
        )
    total, done = len(arms) * len(prompts) * len(seeds), 0
    progress(0, total, "warming up")
    ends = end_tokens(model, tokenizer)
    device = device_of(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([given[0][0][-2:]], device=device))
    found: list[list[Reply]] = []
    for prompt, (ids, more) in zip(prompts, given, strict=True):
        span = system_span(tokenizer, _messages(prompt, system)) if find else None
        there = torch.tensor([ids], device=device)
        request = Request(model, tokenizer, there, max_new_tokens, ends, seeds[0], given=more)
        if device.type == "cuda" and not found:
            for arm in arms:
                _reply(replace(request, most=min(2, max_new_tokens)), arm, prompt, span)
        first: list[Reply] = []
        for seed in seeds:
            replies = []
            for i, arm in enumerate(arms):
                draws = any(isinstance(strategy, Decoding) for strategy in arm.strategies)
                again = first and not draws
                replies.append(first[i] if again else _reply(replace(request, seed=seed), arm, prompt, span, lenses))
                done += 1
                progress(done, total, arm.key)
            first = first or replies
            found.append(replies)
    return found


def reply(
    model: Any, tokenizer: Any, prompt: str, strategies: str | Strategy | Sequence[Strategy] = "full", *,
    max_new_tokens: int = 64, seed: int = 0, chat: bool | None = None, system: str = "", image: Any = None,
) -> str:  # fmt: skip
    """The reply of a language model to a prompt, with strategies.

        manyheads.reply(model, tokenizer, "Who wrote Hamlet?", "snapkv:budget=0.5")
        manyheads.reply(model, processor, "What is in the picture?", "conscious_gaze", image=picture)

    Args:
        model: a decoder-only transformers model, in evaluation mode; with an image one as LLaVA.
        tokenizer: its tokenizer; with an image its processor.
        prompt: what the user says.
        strategies: what acts, several as a list or joined by `` + ``; one at most that chooses what is written.
        max_new_tokens: of the reply, at most.
        seed: of what is drawn.
        chat: write the prompt in the chat template; None for where there is one.
        system: a system message before it.
        image: what the prompt is about, as the processor takes it: an image of Pillow, or an array.

    Raises:
        UserError: prompt or strategies do not fit the model.
    """
    given = [parse(s) for s in split_together(strategies)] if isinstance(strategies, str) else strategies
    arm = Arm("reply", " + ".join(s.spec for s in ([given] if isinstance(given, Strategy) else given)))
    told = run(
        model, tokenizer, [arm], [prompt], max_new_tokens=max_new_tokens, chat=chat, progress=lambda *_: None,
        system=system, seeds=[seed], image=image,
    )  # fmt: skip
    return told[0][0].text


def _reply(
    request: Request, arm: Arm, prompt: str, span: tuple[int, int] | None, lenses: Sequence[Lens] = ()
) -> Reply:  # fmt: skip
    acting, keeping = split(arm.strategies)
    choosing = [strategy for strategy in acting if isinstance(strategy, Decoding)]
    if len(choosing) > 1:
        raise UserError(f"{choosing[0].spec} and {choosing[1].spec} cannot hold together: each chooses what is written")
    model, ids, device = request.model, request.ids, request.ids.device
    if not choosing and mask_token(model.config) is not None:
        choosing = [cast(Decoding, parse("block_diffusion"))]
    cached = not (choosing and isinstance(choosing[0], DecodingLoop) and not choosing[0].reads_cache)
    if lenses and (wide := [s for s in choosing if isinstance(s, BatchedLoop)]):
        raise UserError(
            f"{wide[0].spec} writes several texts side by side, and {lenses[0].spec} looks at one: leave it"
        )
    if not cached and (keeping.slug != "full" or lenses):
        beside = f"{keeping.spec} keeps" if keeping.slug != "full" else f"{lenses[0].spec} sees"
        raise UserError(f"{choosing[0].spec} writes without a cache, reading all anew: {beside} nothing beside it")
    spoken = {"prompt": [[(0, ids.shape[1])]], **({} if span is None else {"system": [[span]]})}
    with ExitStack() as stack:
        stack.enter_context(use(model, *(s for s in acting if s not in choosing)))
        seen = stack.enter_context(watch(model, *lenses, roles=TokenSpans(spoken))) if lenses else None
        cache = new_cache(model, keeping.with_system(span)) if cached else None
        started = _now(device)
        if cache is not None:
            prefill(model, ids, cache, given=request.given)
        between = _now(device)
        held = 0 if cache is None else cache.bytes()
        resumed = _now(device)
        if choosing:
            made = write(choosing[0], replace(request, cache=cache))
        else:
            tokens = greedy(model, cache, ids[:, -1:], request.most, ends=request.ends)
            made = Written(tokens, min(len(tokens) + 1, request.most))
        if seen is not None:
            seen.settle()
        ended = _now(device)
    found = {} if seen is None else {lens.spec: seen.compute(lens) for lens in lenses}
    return Reply(
        arm=arm.key, prompt=prompt, text=str(request.tokenizer.decode(made.tokens, skip_special_tokens=True)),
        tokens=len(made.tokens), read=ids.shape[1], held=held, at_end=_end(cache, made),
        reading=between - started, writing=ended - resumed, seed=request.seed if choosing else None,
        forwards=made.forwards, notes=made.notes, found=found,
        words=[request.tokenizer.decode([i]) for i in (*ids[0].tolist(), *made.tokens)] if lenses else [],
    )  # fmt: skip


def _end(cache: Any, made: Written) -> int:
    """Bytes that a reply held at its end."""
    if made.held is not None:
        return made.held
    return 0 if cache is None else int(cache.bytes())


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
                        "held_ratio": reply.held / each[0].held if each[0].held else 1.0, "end_bytes": reply.at_end,
                        "prompt_seconds": reply.reading, "reply_seconds": reply.writing,
                        "differs_at": differs(reply.text, each[0].text), "seed": reply.seed,
                        "forwards": reply.forwards, "notes": reply.notes,
                        **({"words": reply.words} if reply.words else {}),
                        **({"lenses": {k: document_of(v) for k, v in reply.found.items()}} if reply.found else {}),
                    }
                    for reply in each
                ],
            }
            for each in replies
        ],
        "environment": environment(),
    }  # fmt: skip
