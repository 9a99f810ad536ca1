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

from ..call import Store

__all__ = ["begin_forward", "tell", "watch_generate"]


class _Prompt(threading.local):
    """What this thread's ``generate`` reads.

    Attributes:
        length: tokens of a prompt that comes in chunks, 0 where it comes at once.
        more: whether this forward is of such a prompt and not its last; None where no prompt comes in chunks.
    """

    length: int = 0
    more: bool | None = None


_prompt = _Prompt()


def tell(store: Store) -> None:
    """Tell a store of a prompt in chunks how long that is, and whether more of it is to come."""
    if _prompt.more is not None:
        store.prefilling, store.prompt = _prompt.more, _prompt.length


def begin_forward(new: int, cache: Any) -> None:
    """A forward of ``new`` tokens behind those that ``cache`` has seen begins."""
    if _prompt.length:  # else nothing is asked of the cache, whose count may be on the device
        _prompt.more = new + (0 if cache is None else int(cache.get_seq_length())) < _prompt.length


def watch_generate(model: nn.Module) -> list[Callable[[], None]]:
    """Note the prompts of ``generate`` of ``model`` and of models within it; return what undoes it."""
    return [_watch(module) for module in model.modules() if isinstance(module, GenerationMixin)]


def _watch(module: Any) -> Callable[[], None]:
    own = vars(module).get("generate")
    noted = own if isinstance(own, _Noted) else _Noted(module, own)
    noted.ports += 1
    module.generate = noted

    def undo() -> None:
        noted.ports -= 1
        if not noted.ports and vars(module).get("generate") is noted:  # ports may close in any order
            del module.generate
            if noted.own is not None:
                module.generate = noted.own

    return undo


class _Noted:
    """``generate`` of a module under one or more ports.

    Attributes:
        own: what the instance had of that name before, None where it was its class's.
        ports: that are open.
    """

    def __init__(self, module: Any, own: Any) -> None:
        self.module, self.own, self.ports = module, own, 0
        self.generate = module.generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or (args[1:2] or [None])[0] or self.module.generation_config
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if self.module.config.is_encoder_decoder:  # the encoder reads its input at once
            given = [kwargs.get(name) for name in ("decoder_attention_mask", "decoder_input_ids")]
        else:
            named = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
            given = [kwargs.get("attention_mask"), *args[:1], *named]
        whole = next((x for x in given if x is not None), None)
        before = _prompt.length
        _prompt.length = int(whole.shape[1]) if size and whole is not None else 0
        try:
            return self.generate(*args, **kwargs)
        finally:
            _prompt.length, _prompt.more = before, None
