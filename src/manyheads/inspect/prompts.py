# SPDX-License-Identifier: Apache-2.0
"""Prompts to look at: windows of text, beginnings of texts with named parts, or a chat; each with its roles."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.texts import Text
from ..errors import UserError
from ..lens import Span, TokenSpans, device_of
from ..models.chat import chat_text, chats
from ..tasks.text._corpus import Corpus
from .naming import Part

__all__ = ["LENGTH", "SHORTEST", "Prompt", "chat", "draw", "read_chat"]

LENGTH, SHORTEST = 1024, 8  # tokens


@dataclass(frozen=True)
class Prompt:
    """Tokens that are read at once.

    Attributes:
        ids: token ids.
        name: of the text they come from.
        roles: spans of token positions by role.
    """

    ids: list[int]
    name: str
    roles: dict[str, list[Span]] = field(default_factory=dict)

    @property
    def parts(self) -> TokenSpans:
        """The roles as a lens takes them."""
        return TokenSpans({name: [spans] for name, spans in self.roles.items()})

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model is called with, on its device: ids ``[1, T]``."""
        return {"input_ids": torch.tensor([self.ids], device=device_of(model))}

    def answered(self, ids: Sequence[int]) -> "Prompt":
        """This prompt with what the model said to it, which has the role ``response``."""
        span = (len(self.ids), len(self.ids) + len(ids))
        return Prompt([*self.ids, *ids], self.name, {**self.roles, "response": [span]})


def draw(
    texts: Sequence[Text], tokenizer: Any, length: int | None, samples: int, seed: int,
    roles: Mapping[str, Part] | None = None, max_context: int = 2**40, closed: bool = False,
) -> list[Prompt]:  # fmt: skip
    """Up to ``samples`` prompts of ``length`` tokens.

    Without roles they are windows from anywhere in the texts. With roles, whose positions count from the beginning of
    a text, they are the beginnings of the texts, in their order, and may be shorter.

    Args:
        texts: what to read.
        tokenizer: of the model.
        length: tokens; 1,024 as far as model and texts have so many when None.
        samples: how many.
        seed: of the draw.
        roles: spans of token positions, or text that is to be found.
        max_context: tokens that the model reads at most.
        closed: end windows too as the tokenizer ends a text, which encoders have learned.

    Raises:
        UserError: the text is too short, or a role is not where it is said to be.
    """
    if length is not None and length > max_context:
        raise UserError(f"the model reads {max_context} tokens; --length {length} is too long")
    _check_known(texts, tokenizer)
    size = min(length or LENGTH, max_context)
    if roles:
        return _beginnings(texts, tokenizer, size, samples, roles)
    start, end = _around(tokenizer) if closed else (_start(tokenizer), [])
    corpus, most = Corpus(texts, tokenizer), size - len(start) - len(end)
    if length is None and sum(len(text.content) for text in texts) < 64 * size:  # may be too short for the default
        most = min(most, sum(len(_encode(tokenizer, text.content)[0]) for text in texts) - len(start) - len(end))
    if most < SHORTEST:
        raise UserError(f"the text is too short: a prompt needs {SHORTEST} tokens or more; give more text")
    rng = np.random.default_rng(seed)
    try:
        windows = corpus.windows(most, samples, rng)
    except UserError as error:
        raise UserError(str(error).replace("--lengths", "--length").replace("contexts", "prompts")) from None
    kept = [w for i, w in enumerate(windows) if i == 0 or not w.overlaps]  # the same tokens twice are no sample
    return [Prompt([*start, *(int(i) for i in window.ids), *end], window.text) for window in kept]


def _check_known(texts: Sequence[Text], tokenizer: Any) -> None:
    """Raise UserError where the tokenizer knows hardly a piece of a text: it is not the model's own."""
    unknown: Any = getattr(tokenizer, "unk_token_id", None)
    ids = _encode(tokenizer, texts[0].content[:2000], special=False)[0] if texts and unknown is not None else []
    if ids and 2 * ids.count(unknown) > len(ids):
        raise UserError(
            f"the tokenizer knows {len(ids) - ids.count(unknown)} of the first {len(ids)} tokens of {texts[0].name}: "
            "give text of its kind, or put the tokenizer.json that the model was trained with beside the weights"
        )


