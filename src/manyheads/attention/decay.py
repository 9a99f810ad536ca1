# SPDX-License-Identifier: Apache-2.0
"""Lightning attention, and how fast its heads forget: two tables that are different models and are never mixed.

Both give head h = 0..H-1 of layer l = 0..L-1 a fixed log decay per token, and slower decay to later layers. Learned
decay gave NaN, says the paper.

- ``paper``: ``-(8 h / H) (1 - l / L)``, TransNormerLLM with lightning attention, arXiv 2405.17381, equation 10. The
  first head never forgets; of eight heads in the first layer the fastest keeps ``exp(-7)`` per token.
- ``alibi``: ``-2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5)``, what that paper's code and MiniMax-01 (arXiv 2501.08313)
  run: ALiBi's slopes, eight heads from 0.5 to 0.0039. The denominator is ``L - 1 + 1e-5`` as in MiniMax, which also
  lets one layer be a model; the last layer's rate is then a little more than the release's 1e-5 of the slope.
"""

from typing import Literal

import torch
from torch import Tensor

from .positions import alibi_slopes
from .recurrence import DecayState, decay_attention

__all__ = ["Decay", "lightning_attention", "log_decay"]

Decay = Literal["paper", "alibi", "none"]


def log_decay(table: Decay, num_heads: int, layer: int, num_layers: int) -> Tensor | None:
    """Log decay per token, float32 ``[H]``, at most 0; None for ``none``."""
    if table == "none":
        return None
    if table == "paper":
        return -8.0 / num_heads * torch.arange(num_heads) * (1 - layer / num_layers)
    return -alibi_slopes(num_heads) * (1 - layer / (num_layers - 1 + 1e-5) + 1e-5)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, *, mask: Tensor | None = None,
    state: DecayState | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, DecayState]:  # fmt: skip
    """Linear attention with a fixed decay per head, no scale and no denominator; padding is skipped, not decayed over.

    Args:
        q, k, v: ``[B, H, T, d]``; k is 0 where ``mask`` is False.
        decay: log decay ``[H]``, None for none.
        mask: ``[B, T]``, True for tokens.
        state: what came before.
        cu_seqlens: ``[N + 1]`` bounds of N sequences packed in one row.

    Returns:
        ``[B, H, T, d]``, and the state after the last token.
    """
    if decay is not None and mask is not None:
        decay = torch.where(mask[:, None], decay[:, None], 0.0)
    return decay_attention(q, k, v, decay, state=state, cu_seqlens=cu_seqlens)
