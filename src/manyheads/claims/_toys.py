# SPDX-License-Identifier: Apache-2.0
"""What claims on toy languages share: a small Llama of transformers, and one way to train it.

The model is an ordinary one of transformers, so that lenses meet it as they meet any other.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.claims._old import Figure
    from manyheads.compare.stats import Estimate

__all__ = ["llama", "measured", "trained"]


def llama(vocab: int, dim: int, layers: int, heads: int, seed: int, device: str) -> Any:
    """A Llama with random weights, no longest context and no dropout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(device)


def trained(
    model: Any, draw: "Callable[[int], tuple[Tensor, Tensor | None]]", steps: int, rate: float,
    progress: Callable[[float], None],
) -> float:  # fmt: skip
    """Train in place by AdamW, a tenth of the steps warming up and then half a cosine down to a tenth.

    Args:
        model: left in evaluation mode, without gradients.
        draw: given the step, ``ids [B, T]`` and which tokens are learned, bool ``[B, T]``; None for all.
        steps: how many.
        rate: highest learning rate.
        progress: is told the share done.

    Returns:
        Mean loss of the last twentieth of the steps, nats per token learned.
    """
    import torch
    from torch.nn.functional import cross_entropy

    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    rise, last = max(1, steps // 10), []
    model.train()
    for step in range(steps):
        factor = (step + 1) / rise
        if step >= rise:
            factor = 0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        ids, learned = (None if x is None else x.to(device) for x in draw(step))
        assert ids is not None
        logits = model(ids).logits[:, :-1]
        each = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        loss = each.mean() if learned is None else each[learned[:, 1:].flatten()].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= steps - max(1, steps // 20):
            last.append(loss.detach())
        if step % 20 == 0:
            progress(step / steps)
    model.eval().requires_grad_(False)
    return float(torch.stack(last).mean())


def measured(figures: "list[Figure]", name: str, values: Any, unit: str = "") -> "Estimate":
    """Add the mean of ``values [seeds, texts]`` as a figure, with its interval where there is more than one value."""
    import numpy as np

    from manyheads.claims._old import Figure
    from manyheads.compare.stats import crossed

    values = np.asarray(values, float)
    found = crossed(values, 0, name)
    known = math.isfinite(found.low)
    low, high = (found.low if known else None), (found.high if known else None)
    figures.append(Figure(name, found.value, values.size, low, high, unit))
    return found
