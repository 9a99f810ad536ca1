# SPDX-License-Identifier: Apache-2.0
"""The green-list watermark: half of the vocabulary, chosen anew by a hash of what stands before, becomes likelier.

"A Watermark for Large Language Models" (2301.10226), for messages of several bits as MPAC does ("Advancing Beyond
Identification: Multi-bit Watermark for Large Language Models", 2308.00221). A keyed hash of the last ``window`` tokens
and of a candidate says which bit of the message the candidate speaks for and whether it says 1 or 0. Those that say
what the message says are green, and their logits gain ``delta``. The reader counts what the tokens of a text say; a
pair of window and token that comes again counts once. With ``window=0`` every place has the same list (2306.17439),
which edits of other tokens cannot change.

The test of a message is exact: of ``n`` different pairs the green ones are binomial with 1/2 in a text that knows
nothing of the key. Here the candidate itself takes part in choosing the bit, in MPAC the window alone: so there are all
bits with ``window=0`` too. A token is green by the toss of a coin each, not by an exact half of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ..writing import Reading, TokenChoice, Watermark, binomial_tail
from ._cut import Cut

__all__ = ["GreenList", "votes"]

_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of SplitMix64


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, on int64 that wraps around; the same on every device."""
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def votes(context: Tensor, tokens: Tensor, bits: int, key: int) -> tuple[Tensor, Tensor]:
    """The bit that each token speaks for, and whether it says 1.

    Args:
        context: ``[..., window]`` tokens before.
        tokens: int64 of the shape of ``context`` without its last dimension, or one that it broadcasts with.
        bits: of the message.
        key: of the hash.
    """
    x = _mixed(torch.full(context.shape[:-1], key, dtype=torch.int64, device=context.device))
    for i in range(context.shape[-1]):
        x = _mixed(x ^ context[..., i])
    x = _mixed(x ^ tokens)
    return _shifted(x, 33) % bits, (x & 1).bool()


@dataclass(frozen=True, kw_only=True)
class GreenList(Cut, TokenChoice, Watermark):
    """Draw from the model's distribution with the green tokens raised.

    Attributes:
        rows: messages ``[B, b]`` of 0 and 1, one for each row of a batch, in the place of ``message``; from Python.
    """

    message: str = field(default="1", metadata={"help": "bits to hide, as 1011"})
    delta: float = field(default=2.0, metadata={"help": "what is added to logits of green tokens"})
    window: int = field(default=1, metadata={"help": "tokens before that choose the list; 0 for one list everywhere"})
    key: int = field(default=0, metadata={"help": "secret of the hash; who reads needs it too"})
    rows: Tensor | None = field(default=None, compare=False, metadata={"help": "messages of rows, from Python only"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_message()
        if self.delta < 0 or self.window < 0:
            raise UserError(f"{self.spec}: delta and window are not negative")

    def green(self, ids: Tensor, vocabulary: int) -> Tensor:
        """Which tokens are green behind ``ids [B, T]``, bool ``[B, V]``; none behind fewer than ``window``."""
        if ids.shape[1] < self.window:
            return torch.zeros(len(ids), vocabulary, dtype=torch.bool, device=ids.device)
        context = ids[:, ids.shape[1] - self.window :, None].mT
        said, one = votes(context, torch.arange(vocabulary, device=ids.device)[None], len(self.message), self.key)
        wanted = torch.tensor([[bit == "1" for bit in self.message]], device=ids.device)
        if self.rows is not None:
            wanted = self.rows.to(ids.device).bool()
        return wanted.expand(len(ids), -1).gather(1, said) == one

    def raised(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logits ``[B, V]`` with those of green tokens raised."""
        return logits + self.delta * self.green(ids, logits.shape[-1])

    def choose(self, logits: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        weights = self.log_weights(self.raised(logits, ids)).softmax(-1)
        return torch.multinomial(weights, 1, generator=generator)[:, 0]

    def read(self, texts: Sequence[Sequence[int]], messages: Sequence[str] | None = None) -> list[Reading]:
        messages = [self.message] * len(texts) if messages is None else messages
        return [self._read(text, message) for text, message in zip(texts, messages, strict=True)]

    def _read(self, text: Sequence[int], message: str) -> Reading:
        bits, w = len(self.message), self.window
        if len(text) <= w:
            return Reading((0.0,) * bits, len(text), 1.0)
        pairs = torch.tensor(text, dtype=torch.int64).unfold(0, w + 1, 1).unique(dim=0)
        said, one = votes(pairs[:, :w], pairs[:, w], bits, self.key)
        counts = torch.zeros(bits).index_add(0, said, 2.0 * one - 1.0)
        among = torch.zeros(bits).index_add(0, said, torch.ones(len(said)))
        wanted = torch.tensor([bit == "1" for bit in message])
        p = binomial_tail(int((wanted[said] == one).sum()), len(pairs))
        return Reading(tuple((counts / among.clamp(min=1).sqrt()).tolist()), len(text), p)
