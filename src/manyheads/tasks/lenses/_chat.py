# SPDX-License-Identifier: Apache-2.0
"""Dialogues as a language model reads them, in its own chat template or plainly, and its greedy replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...models.chat import rendered

if TYPE_CHECKING:
    from ...experiment import CausalLM

__all__ = ["base_model", "greedy", "rendered"]


def base_model(subject: CausalLM, lacks: str) -> str | None:
    """Why a task that is about chat models does not fit a base model, which ``lacks`` what it is about; else None.

    The fixture, on which quick runs give figures and no word, stands in for a chat model.
    """
    if subject.chats or subject.name == "default":
        return None
    return f"{subject.name} is a base model: without a chat template it has {lacks}; give a chat model"


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to ``count``, without the end of the text and what follows it.

    Prompts of any lengths are one batch, padded on the left.
    """
    longest = max(map(len, prompts))
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends)) or 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, num_beams=1, pad_token_id=pad
        )[:, longest:].tolist()  # fmt: skip
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in made]
