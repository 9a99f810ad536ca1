# SPDX-License-Identifier: Apache-2.0
"""What strategies share that write with a masked diffusion language model, block after block.

A reply is as many masks as it may have tokens. From left to right, the masks of a block are filled in several steps; in
each, the model reads prompt, what is written, the block, and of the masks behind it (the suffix) those that a strategy
keeps, at the positions that they have. The places of which the model is surest get their likeliest tokens, the others
stay masked. What is filled never changes (LLaDA, arXiv 2502.09992; several at once by their confidence: Fast-dLLM,
arXiv 2505.22618).

Shapes: B rows, P tokens of a prompt, b of a block, V of the vocabulary. Chosen here: the mask itself is never written;
of equally sure places the first is filled; a reply ends before its first end token.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..writing import DecodingLoop, MaskedLM, ModelAccess, Request, Written

__all__ = ["BlockDecoding", "Row", "shares"]


def shares(count: int, steps: int) -> list[int]:
    """``count`` places over ``steps`` steps, as evenly as they go, more first: LLaDA's linear schedule."""
    steps = min(steps or count, count)
    return [count // steps + (i < count % steps) for i in range(steps)]


@dataclass
class Row:
    """A reply that is being written: its forwards, and the tokens that they read."""

    tokens: list[int] = field(default_factory=list)
    forwards: int = 0
    read: int = 0
    suffix: int = 0
    blocks: int = 0

    def written(self, ends: Collection[int]) -> Written:
        """The reply up to its first end."""
        upto = next((i for i, token in enumerate(self.tokens) if token in ends), len(self.tokens))
        notes = {"tokens_read": self.read, "suffix_read": self.suffix, "blocks": self.blocks}
        return Written(self.tokens[:upto], self.forwards, notes)


@dataclass(frozen=True, kw_only=True)
class BlockDecoding(DecodingLoop):
    """Base: fills blocks; a strategy says which masks behind a block are read."""

    reads_cache: ClassVar[bool] = False

    block: int = field(default=32, metadata={"help": "tokens of a block"})
    steps: int = field(default=0, metadata={"help": "steps of a block; 0 for one a token"})
    threshold: float = field(
        default=0.0,
        metadata={"help": "fill all places that are surer, at least one, not so many a step; 0: off"},
    )
    temperature: float = field(default=0.0, metadata={"help": "of Gumbel noise on the logits; 0 for the likeliest"})
    stop: bool = field(default=True, metadata={"help": "no further block after one with an end token"})
    prefix_cache: bool = field(
        default=False, metadata={"help": "read what stands before a block once, at its first step (approximate)"}
    )

    def __post_init__(self) -> None:
        if self.block < 1 or self.steps < 0 or self.temperature < 0 or not 0 <= self.threshold <= 1:
            raise UserError(f"{self.spec}: block is at least 1, steps, temperature not negative, threshold in [0, 1]")

    @abstractmethod
    def kept(self, behind: int, draws: torch.Generator) -> Tensor:
        """Which of ``behind`` masks after a block are read, by their distance from it: ascending from 0, int64 ``[n]``.

        Args:
            behind: masks after the block.
            draws: on the CPU; a block has its own numbers whatever was drawn before.
        """

    def write(self, request: Request, access: ModelAccess) -> Written:
        return self.write_rows(access.masked_lm(), request.ids, request.most, ends=request.ends, seed=request.seed)[0]

    @torch.inference_mode()
    def write_rows(
        self, denoiser: MaskedLM, ids: Tensor, most: int, *, ends: Collection[int] = (), seed: int = 0,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> list[Written]:  # fmt: skip
        """Write on from prompts of one length, each as it would be alone.

        Args:
            denoiser: a masked diffusion language model.
            ids: ``[B, P]``.
            most: tokens of a reply, masks at first.
            ends: tokens that end a reply.
            seed: of suffixes and noise, the same for every row.
            advance: told the rows that a block was filled of.
        """
        found = [Row() for _ in ids]
        going = list(range(len(found)))  # rows that are written on
        prompt, length = ids.shape[1], ids.shape[1] + most
        for number, start in enumerate(range(prompt, length, self.block)):
            end = min(start + self.block, length)
            own = seed * 1_000_003 + number  # numbers of a block, whatever other rows took for those before
            behind = self.kept(length - end, torch.Generator().manual_seed(own))
            noise = torch.Generator(ids.device).manual_seed(own)
            places = torch.cat([torch.arange(end), end + behind]).to(ids.device)
            filled = self._filled(denoiser, ids, places, end - start, noise, [found[row] for row in going])
            for row, tokens in zip(going, filled.tolist(), strict=True):
                found[row].tokens += tokens
                found[row].blocks += 1
            advance(len(going))
            ids = torch.cat([ids, filled], 1)
            if self.stop and ends:
                left = [i for i, row in enumerate(going) if not set(found[row].tokens[start - prompt :]) & set(ends)]
                if not left:
                    break
                if len(left) < len(going):
                    ids, going = ids[left], [going[i] for i in left]
        return [row.written(ends) for row in found]

    def _filled(
        self, denoiser: MaskedLM, ids: Tensor, places: Tensor, size: int, noise: torch.Generator, rows: list[Row]
    ) -> Tensor:  # fmt: skip
        """The next block, ``[B, size]``, behind ``ids [B, S]``; what it took is added to ``rows``."""
        start = ids.shape[1]
        block = torch.full((len(ids), size), denoiser.mask, device=ids.device)
        suffix = block.new_full((len(ids), len(places) - start - size), denoiser.mask)
        open_ = torch.ones_like(block, dtype=torch.bool)
        past: Any = None
        for count in self._counts(size, open_):
            read = torch.cat([ids, block, suffix], 1)
            if self.prefix_cache and past is None:
                logits, past = denoiser.begin(read, places, start, start + size)
                fresh = read.shape[1]
            else:
                logits = denoiser(read, places, start, start + size, past)
                fresh = read.shape[1] - (0 if past is None else int(past.get_seq_length()))
            tokens, sure = self._guess(logits, noise)
            sure = sure.masked_fill(~open_, -torch.inf)
            order = sure.sort(dim=1, descending=True, stable=True)
            first = torch.arange(size, device=ids.device) < (count or 1)
            taken = torch.zeros_like(open_).scatter(1, order.indices, first.expand_as(open_)) & open_
            if not count:
                taken |= sure >= self.threshold
            at_work = open_.any(1).tolist() if not count else [True] * len(rows)
            for row, works in zip(rows, at_work, strict=True):
                row.forwards += works
                row.read += works * fresh
                row.suffix += works * suffix.shape[1]
            block = torch.where(taken, tokens, block)
            open_ &= ~taken
        return block

    def _counts(self, size: int, open_: Tensor) -> Iterator[int]:
        """How many places each step fills; 0, as long as any is open, where the threshold says."""
        if not self.threshold:
            yield from shares(size, self.steps)
            return
        while bool(open_.any()):
            yield 0

    def _guess(self, logits: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """A token for every place and the model's probability of it, int64 and float64 ``[B, b]``."""
        logits = logits.double()
        drawn = logits
        if self.temperature:
            uniform = torch.rand(logits.shape[1:], dtype=torch.float64, device=logits.device, generator=noise)
            drawn = logits - self.temperature * (-uniform.clamp(min=1e-300).log()).log()
        tokens = drawn.argmax(-1)
        return tokens, logits.softmax(-1).gather(-1, tokens[..., None])[..., 0]
