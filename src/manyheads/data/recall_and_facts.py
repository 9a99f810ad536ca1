# SPDX-License-Identifier: Apache-2.0
"""Questions whose answer stands in the prompt beside questions whose answer only weights can hold.

Both kinds are asked in prompts of one form and length, so that what tells them apart is where the knowledge comes from.
Set up after the distinction of contextual and parametric knowledge in *Massive Values in Self-Attention Modules are the
Key to Contextual Knowledge Understanding*.
"""

import torch
from torch import Tensor

__all__ = ["CONTEXTUAL", "CONTRADICTED", "FACT", "LENGTH", "VOCAB", "facts", "recall_and_facts"]

CONTEXTUAL, FACT, CONTRADICTED = 0, 1, 2  # kinds of questions

_KEYS = 32  # tokens 0 to 31 are keys, 32 to 63 values
_BOS, _ASK_CONTEXT, _ASK_FACT, _NOISE = 64, 65, 66, 67
_PAIRS, _FILLERS = 4, 4
VOCAB = _NOISE + _KEYS  # 32 kinds of noise
LENGTH = 1 + 2 * _PAIRS + _FILLERS + 2  # tokens of a prompt


def facts(seed: int = 0) -> Tensor:
    """The value that weights have to learn for each key, int64 ``[32]``."""
    generator = torch.Generator().manual_seed(seed)
    return _KEYS + torch.randint(_KEYS, (_KEYS,), generator=generator)


def recall_and_facts(batch: int, table: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of four keys, each with a random value, some noise, which kind of question it is, and a key.

    A contextual question wants the value that its key has in the prompt, a question for a fact the value in ``table``.
    The key of a fact stands elsewhere than in the prompt, or it stands there and the prompt contradicts the fact.

    Args:
        batch: B prompts.
        table: of :func:`facts`.
        generator: of all draws, on the CPU.

    Returns:
        ``ids [B, 15]``, ``label [B]``, and ``kind [B]``: :data:`CONTEXTUAL` for half of the questions or so,
        :data:`FACT` and :data:`CONTRADICTED` for a quarter each.
    """

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (batch, *shape), generator=generator)

    keys = torch.rand(batch, _KEYS, generator=generator).argsort(1)
    values = _KEYS + draw(_KEYS, _PAIRS)
    kind = torch.tensor([CONTEXTUAL, CONTEXTUAL, FACT, CONTRADICTED])[draw(4, 1)]
    asked = torch.where(kind == FACT, _PAIRS + draw(_KEYS - _PAIRS, 1), draw(_PAIRS, 1))
    key = keys.gather(1, asked)
    ids = torch.cat(
        [
            torch.full((batch, 1), _BOS), torch.stack([keys[:, :_PAIRS], values], 2).flatten(1),
            _NOISE + draw(_KEYS, _FILLERS), torch.where(kind == CONTEXTUAL, _ASK_CONTEXT, _ASK_FACT), key,
        ],
        1,
    )  # fmt: skip
    label = torch.where(kind == CONTEXTUAL, values.gather(1, asked.clamp(max=_PAIRS - 1)), table[key])
    return ids, label[:, 0], kind[:, 0]
