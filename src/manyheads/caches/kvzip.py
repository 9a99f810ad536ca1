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


@dataclass(frozen=True, kw_only=True)
class KVzip(Rereading, JointRanking):
    """Tokens that a repetition of the prompt attends to most, in one ranking over heads and layers.

    Attributes:
        plus: weigh by the output that the value would give, over the input of the query.
    """

    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped"})
    plus: bool = field(default=False, metadata={"help": "weigh by the output of the value over the query's input"})

    def store(self, site: Site) -> PolicyStore:
        if site.latent is not None:
            raise UserError(f"kvzip scores keys and values, and {site.name} caches latents: choose snapkv or keydiff")
        return PolicyStore(self if site.window is None else replace(self, budget=1.0), site)

    def weighed(self, call: AttentionCall, columns: slice) -> tuple[Tensor, Tensor] | None:
        """``|x_t| [B, T]`` of the queries, and ``|W_o,h v_i| [B, Hkv, G, size]`` of the tokens that are scored."""
        if not self.plus:
            return None
        if call.hidden is None or call.site.output is None:
            raise UserError(f"kvzip:plus=true reads input and output layer of {call.site.name}, which are not known")
        v = reference.widened(call.v[:, :, columns])
        weight = call.site.output().to(v.dtype).unflatten(1, (v.shape[1], -1, v.shape[3]))  # [D, Hkv, G, dv]
        gram = torch.einsum("Dhgi,Dhgj->hgij", weight, weight)
        sizes = torch.einsum("bhni,hgij,bhnj->bhgn", v, gram, v).clamp(min=0).sqrt()
        return torch.linalg.vector_norm(reference.widened(call.hidden), dim=-1), sizes

    def rank(self, views: list[CacheView]) -> list[Tensor]:
        return [self.reconstruction(view) for view in views]
