# SPDX-License-Identifier: Apache-2.0
"""Kinds of strategies that choose what a language model writes, or hide something in it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .errors import UserError
from .strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .attention.shared_block import Block

__all__ = [
    "BatchedLoop", "BlockCache", "Decoding", "DecodingLoop", "MaskedLM", "ModelAccess", "Reading", "Readings",
    "Request", "TokenChoice", "Watermark", "Written", "binomial_tail",
]  # fmt: skip


class Readings(Protocol):
    """Readings of one prompt side by side, S of them, which hide columns or are given other images.

    Attributes:
        seen: which columns each reading sees, bool ``[S, T]``.
    """

    seen: "Tensor"

    def next(self) -> "Tensor":
        """Logits of what follows, float32 ``[S, V]``."""

    def again(self) -> "Tensor":
        """The same of the same token, which is read anew."""

    def append(self, token: int, seen: "Tensor") -> None:
        """Go on with a token, that later ones of the readings ``seen [S]`` see."""


class BlockCache(Protocol):
    """A cache of blocks that several rows read in orders of their own, each held once.

    Attributes:
        forwards: of the model so far.
    """

    forwards: int

    def check(self, ids: Sequence[int]) -> None:
        """Raise UserError where the model, read in blocks, predicts otherwise than as one text."""

    def of(self, cache: Any, count: int) -> "Block | None":
        """The first ``count`` tokens that ``cache`` has read, without a copy; None where it holds fewer."""

    def read(self, rows: "Sequence[tuple[Sequence[Block], Sequence[int]]]", *, same_step: bool = True) -> "Tensor":
        """Read tokens in every row into the last block of those it sees; logits ``[W, V]`` of what follows.

        With ``same_step`` a row sees what the others write in this forward.
        """

    def read_long(self, view: "Sequence[Block]", tokens: Sequence[int]) -> "Tensor":
        """The same of one row, in pieces: logits ``[V]``."""

    def move(self, source: "Block", target: "Block") -> None:
        """Put the tokens of ``source`` behind those of ``target``, computing nothing."""

    def nbytes(self, *blocks: "Block") -> int:
        """Bytes of what blocks hold."""


class MaskedLM(Protocol):
    """A masked diffusion language model as a function of tokens and their positions.

    Attributes:
        mask: its mask token, which is never likely.
    """

    mask: int

    def __call__(self, ids: "Tensor", places: "Tensor", first: int, last: int, past: Any = None) -> "Tensor":
        """Logits of the tokens at columns ``first`` to ``last``, float32 ``[B, last - first, V]``.

        Args:
            ids: ``[B, T]``.
            places: positions of the columns, ``[T]``, ascending.
            first, last: columns.
            past: from :meth:`begin`, which has read the columns before ``first``.
        """

    def begin(self, ids: "Tensor", places: "Tensor", first: int, last: int) -> "tuple[Tensor, Any]":
        """As a call, and a cache of what stands before ``first``, as it is seen now."""


class ModelAccess(Protocol):
    """What a loop can do with a model; :mod:`manyheads.integrations.model_access` does it for those of transformers."""

    @property
    def max_positions(self) -> int | None:
        """The longest text that it reads; None where it does not say."""

    def use(self, *strategies: Strategy) -> AbstractContextManager[Any]:
        """:func:`manyheads.use` of the model."""

    def reader(self, cache: Any) -> "Callable[[Tensor], Tensor]":
        """Reads tokens ``[B, T]`` behind what ``cache`` holds; gives logits of the next, float32 ``[B, V]``."""

    def image_columns(self, ids: "Tensor", by: str) -> "Tensor":
        """Which tokens of ``ids [1, T]`` stand for images, bool ``[T]``, for the strategy ``by``.

        Raises:
            UserError: there are none, or the model does not read them by plain positions.
        """

    def readings(self, ids: "Tensor", seen: "Tensor", given: "Sequence[Mapping[str, Tensor]]") -> Readings:
        """Readings of a prompt ``ids [1, T]``, all of it read but the last token.

        Args:
            ids: of the prompt.
            seen: which columns each sees, bool ``[S, T]``, the first among them.
            given: what else each is given, S mappings.
        """

    def blocks(self) -> AbstractContextManager[BlockCache]:
        """A cache of blocks, open in a ``with`` block.

        Raises:
            UserError: its attention cannot be put together from blocks.
        """

    def masked_lm(self) -> MaskedLM:
        """The model as a masked diffusion language model.

        Raises:
            UserError: it is none.
        """


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be written on, and how far.

    Attributes:
        model: the model, in whose port the strategies beside this one stand already.
        tokenizer: of the model; None where only tokens matter.
        ids: ``[1, T]`` of the prompt, on the model's device; ``[P, T]`` where several are written on side by side.
        most: tokens to write at most.
        ends: tokens that end the text; they are no part of it.
        seed: of all that is drawn.
        cache: has read all of the prompt but its last token; None for a loop that reads none, and where there is more
            to the prompt than its tokens.
        given: what else the model is given with the prompt, by the names of its arguments: ``pixel_values`` of a model
            that reads images.
    """

    model: "nn.Module"
    tokenizer: Any
    ids: "Tensor"
    most: int
    ends: frozenset[int] = frozenset()
    seed: int = 0
    cache: Any = None
    given: Mapping[str, "Tensor"] = field(default_factory=dict)

    def generator(self) -> "torch.Generator":
        """A fresh generator on the device of ``ids``, started from the seed."""
        import torch

        return torch.Generator(self.ids.device).manual_seed(self.seed)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        tokens: of the text, the prompt left away.
        forwards: of the model, one after the other; what runs side by side in a batch counts once.
        notes: other figures that the strategy has to tell, by name, of JSON's types; under ``texts`` what else was
            written, by whom.
        held: bytes of the cache at the end, where the strategy kept one of its own; None where it used the request's.
    """

    tokens: list[int]
    forwards: int
    notes: dict[str, Any] = field(default_factory=dict)
    held: int | None = None


class Decoding(Strategy, ABC):
    """Chooses what is written: one of the two kinds that follow. At most one such strategy writes a text."""


class TokenChoice(Decoding):
    """Chooses one token after the other, from the logits of the next; the loop is that of every other.

    ``manyheads.integrations.decoding.processor`` makes it a ``LogitsProcessor``, for ``generate`` of transformers.
    """

    @abstractmethod
    def choose(self, logits: "Tensor", ids: "Tensor", generator: "torch.Generator") -> "Tensor":
        """The next token of each row, ``[B]``, of float32 ``logits [B, V]`` that follow ``ids [B, T]``."""


class DecodingLoop(Decoding):
    """Writes by a loop of its own over the model, which ``manyheads.integrations.decoding.write`` gives it access to.

    Attributes:
        reads_cache: whether the prompt has to be in a cache when it begins.
    """

    reads_cache: ClassVar[bool] = True

    @abstractmethod
    def write(self, request: Request, access: ModelAccess) -> Written:
        """Write on from a prompt; ``access`` is to the request's model.

        Raises:
            UserError: the model is not one that can be written with so.
        """


class BatchedLoop(DecodingLoop):
    """A loop that writes several texts side by side."""

    @abstractmethod
    def write_each(self, request: Request, access: ModelAccess, copies: int = 1) -> list[list[Written]]:
        """Write on from all prompts of ``request``, so many times from each, every time by itself.

        All draws follow the one seed, so that a text is not what it would be alone; its distribution is.
        """

    def write(self, request: Request, access: ModelAccess) -> Written:
        return self.write_each(request, access)[0][0]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a watermark's reader finds in a text.

    Attributes:
        evidence: for each bit, positive for a 1, negative for a 0, 0 where nothing speaks for either.
        tokens: that were read.
        p_value: the chance of a text that knows nothing of the message agreeing with it as well; 1 for too short a one.
    """

    evidence: tuple[float, ...]
    tokens: int
    p_value: float

    @property
    def bits(self) -> str:
        """The message that was read."""
        return "".join("1" if x > 0 else "0" for x in self.evidence)

    def right(self, message: str) -> float:
        """The share of bits that are those of ``message``; a bit without evidence counts half."""
        found = (
            0.5 if x == 0 else float((x > 0) == (bit == "1")) for x, bit in zip(self.evidence, message, strict=True)
        )
        return sum(found) / len(message)


class Watermark(Strategy, ABC):
    """Hides a message of bits in what is written, and reads it from the text alone.

    Attributes:
        message: the bits, as ``1011``.
    """

    message: str

    @abstractmethod
    def read(self, texts: Sequence[Sequence[int]], messages: Sequence[str] | None = None) -> list[Reading]:
        """What each text, as tokens, says of the bits, and how surprising it is that it agrees with a message.

        Args:
            texts: without their prompts.
            messages: that each is to agree with, of as many bits as :attr:`message`, which is taken if None.
        """

    def check_message(self, bits: int | None = None) -> None:
        """Raise UserError unless the message is of ``bits`` bits, or of some where None."""
        if not self.message or set(self.message) - {"0", "1"} or bits not in (None, len(self.message)):
            wanted = "bits" if bits is None else f"{bits} bits"
            raise UserError(f"{self.slug}: message={self.message} is not {wanted}; write zeros and ones, as 1011")


def binomial_tail(successes: int, trials: int) -> float:
    """The chance of ``successes`` or more heads in so many tosses of a fair coin."""
    ways: int = sum(math.comb(trials, k) for k in range(max(0, successes), trials + 1))
    return ways / int(2**trials)