def _start(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts before a text."""
    begin = getattr(tokenizer, "bos_token_id", None)
    return [begin] if begin is not None and tokenizer.encode("x")[:1] == [begin] else []


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and behind a text."""
    plain, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def _encode(tokenizer: Any, text: str, special: bool = True) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids, and which characters each stands for, where the tokenizer says so."""
    with_places = bool(getattr(tokenizer, "is_fast", False))
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=with_places, verbose=False)
    return list(made["input_ids"]), [tuple(p) for p in made["offset_mapping"]] if with_places else None


def _beginnings(
    texts: Sequence[Text], tokenizer: Any, size: int, samples: int, roles: Mapping[str, Part]
) -> list[Prompt]:
    prompts: list[Prompt] = []
    wanted = [part for part in roles.values() if isinstance(part, str)]
    holding = [text for text in texts if all(part in text.content for part in wanted)]
    if not holding:
        missing = next(p for p in wanted if not any(p in t.content for t in texts)) if wanted else ""
        raise UserError(f"no text holds {_short(missing)}; a role is given as it stands in the text, or as START-END")
    for text in holding:
        if len(prompts) == samples:
            break
        content = text.content[: max(20_000, 16 * size)]
        ids, places = _encode(tokenizer, content)
        ids = ids[:size]
        spans = {
            name: [_place(part, content, places, len(ids), name)] if isinstance(part, str) else part
            for name, part in roles.items()
        }
        for name, given in spans.items():
            if given[-1][1] > len(ids) and not prompts:
                raise UserError(
                    f"role {name}: {text.name} gives a prompt of {len(ids)} tokens, and the span ends at "
                    f"{given[-1][1]}; name tokens from 0 to {len(ids)}, or raise --length"
                )
        if len(ids) >= SHORTEST and all(given[-1][1] <= len(ids) for given in spans.values()):
            prompts.append(Prompt(ids, text.name, spans))
    if not prompts:
        raise UserError(f"the text is too short: a prompt needs {SHORTEST} tokens or more; give more text")
    return prompts


def _place(part: str, content: str, places: list[tuple[int, int]] | None, size: int, name: str) -> Span:
    """Tokens of the first time that ``part`` stands in the text."""
    at = content.find(part)
    if at < 0:
        raise UserError(f"role {name}: {_short(part)} stands far behind the prompt; give a text that begins with it")
    span = _tokens(places, at, at + len(part))
    if span[1] > size:
        raise UserError(
            f"role {name}: {_short(part)} ends at token {span[1]}, and the prompt has {size}; raise --length"
        )
    return span


def _tokens(places: list[tuple[int, int]] | None, start: int, end: int) -> Span:
    """The tokens that hold any of the characters from ``start`` to ``end``."""
    if places is None:
        raise UserError("this tokenizer does not say where its tokens stand; give roles as START-END")
    inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
    if not inside:
        raise UserError("a role holds no token; name a longer piece of the text")
    return inside[0], inside[-1] + 1


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def read_chat(path: Path) -> list[dict[str, str]]:
    """Messages ``[{"role": "system", "content": "..."}, ...]`` from a JSON file.

    Raises:
        UserError: no such file, or other JSON.
    """
    try:
        messages = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; --chat takes a JSON list of messages") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({error}); --chat takes a list of messages") from None
    if isinstance(messages, dict):
        messages = messages.get("messages")
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good or not messages:
        raise UserError(f'{path}: write messages as [{{"role": "user", "content": "..."}}, ...]')
    return list(messages)


def chat(messages: Sequence[Mapping[str, str]], tokenizer: Any, generate: bool, name: str = "chat") -> Prompt:
    """A chat as the tokenizer's template writes it, with the roles of its messages.

    What a message says has the message's role. The last message, if it is the assistant's and nothing is to be
    generated, is the ``response``; an earlier one of the assistant's has the role ``assistant``.

    Args:
        messages: with ``role`` and ``content``.
        tokenizer: with a chat template.
        generate: the model is to answer: the template's opening of an answer is put behind.
        name: of the chat.

    Raises:
        UserError: there is no template, or it leaves a message out.
    """
    if not chats(tokenizer):
        raise UserError("this tokenizer has no chat template; give the prompt with --text and its parts with --role")
    text = chat_text(tokenizer, messages, generate)
    ids, places = _encode(tokenizer, text, special=False)
    roles: dict[str, list[Span]] = {}
    behind = 0
    for i, message in enumerate(messages):
        said = message["content"].strip()
        if not said:
            continue
        at = text.find(said, behind)
        if at < 0:
            raise UserError(
                f"the chat template leaves out message {i + 1} ({_short(said)}), so its tokens have no role"
            )
        behind = at + len(said)
        last = i == len(messages) - 1 and not generate
        role = "response" if message["role"] == "assistant" and last else message["role"]
        roles.setdefault(role, []).append(_tokens(places, at, behind))
    if len(ids) < SHORTEST:
        raise UserError(f"the chat is too short: a prompt needs {SHORTEST} tokens or more")
    return Prompt(ids, name, roles)
