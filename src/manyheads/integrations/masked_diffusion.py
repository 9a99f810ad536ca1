# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language models: what stands under each mask, from all tokens at once and their positions.

Any model will do whose forward takes ``input_ids`` and ``position_ids``, lets every token see every other, and gives
``logits``, or is them: a decoder of transformers whose config has ``is_causal: false`` and a ``mask_token_id`` (Llama,
Qwen2, ...), and classes of LLaDA's and Dream's kind that a user has loaded. LLaDA's logits of a place are of its own
token; a model made from a decoder may give those of the next, as Dream does: ``config.predicts_next``.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import UserError

__all__ = ["TokenDenoiser", "mask_token", "predicts_next"]

_MASKS = {"llada": 126336, "dream": 151666}  # where a config does not say
_NEXT = {"dream"}  # types whose logits are of the next token


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _kind(config: Any) -> str:
    return str(getattr(config, "model_type", "")).lower()


def mask_token(config: Any) -> int | None:
    """Token that hides another in a masked diffusion language model; None where a model of ``config`` is none."""
    found = getattr(config, "mask_token_id", None)
    if found is None:
        found = _MASKS.get(_kind(config))
    if found is None or getattr(config, "is_causal", None) is True:
        return None
    return int(found)


def predicts_next(config: Any) -> bool:
    """Whether logits of a place are of the token after it."""
    return bool(getattr(config, "predicts_next", _kind(config) in _NEXT))


class TokenDenoiser:
    """A masked diffusion language model as a function of tokens and their positions.

    Args:
        model: see above.
        mask: its mask token; that of the config when None.
        shifted: whether its logits are of the next token; as the config says when None.

    Raises:
        UserError: it has no mask token, or takes no positions.
    """

    def __init__(self, model: nn.Module, mask: int | None = None, shifted: bool | None = None) -> None:
        config = _config(model)
        found = mask_token(config) if mask is None else mask
        if found is None:
            raise UserError(
                f"{type(model).__name__} is no masked diffusion language model: its config needs mask_token_id and "
                "is_causal false; make one with python -m manyheads.recipes.masked_diffusion_lm"
            )
        takes = inspect.signature(model.forward).parameters
        if "position_ids" not in takes:
            raise UserError(f"{type(model).__name__} takes no position_ids, without which no token can be left away")
        self.model, self.mask = model, found
        self.shifted = predicts_next(config) if shifted is None else shifted
        self._chooses = "logits_to_keep" in takes  # places whose logits are computed

    def __call__(self, ids: Tensor, places: Tensor, first: int, last: int, past: Any = None) -> Tensor:
        """Logits of the tokens at columns ``first`` to ``last``, float32 ``[B, last - first, V]``.

        The mask itself is never likely.

        Args:
            ids: ``[B, T]``.
            places: positions of the columns, ``[T]``, ascending.
            first, last: columns; with ``shifted`` the first is not 0.
            past: from :meth:`begin`, which has read the columns before ``first`` (but one where ``shifted``).
        """
        held = 0 if past is None else int(past.get_seq_length())
        given = {} if past is None else {"past_key_values": past}
        logits = self._logits(ids[:, held:], places[held:], first - held, last - held, given)
        if past is not None:
            past.crop(held - ids.shape[1])
        return logits

    def begin(self, ids: Tensor, places: Tensor, first: int, last: int) -> tuple[Tensor, DynamicCache]:
        """As a call, and a cache of what stands before ``first``, as it is seen now."""
        past = DynamicCache(config=_config(self.model))
        logits = self._logits(ids, places, first, last, {"past_key_values": past, "use_cache": True})
        past.crop(first - self.shifted - ids.shape[1])
        return logits, past

    def _logits(self, ids: Tensor, places: Tensor, first: int, last: int, given: dict[str, Any]) -> Tensor:
        rows = slice(first - self.shifted, last - self.shifted)
        if rows.start < 0:
            raise UserError("a model whose logits are of the next token needs a prompt of at least one token")
        if self._chooses:
            given = {**given, "logits_to_keep": torch.arange(rows.start, rows.stop, device=ids.device)}
        out = self.model(input_ids=ids, position_ids=places.expand(ids.shape[0], -1), **given)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        logits = (logits if self._chooses else logits[:, rows]).float()
        return logits.index_fill(-1, torch.tensor([self.mask], device=ids.device), -torch.inf)
