# SPDX-License-Identifier: Apache-2.0
"""Policies that score the tokens of a prompt by what the model attends to when it says the prompt again (KVzip)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference
from ..call import AttentionCall
from ..errors import UserError
from ._policy import CachePolicy
from ._view import CacheView

__all__ = ["Rereading"]

_FIRST = "\n\nRepeat the previous context:"
_LATER = "\n\nRepeat the previous context starting with"
_SHOWN = 8  # last tokens of the chunk before, which tell where to begin
_SCORES = "reconstruction"


@dataclass(frozen=True, kw_only=True)
class Rereading(CachePolicy):
    """Base: the model reads the prompt again behind it, and nothing of that stays but the scores of its tokens.

    Attributes:
        sinks: first tokens that are never dropped and that every chunk sees.
        chunk_size: tokens of the prompt repeated in one forward, m.
        instruct: with the instruction to repeat, for which the model's tokenizer is looked up where its weights came
            from; without it the tokens alone come again.
    """

    chunk_size: int = field(default=2048, metadata={"help": "tokens of the prompt repeated in one forward"})
    instruct: bool = field(default=True, metadata={"help": "say that the prompt is to be repeated, or repeat it only"})

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise UserError(f"{self.slug}: chunk_size counts tokens and is at least 1")
        if self.rereads and self.schedule != "prefill":
            raise UserError(f"{self.slug} reads the prompt again once: schedule is prefill, not {self.schedule}")
        super().__post_init__()

    @property
    def rereads(self) -> bool:  # type: ignore[override]
        """Whether the prompt is read again."""
        return True

    @property
    def dense_prefill(self) -> bool:  # type: ignore[override]
        """Whether a prompt that others have read serves: not where it is to be read again."""
        return not self.rereads

    def second_reading(self, ids: Tensor, encode: Callable[[str], list[int]]) -> Iterator[tuple[slice, Tensor]]:
        """What is read behind the prompt ``ids [B, L]``: columns that are scored by it, and tokens ``[B, T]``.

        ``encode`` gives the tokens of a text, and raises UserError where the model has no tokenizer.
        """
        length = ids.shape[1]
        texts = [encode(text) if self.instruct else [] for text in (_FIRST, _LATER)]
        for start in range(min(self.sinks, length), length, self.chunk_size):
            stop = min(start + self.chunk_size, length)
            later = start > self.sinks
            said = ids.new_tensor(texts[later], dtype=ids.dtype).expand(ids.shape[0], -1)
            shown = ids[:, max(0, start - _SHOWN) : start] if later and self.instruct else ids[:, :0]
            yield slice(start, stop), torch.cat([said, shown, ids[:, start:stop]], 1)

    def reconstruct(self, call: AttentionCall, columns: slice, state: dict[str, Tensor]) -> None:
        """Score ``columns`` by a forward of :meth:`second_reading`, whose T tokens are the last keys of ``call``."""
        new, heads = call.q.shape[2], call.k.shape[1]
        length = call.k.shape[2] - new
        cut = [slice(0, self.sinks), columns, slice(length, None)]
        k = reference.widened(torch.cat([call.k[:, :, at] for at in cut], 2)).transpose(-1, -2)
        q = reference.widened(call.q).unflatten(1, (heads, -1))  # [B, Hkv, G, T, d]
        before, size = k.shape[3] - new, columns.stop - columns.start
        best = q.new_zeros(q.shape[0], heads, size)
        more = self.weighed(call, columns)
        block = reference.block_size(k, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[3])
        for first in range(0, new, block):
            part = q[:, :, :, first : first + block]
            x = part @ k[:, :, None] * call.scale
            if call.softcap is not None:
                x = torch.tanh(x / call.softcap) * call.softcap
            seen = torch.ones(part.shape[3], k.shape[3], dtype=torch.bool, device=x.device).tril(before + first)
            weights = reference.softmax(x.flatten(1, 2), seen, call.sinks).unflatten(1, (heads, -1))
            weights = weights[..., before - size : before]
            if more is not None:
                rows, sizes = more
                weights = weights * sizes[:, :, :, None] / rows[:, None, None, first : first + block, None]
            best = torch.maximum(best, weights.amax((2, 3)))
        if _SCORES not in state:
            state[_SCORES] = q.new_zeros(q.shape[0], heads, length)
        state[_SCORES][:, :, columns] = best

    def weighed(self, call: AttentionCall, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Sizes of the queries ``[B, T]``, and of the values ``[B, Hkv, G, n]`` of the columns; None for 1."""
        del call, columns
        return None

    @staticmethod
    def reconstruction(view: CacheView) -> Tensor:
        """The greatest weight ``[B, Hkv, N]`` that each token got; its state is rid of it."""
        return view.state.pop(_SCORES)
