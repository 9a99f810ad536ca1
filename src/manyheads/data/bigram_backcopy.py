# SPDX-License-Identifier: Apache-2.0
"""Bigram-Backcopy: text of letters in pairs, where a few letters, the triggers, are followed by what came before them.

The task of "Active-Dormant Attention Heads" (arXiv 2410.13835). A sequence starts with a token of its own; after it,

    x_1 ~ m without the triggers;    x_n = x_{n-2} if x_{n-1} is a trigger, else x_n ~ P[x_{n-1}].

What follows a trigger can be known only by looking two tokens back, everything else only as well as P says; a head that
copies has nothing to do wherever there is no trigger. P and m are the pairs and letters counted in a text. The triggers
are its most frequent letters. No trigger follows another, so what is copied never is one.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["BigramBackcopy"]


@dataclass(frozen=True)
class BigramBackcopy:
    """The task over V letters; the token ``V`` starts every sequence.

    Attributes:
        transition: ``P [V, V]`` float64, row a the probabilities of what follows letter a.
        start: ``[V]`` float64, of the first letter; 0 for triggers.
        triggers: ``[k]`` letters.
    """

    transition: Tensor
    start: Tensor
    triggers: Tensor

    @staticmethod
    def of_text(text: str, triggers: int = 3, letters: int = 65) -> "BigramBackcopy":
        """Count the pairs of a text.

        Args:
            text: at least two different characters.
            triggers: how many of the most frequent letters are triggers.
            letters: at most so many, the most frequent; other characters are left out of the text.

        Raises:
            UserError: fewer letters than triggers and one more.
        """
        kept = sorted(letter for letter, _ in Counter(text).most_common(letters))
        number = {letter: i for i, letter in enumerate(kept)}
        ids = torch.tensor([number[letter] for letter in text if letter in number])
        pairs = torch.bincount(ids[:-1] * len(kept) + ids[1:], minlength=len(kept) ** 2).reshape(len(kept), -1).double()
        single = torch.bincount(ids, minlength=len(kept)).double()
        if not 0 < triggers < len(single):
            raise UserError(f"{triggers} triggers need at least {max(triggers, 0) + 1} letters, not {len(single)}")
        unigram = single / single.sum()
        total = pairs.sum(1, keepdim=True)
        transition = torch.where(total > 0, pairs / total, unigram)  # a last letter has no successor
        chosen = single.argsort(descending=True, stable=True)[:triggers]
        start = unigram.index_fill(0, chosen, 0.0)
        return BigramBackcopy(transition, start / start.sum(), chosen)

    @property
    def bos(self) -> int:
        """The token that starts every sequence."""
        return len(self.start)

    @property
    def vocab(self) -> int:
        """Letters and the starting token."""
        return len(self.start) + 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """``[batch, length + 1]`` tokens, new ones at every call, on the device of ``generator``."""
        device = generator.device
        below = self.transition.cumsum(1).to(device)
        below = below / below[:, -1:]
        first = self.start.cumsum(0).to(device)
        known = torch.isin(torch.arange(self.bos), self.triggers).to(device)
        chance = torch.rand(length + 1, batch, 1, generator=generator, device=device, dtype=torch.float64)
        ids = torch.full((batch, length + 1), self.bos, dtype=torch.long, device=device)
        ids[:, 1] = torch.searchsorted(first / first[-1], chance[1, :, 0], right=True)
        for n in range(2, length + 1):
            before = ids[:, n - 1]
            drawn = torch.searchsorted(below[before], chance[n], right=True)[:, 0]
            ids[:, n] = torch.where(known[before], ids[:, n - 2], drawn)
        return ids

    def copies(self, ids: Tensor) -> Tensor:
        """``[B, T]`` of ``ids [B, T + 1]``: True where the next token is a copy, that is, at the triggers."""
        return torch.isin(ids[:, :-1], self.triggers.to(ids.device))

    def log_probability(self, ids: Tensor) -> Tensor:
        """``[B, T]`` log-probability in nats of each next token of ``ids [B, T + 1]``: no model can do better."""
        rows = torch.cat([self.transition, self.start[None]]).to(ids.device)
        known: Tensor = rows[ids[:, :-1], ids[:, 1:]].log()
        return known.masked_fill(self.copies(ids), 0.0)
