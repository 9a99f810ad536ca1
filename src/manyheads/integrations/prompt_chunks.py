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
from ..errors import warn
from .cache import StoreLayer, find_cache

__all__ = ["begin_forward", "tell", "watch_generate"]

_CHAT = 2  # prompts behind the first: one may be a question about it, more are a chat


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


def watch_generate(model: nn.Module, done: Callable[[], None]) -> list[Callable[[], None]]:
    """Note the prompts of ``generate`` of ``model`` and of models within it, and call ``done`` when one has ended.

    Returns:
        what undoes it.
    """
    return [_watch(module, done) for module in model.modules() if isinstance(module, GenerationMixin)]


def _watch(module: Any, done: Callable[[], None]) -> Callable[[], None]:
    own = vars(module).get("generate")
    noted = own if isinstance(own, _Noted) else _Noted(module, own)
    noted.ports += 1
    noted.done.append(done)
    module.generate = noted

    def undo() -> None:
        noted.ports -= 1
        noted.done.remove(done)
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
        done: what they do when one has ended.
    """

    def __init__(self, module: Any, own: Any) -> None:
        self.module, self.own, self.ports = module, own, 0
        self.done: list[Callable[[], None]] = []
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
        if whole is not None:
            _note_turn(find_cache(*kwargs.values()), int(whole.shape[1]))
        _prompt.length = int(whole.shape[1]) if size and whole is not None else 0
        try:
            made = self.generate(*args, **kwargs)
            for done in self.done:
                done()
            return made
        finally:
            _prompt.length, _prompt.more = before, None


def _note_turn(cache: Any, length: int) -> None:
    """Say it once where a chat goes on behind a prompt that alone is compressed, so that a fraction is one of that."""
    seen = 0 if cache is None else int(cache.get_seq_length())
    if not seen or length - seen < 2:  # one token is the last of a prompt that was read before
        return
    turns = vars(cache)["_turns"] = vars(cache).get("_turns", 0) + 1
    kept = [layer.strategy for layer in cache.layers if isinstance(layer, StoreLayer) and layer.strategy.has_budget]
    if turns == _CHAT and kept and kept[0].schedule == "prefill" and kept[0].budget != 1.0:
        warn(
            f"{kept[0].spec} compressed the first prompt of this chat and keeps all that came since: with "
            "schedule=turn it ranks anew at every turn, and holds its budget of the whole chat"
        )
