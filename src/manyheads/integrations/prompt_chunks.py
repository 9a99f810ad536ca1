# SPDX-License-Identifier: Apache-2.0
"""Prompts that ``generate(prefill_chunk_size=...)`` reads in chunks: a cache has to know which of them is the last.

Only ``generate`` knows how long the prompt is, so while a port is open it notes that here, by thread. A forward of the
model then tells whether more of the prompt is to come, and what evicts after the prompt waits until none is.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationMixin

__all__ = ["begin_forward", "more_to_come", "watch_generate"]


class _Prompt(threading.local):
    """What this thread's ``generate`` reads: tokens of a prompt that comes in chunks, 0 for none, and what is left."""

    length: int = 0
    more: bool | None = None


_prompt = _Prompt()


def more_to_come() -> bool | None:
    """Whether this forward is of a prompt in chunks and not its last; None where no prompt comes in chunks."""
    return _prompt.more


def begin_forward(new: int, cache: Any) -> None:
    """A forward of ``new`` tokens behind those that ``cache`` has seen begins."""
    if _prompt.length:  # else nothing is asked of the cache, whose count may be on the device
        _prompt.more = new + (0 if cache is None else int(cache.get_seq_length())) < _prompt.length


def watch_generate(model: nn.Module) -> list[Callable[[], None]]:
    """Note the prompts of ``generate`` of ``model`` and of models within it; return what undoes it."""
    return [_watch(module) for module in model.modules() if isinstance(module, GenerationMixin)]


def _watch(module: Any) -> Callable[[], None]:
    own = vars(module).get("generate")
    generate = module.generate

    def noted(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or module.generation_config
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        names = ("attention_mask", "inputs", "input_ids", "inputs_embeds")
        given = [*(kwargs.get(name) for name in names[:1]), *args[:1], *(kwargs.get(name) for name in names[1:])]
        whole = next((x for x in given if x is not None), None)
        before = _prompt.length
        _prompt.length = int(whole.shape[1]) if size and whole is not None else 0
        try:
            return generate(*args, **kwargs)
        finally:
            _prompt.length, _prompt.more = before, None

    module.generate = noted

    def undo() -> None:
        if own is None:
            vars(module).pop("generate", None)
        else:
            module.generate = own

    return undo
