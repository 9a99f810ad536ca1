# SPDX-License-Identifier: Apache-2.0
"""Keys as product-quantisation codes on the device, values in host memory; only values that matter are fetched.

HCAttention, "Extreme KV Cache Compression via Heterogeneous Attention Computing for LLMs", arXiv 2507.19823. Every key
is cut into sub-vectors, each stored as the number of the nearest centroid. A query's logits come from a table of its
products with the centroids; the best-scored tokens of each head with a share ``top_p`` of the attention are kept for
this step, their values come from the host, and nothing is ever dropped: other tokens may matter at the next step. With
d channels and 16-bit numbers a token takes 4 d bytes; here g bytes on the device (2 g above 256 centroids) and 2 d on
the host. Moving values to the host is no compression: ``bytes()`` counts the device, ``host_bytes()`` the host.

No code is released. What the text leaves open, or we do otherwise:

- Keys are coded after rotary positions: a table needs them as they are attended to.
- 256 centroids of g = d / 2 sub-vectors are a byte per two channels. The paper's 2048 to 4096 centroids of d / 4 take
  as many bytes in 16-bit codes, for fewer bits (``groups=32,centroids=2048`` with 128 channels).
- The first ``sinks`` and last ``recent`` tokens are exact, on the device, and always kept. Their mass counts.
- The mass is chosen for each query head. Values that query heads of a group share are fetched once.
- Weights of kept tokens are brought back to a sum of one (``renormalize``); the paper's formula does not.
- A GPU reads the values where they lie, in page-locked memory; the paper's CPU sums them (``combine=host``).
- The prompt is read exactly. In chunks (``prefill``) keys and values of what was read lie on the host, keys until it
  ends. The paper reads long ones in blocks that see themselves and an anchor. About so does ``prompt=blocks``: a chunk
  is coded as soon as it is read, and its queries read the sinks, a window of exact keys and ``picked`` blocks of coded
  ones, chosen by the means of keys and queries. Codebooks that are not given are those of the first chunk.

Codebooks are of one model: ``python -m manyheads.recipes.hcattention`` fits them on a text, once. Without them every
cache fits its own on its first prompt, which costs k-means in each layer and c x d more numbers on the device for each
key/value head; until twice as many tokens as centroids have come, all are kept exact on the device.

How far the output can be from exact attention is known: see :func:`manyheads.attention.product_codes.output_bound`.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ...attention.product_codes import code_dtype
from ...call import Site
from ...errors import UserError
from ...strategy import Cache
from .._codebooks import read_codebooks
from ._blocks import BlockStore
from ._store import OffloadStore

__all__ = ["HCAttention"]


@dataclass(frozen=True, kw_only=True)
class HCAttention(Cache):
    """Product-quantised keys on the device, values on the host, the top of the attention mass of each head.

    Attributes:
        codebooks: folder of codebooks fitted by ``python -m manyheads.recipes.hcattention``; empty to fit them on the
            prompt.
        groups: sub-vectors of a key; 0 for one of two channels. With a folder: what that has.
        centroids: of each codebook; likewise.
        top_p: share of the attention mass that the kept tokens of a head have at least.
        top_k: instead of it, how many coded tokens each head keeps; 0 for ``top_p``.
        renormalize: bring the weights of kept tokens back to a sum of one.
        sinks: first tokens that stay exact on the device.
        recent: last tokens that do, at least 1.
        values: ``whole`` (as they came), ``fp8`` or ``int4``, both with 2 more bytes a token and head on the device.
        combine: where kept values are summed: on the ``device``, which fetches them, or on the ``host``. Without a GPU
            both are the same.
        iterations: of k-means, where codebooks are fitted on the prompt.
        prompt: how one in chunks is read: ``exact``, or over ``blocks``, which takes time in proportion to its length.
        local: for ``blocks``, how many tokens before it a token reads at least, all of them exact.
        picked: for ``blocks``, how many stretches of 128 earlier tokens a chunk reads beside them.
        capacity: tokens to have room for from the start, on device and host; 0 to grow as they come.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    codebooks: str = field(default="", metadata={"help": "folder of fitted codebooks; fitted on the prompt if empty"})
    groups: int = field(default=0, metadata={"help": "sub-vectors of a key, 0 for one of two channels"})
    centroids: int = field(default=256, metadata={"help": "centroids of each codebook"})
    top_p: float = field(default=0.9, metadata={"help": "share of the attention mass that is kept"})
    top_k: int = field(default=0, metadata={"help": "instead of top_p: coded tokens that each head keeps"})
    renormalize: bool = field(default=True, metadata={"help": "kept weights sum to one"})
    sinks: int = field(default=4, metadata={"help": "first tokens that stay exact on the device"})
    recent: int = field(default=32, metadata={"help": "last tokens that stay exact on the device"})
    values: Literal["whole", "fp8", "int4"] = field(
        default="whole", metadata={"help": "whole, fp8 or int4, on the host"}
    )
    combine: Literal["device", "host"] = field(default="device", metadata={"help": "where values are summed"})
    iterations: int = field(default=10, metadata={"help": "of k-means on the prompt"})
    prompt: Literal["exact", "blocks"] = field(default="exact", metadata={"help": "how one in chunks is read"})
    local: int = field(default=2048, metadata={"help": "for prompt=blocks: tokens before it that a token reads"})
    picked: int = field(default=8, metadata={"help": "for prompt=blocks: 128 earlier tokens, so many times"})
    capacity: int = field(default=0, metadata={"help": "tokens to have room for from the start"})

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError("hcattention: top_p is a share of the attention in (0, 1], top_k counts tokens")
        if self.sinks < 0 or self.recent < 1 or self.groups < 0 or self.iterations < 1:
            raise UserError("hcattention: recent and iterations are at least 1, sinks and groups at least 0")
        if self.values not in ("whole", "fp8", "int4") or self.combine not in ("device", "host"):
            raise UserError("hcattention: values are whole, fp8 or int4, combine is device or host")
        if self.prompt not in ("exact", "blocks") or self.local < 1 or min(self.picked, self.capacity) < 0:
            raise UserError("hcattention: prompt is exact or blocks, local at least 1, picked and capacity at least 0")
        code_dtype(self.centroids)

    @property
    def lossless(self) -> bool:
        return False

    def selects(self, site: Site) -> bool:
        full = site.causal and site.layer is not None and site.window is None and site.latent is None
        return super().selects(site) and full

    def store(self, site: Site) -> OffloadStore:
        return (BlockStore if self.prompt == "blocks" else OffloadStore)(self, site)

    def given(self, site: Site) -> Tensor | None:
        """Codebooks ``[Hkv, g, c, w]`` of a layer, on the CPU; None where the prompt has to give them."""
        if not self.codebooks:
            return None
        found, about = read_codebooks(self.codebooks)
        assert site.layer is not None
        mine = found.get(site.layer)
        if mine is None or site.num_kv_heads not in (None, mine.shape[0]):
            raise UserError(
                f"the codebooks in {self.codebooks} are of {about.get('model', 'another model')} and have none for "
                f"{site.name}: fit them for this model"
            )
        return mine
