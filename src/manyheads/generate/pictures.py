# SPDX-License-Identifier: Apache-2.0
"""A reply about a picture, with strategies, from a model of transformers with its processor."""

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..integrations import use
from ..integrations.decoding import end_tokens, write
from ..lens import device_of
from ..questions import split
from ..strategy import Strategy
from ..writing import Decoding, Request

__all__ = ["reply"]

_DROPPED = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # of one row without padding they say nothing


def reply(
    model: Any, processor: Any, prompt: str, image: Any, strategies: Sequence[Strategy], *, max_new_tokens: int,
    seed: int, chat: bool | None, system: str,
) -> str:  # fmt: skip
    """See :func:`manyheads.reply`; ``image`` is whatever the processor takes.

    Raises:
        UserError: model, processor and strategies do not fit each other.
    """
    acting, keeping = split(strategies)
    choosing = [strategy for strategy in acting if isinstance(strategy, Decoding)]
    if len(choosing) > 1:
        raise UserError(f"{choosing[0].spec} and {choosing[1].spec} cannot hold together: each chooses what is written")
    if keeping.spec != "full":
        raise UserError(f"{keeping.spec} keeps the cache, which a reply about a picture does not do yet; leave it away")
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise UserError(
            f"{type(processor).__name__} reads no pictures: give the model's processor, as "
            "transformers.AutoProcessor.from_pretrained reads it"
        )
    read = processor(images=image, text=_text(processor, prompt, chat, system), return_tensors="pt")
    device, dtype = device_of(model), model.dtype
    given = {
        name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
        for name, x in read.items() if name not in _DROPPED
    }  # fmt: skip
    ids = given.pop("input_ids")
    request = Request(model, tokenizer, ids, max_new_tokens, end_tokens(model, tokenizer), seed, given=given)
    with use(model, *(strategy for strategy in acting if strategy not in choosing)):
        if choosing:
            tokens = write(choosing[0], request).tokens
        else:
            made = model.generate(input_ids=ids, **given, max_new_tokens=max_new_tokens, do_sample=False)
            tokens = made[0, ids.shape[1] :].tolist()
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _text(processor: Any, prompt: str, chat: bool | None, system: str) -> str:
    """The prompt in the chat template if there is one, or as it stands, behind the picture where it does not say."""
    written = getattr(processor, "chat_template", None) is not None
    if (chat or system) and not written:
        raise UserError("the processor has no chat template; leave chat and system away")
    if written and chat is not False:
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        return str(processor.apply_chat_template([*before, asked], add_generation_prompt=True))
    token = str(getattr(processor, "image_token", "<image>"))
    return prompt if token in prompt else f"{token}\n{prompt}"
