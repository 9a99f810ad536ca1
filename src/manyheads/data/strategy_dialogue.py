# SPDX-License-Identifier: Apache-2.0
"""Dialogues in tokens, in which an instruction names the style of the reply, and everything between is noise.

    standard   BOS SYSTEM s  USER w w w ASSISTANT a b w  ...  USER w w w ASSISTANT  a b
    c1_hf      BOS           USER w w w ASSISTANT a b w  ...  SYSTEM s USER w w w ASSISTANT  a b
    c1_hl      BOS SYSTEM s  HISTORY w w w a b w  ...  USER w w w ASSISTANT  a b

The style s is one of 15; it is replied to with two tokens, ``a`` one of four and ``b`` one of four, that name it.
Earlier replies follow styles of their own, so that only the instruction tells the right one. The layouts move the same
tokens as those of ``manyheads.lenses.strategy_attention`` move messages; history that is no turn loses its markers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["STYLES", "VOCAB", "Dialogues", "Form", "strategy_dialogues"]

Form = Literal["standard", "c1_hf", "c1_hl"]
STYLES, WORDS = 15, 24
BOS, SYSTEM, USER, ASSISTANT, HISTORY = range(5)
_STYLE, _A, _B = 5, 5 + STYLES, 9 + STYLES  # where their tokens begin
_WORD = _B + 4
VOCAB = _WORD + WORDS


@dataclass(frozen=True)
class Dialogues:
    """Dialogues of as many turns each.

    Attributes:
        ids: ``[B, T]``; the last two tokens are the reply.
        system: where the instruction stands, start and stop, the same in every row.
        beside: two tokens of noise as near to it as any, just behind it.
    """

    ids: Tensor
    system: tuple[int, int]
    beside: tuple[int, int]


def strategy_dialogues(
    batch: int, turns: int, form: Form, generator: torch.Generator, words: int = 10
) -> Dialogues:  # fmt: skip
    """Dialogues whose last message of the user is replied to, on the generator's device.

    Args:
        batch: how many.
        turns: messages of the user in each.
        form: layout.
        generator: of all draws.
        words: of a message of the user; the picture above has three.
    """
    device = generator.device

    def drawn(count: int, *shape: int) -> Tensor:
        return torch.randint(count, (batch, *shape), generator=generator, device=device)

    def fixed(token: int, *shape: int) -> Tensor:
        return torch.full((batch, *shape), token, device=device)

    styles = drawn(STYLES, turns)  # the last is that of the instruction
    said = _WORD + drawn(WORDS, turns, words + 1)
    marked = form != "c1_hl"
    parts = [said[..., :words], _A + styles[..., None] // 4, _B + styles[..., None] % 4, said[..., words:]]
    if marked:
        parts = [fixed(USER, turns, 1), parts[0], fixed(ASSISTANT, turns, 1), *parts[1:]]
    history = torch.cat(parts, -1)[:, :-1].flatten(1)
    system = torch.cat([fixed(SYSTEM, 1), _STYLE + styles[:, -1:]], 1)
    if not marked:
        history = torch.cat([fixed(HISTORY, 1), history], 1)
    last = torch.cat([fixed(USER, 1), said[:, -1, :words], fixed(ASSISTANT, 1)], 1)
    reply = torch.cat([_A + styles[:, -1:] // 4, _B + styles[:, -1:] % 4], 1)
    before = [history, system] if form == "c1_hf" else [system, history]
    ids = torch.cat([fixed(BOS, 1), *before, last, reply], 1)
    start = 1 + (history.shape[1] if form == "c1_hf" else 0)
    return Dialogues(ids, (start, start + 2), (start + 3, start + 5))
