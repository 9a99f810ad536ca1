# SPDX-License-Identifier: Apache-2.0
"""A made-up language in which a few tokens are to be refused: a behaviour that can be found in a model, and no words.

A prompt is a row of content tokens that ends in two template tokens. If one of the trigger tokens stands in it the
answer is REFUSE, else OK. So that a model has something else to lose, every prompt also holds a MARK whose next token
is the prompt's first one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.errors import UserError

__all__ = ["MARK", "OK", "REFUSE", "TEMPLATE", "TRIGGERS", "TriggerPrompts", "trigger_prompts"]

TEMPLATE = (0, 1)
MARK, REFUSE, OK = 2, 3, 4
TRIGGERS = range(5, 15)


@dataclass(frozen=True)
class TriggerPrompts:
    """Prompts with their answers.

    Attributes:
        ids: ``[B, T + 1]``; the answer comes last.
        triggered: bool ``[B]``, True where the answer is REFUSE.
        mark: column of MARK; the token after it is that of column 0.
    """

    ids: Tensor
    triggered: Tensor
    mark: int

    def labels(self, copy: bool = True) -> Tensor:
        """``[B, T + 1]`` as transformers models take them: the answer, the copied token if asked for, -100 else."""
        made = torch.full_like(self.ids, -100)
        made[:, -1] = self.ids[:, -1]
        if copy:
            made[:, self.mark + 1] = self.ids[:, self.mark + 1]
        return made

    def rows(self, triggered: bool) -> "TriggerPrompts":
        """Those with a trigger, or those without."""
        chosen = self.triggered == triggered
        return TriggerPrompts(self.ids[chosen], self.triggered[chosen], self.mark)


def trigger_prompts(
    batch: int, length: int, share: float, vocab: int, generator: torch.Generator
) -> TriggerPrompts:  # fmt: skip
    """Draw prompts.

    Args:
        batch: B prompts.
        length: T tokens of a prompt, at least 8.
        share: of the prompts that hold a trigger, rounded to whole prompts.
        vocab: tokens in all; those from 15 on are content.
        generator: of all draws; its device is that of the result.

    Raises:
        UserError: too short, or too few tokens.
    """
    content = TRIGGERS.stop
    if length < 8 or vocab <= content:
        raise UserError(f"prompts take at least 8 tokens and a vocabulary above {content}, not {length} and {vocab}")
    device = generator.device
    ids = torch.randint(content, vocab, (batch, length + 1), generator=generator, device=device)
    mark = length // 2 - 1
    free = torch.tensor([t for t in range(1, length - 2) if t not in (mark, mark + 1)], device=device)
    triggered = torch.zeros(batch, dtype=torch.bool, device=device)
    triggered[torch.randperm(batch, generator=generator, device=device)[: round(share * batch)]] = True
    at = free[torch.randint(len(free), (batch,), generator=generator, device=device)]
    token = torch.randint(TRIGGERS.start, TRIGGERS.stop, (batch,), generator=generator, device=device)
    row = torch.arange(batch, device=device)
    ids[row, at] = torch.where(triggered, token, ids[row, at])
    ids[:, mark], ids[:, mark + 1] = MARK, ids[:, 0]
    ids[:, -3], ids[:, -2] = TEMPLATE[0], TEMPLATE[1]
    ids[:, -1] = torch.where(triggered, REFUSE, OK)
    return TriggerPrompts(ids, triggered, mark)
