# SPDX-License-Identifier: Apache-2.0
"""Keep what the model needs to say the prompt again.

Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416. What serves to
repeat the text serves any question about it. After the prompt the model reads, chunk by chunk of m tokens, an
instruction to repeat it and then the chunk itself, with the whole cache behind it. A token of the chunk counts by the
largest weight that any query of this reading gave it, over the query heads of its group:

    S_hi = max_{g, t} softmax(Q_hgt [K_h,sinks; K_h,chunk; K_h,reading]^T * scale)_i

with a softmax over the chunk, what is read and the first tokens alone, so that the cost grows by n m and not by n^2.
The best of all tokens of all heads and layers stay (the paper's non-uniform head budgets); layers with a sliding
window are left as they are. With ``plus`` (KVzip+, as KVzap, arXiv 2601.07891, calls it) a weight is multiplied by
what the token would add to the residual stream, next to what is there: |W_o,h v_i| / |x_t|, with x_t the input of the
attention at the reading query.

The cost is the second reading: every token of the prompt goes through the model once more, with attention over the
cache, and scores of m x 2 m beside it: more than the prompt itself took. Nothing of it is kept.

Differs: the paper keeps a system prompt and reads in the model's chat template; here the first ``sinks`` tokens are
that, and no template stands around the instruction. Weights are float32 (released code: the model's dtype). Rows of a
batch have one length. A prompt that comes in chunks is scored after its last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..attention import reference
from ..call import AttentionCall, Site
from ..errors import UserError
from ._ranking import JointRanking
from ._second_reading import Rereading
from ._store import PolicyStore
from ._view import CacheView

__all__ = ["KVzip"]

_FIRST = "\n\nRepeat the previous context:"
_LATER = "\n\nRepeat the previous context starting with"
_SHOWN = 8  # last tokens of the chunk before, which tell where to begin
_SCORES = "reconstruction"


@dataclass(frozen=True, kw_only=True)
class KVzip(Rereading, JointRanking):
    """Tokens that a repetition of the prompt attends to most, in one ranking over heads and layers.

    Attributes:
        sinks: first tokens that are never dropped and that every chunk sees.
        chunk_size: tokens of the prompt repeated in one forward, m.
        instruct: with the instruction to repeat, for which the model's tokenizer is looked up where its weights came
            from; without it the tokens alone come again.
        plus: weigh by the output that the value would give, over the input of the query.
    """

    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped"})
    chunk_size: int = field(default=2048, metadata={"help": "tokens of the prompt repeated in one forward"})
    instruct: bool = field(default=True, metadata={"help": "say that the prompt is to be repeated, or repeat it only"})

    plus: bool = field(default=False, metadata={"help": "weigh by the output of the value over the query's input"})

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise UserError("kvzip: chunk_size counts tokens and is at least 1")
        if self.schedule != "prefill":
            raise UserError(f"kvzip reads the prompt again once: schedule is prefill, not {self.schedule}")
        super().__post_init__()

    def store(self, site: Site) -> PolicyStore:
        if site.latent is not None:
            raise UserError(f"kvzip scores keys and values, and {site.name} caches latents: choose snapkv or keydiff")
        return PolicyStore(self if site.window is None else replace(self, budget=1.0), site)

    def second_reading(self, ids: Tensor, encode: Callable[[str], list[int]]) -> Iterator[tuple[slice, Tensor]]:
        length = ids.shape[1]
        texts = [encode(text) if self.instruct else [] for text in (_FIRST, _LATER)]
        for start in range(min(self.sinks, length), length, self.chunk_size):
            stop = min(start + self.chunk_size, length)
            later = start > self.sinks
            said = ids.new_tensor(texts[later], dtype=ids.dtype).expand(ids.shape[0], -1)
            shown = ids[:, max(0, start - _SHOWN) : start] if later and self.instruct else ids[:, :0]
            yield slice(start, stop), torch.cat([said, shown, ids[:, start:stop]], 1)

    def reconstruct(self, call: AttentionCall, columns: slice, state: dict[str, Tensor]) -> None:
        new, heads = call.q.shape[2], call.k.shape[1]
        length = call.k.shape[2] - new
        cut = [slice(0, self.sinks), columns, slice(length, None)]
        k = reference.widened(torch.cat([call.k[:, :, at] for at in cut], 2)).transpose(-1, -2)
        q = reference.widened(call.q).unflatten(1, (heads, -1))  # [B, Hkv, G, T, d]
        before, size = k.shape[3] - new, columns.stop - columns.start
        best = q.new_zeros(q.shape[0], heads, size)
        rows, sizes = self._plus(call, columns) if self.plus else (None, None)
        block = reference.block_size(k, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[3])
        for first in range(0, new, block):
            part = q[:, :, :, first : first + block]
            x = part @ k[:, :, None] * call.scale
            if call.softcap is not None:
                x = torch.tanh(x / call.softcap) * call.softcap
            seen = torch.ones(part.shape[3], k.shape[3], dtype=torch.bool, device=x.device).tril(before + first)
            weights = reference.softmax(x.flatten(1, 2), seen, call.sinks).unflatten(1, (heads, -1))
            weights = weights[..., before - size : before]
            if rows is not None and sizes is not None:
                weights = weights * sizes[:, :, :, None] / rows[:, None, None, first : first + block, None]
            best = torch.maximum(best, weights.amax((2, 3)))
        if _SCORES not in state:
            state[_SCORES] = q.new_zeros(q.shape[0], heads, length)
        state[_SCORES][:, :, columns] = best

    def _plus(self, call: AttentionCall, columns: slice) -> tuple[Tensor, Tensor]:
        """``|x_t| [B, T]`` of the queries, and ``|W_o,h v_i| [B, Hkv, G, size]`` of the tokens that are scored."""
        if call.hidden is None or call.site.output is None:
            raise UserError(f"kvzip:plus=true reads input and output layer of {call.site.name}, which are not known")
        v = reference.widened(call.v[:, :, columns])
        weight = call.site.output().to(v.dtype).unflatten(1, (v.shape[1], -1, v.shape[3]))  # [D, Hkv, G, dv]
        gram = torch.einsum("Dhgi,Dhgj->hgij", weight, weight)
        sizes = torch.einsum("bhni,hgij,bhnj->bhgn", v, gram, v).clamp(min=0).sqrt()
        return torch.linalg.vector_norm(reference.widened(call.hidden), dim=-1), sizes

    def rank(self, views: list[CacheView]) -> list[Tensor]:
        return [view.state.pop(_SCORES) for view in views]
