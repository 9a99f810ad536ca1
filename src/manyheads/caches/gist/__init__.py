# SPDX-License-Identifier: Apache-2.0
"""Gist tokens that are trained to stand for the tokens before them: of a segment that is over, only theirs is cached.

Deng et al., "A Silver Bullet or a Compromise for Full Attention? A Comprehensive Study of Gist Token-based Context
Compression", arXiv 2412.17483. A text is read in segments of L tokens. Among them go t = L / r gists, which pass
through all layers as tokens do, with an embedding and projections of their own; what later segments see of a segment is
the keys and values of its gists, and those of its tokens are dropped. Attention costs T (L + T / r), the cache holds
T / r + L. Of the study's two axes

* granularity: ``coarse``, all gists behind the last token (Gist, Landmark), or ``fine``, one after every r tokens
  (Activation Beacon);
* memory: keys and values (KV). The recurrent one (RMT, AutoCompressor: last hidden states of gists become inputs of
  the next segment) is not here.

    python -m manyheads.recipes.gist --model MODEL --out gists --ratio 4 --ae 1 --tie
    with manyheads.use(model, "gist:gists=gists"): ...

trains gists and LoRA on the model in minutes, with the loss of the next token, the two losses of the paper if asked
(:mod:`manyheads.caches.gist.losses`), and one pass over a whole text under the explicit mask (:mod:`.one_pass`), which
gives what segment by segment gives. The last segment of a text, whole or not, is read as if there were no gists, so
that a text of up to L tokens is read as by the model (with its LoRA); once whole it is over, and its tokens are freed.

We had the text of the paper in part. Inferred: where gists have projections of their own (q, k, v); one embedding for
all gists where they are fine, one for each place where coarse; what tokens of the last whole segment see (no gists of
their own, so that it does not matter in how many parts a prompt comes; those of earlier segments do, if they are read
in one forward with what follows). Positions are ``compressed`` by default: a segment begins where the memory ends. A
gist is rotated to the last token that it stands for while its segment is read, and its key is turned to its place in
the memory afterwards. Differs: rows of a batch have one length; layers with a window or latents are refused.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...call import Site
from ...errors import UserError
from ...strategy import Cache, Interleaved, LinearCompute
from .segments import Segments
from .store import GistStore
from .weights import HOW, GistPiece, Gists, check_site

__all__ = ["Gist", "Gists", "Segments"]


@dataclass(frozen=True, kw_only=True)
class Gist(LinearCompute, Interleaved, Cache):
    """Keep gists of the segments that are over.

    Attributes:
        gists: folder of trained gists, as :meth:`Gists.save` wrote it.
    """

    gists: str = field(default="", metadata={"help": f"folder of trained gists; {HOW} makes one"})

    def __post_init__(self) -> None:
        if not self.gists:
            raise UserError(f"gist needs gists=FOLDER, trained on the model: {HOW}")
        if self.layers is not None:
            raise UserError("gist reads its gists through all layers: leave layers= away")

    @functools.cached_property
    def trained(self) -> Gists:
        """The gists."""
        return Gists.load(self.gists)

    @property
    def segments(self) -> Segments:
        """Their geometry."""
        return self.trained.segments

    @property
    def lossless(self) -> bool:
        return False

    def selects_linear(self, name: str, layer: int | None) -> bool:
        return name in self.trained.layers

    def linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Callable[[Tensor], Tensor]:
        return self.trained.compute(weight, bias, name)

    def store(self, site: Site) -> GistStore:
        check_site(site)
        return GistStore(self, site)

    def pieces(self, embeds: Tensor, seen: int, cached: bool) -> Iterator[GistPiece]:
        """What is left of the segment under way, then segment by segment, gists behind the last token of each."""
        if not cached:
            raise UserError("gist keeps the cache: call the model with use_cache=True")
        self.trained.check(embeds)
        segments, end = self.segments, seen + embeds.shape[1]
        start = seen
        while start < end:
            stop = min(end, start - start % segments.length + segments.length)
            # Only a segment that is read at once, with more behind it, is read as one that has gists.
            last = stop == end or start % segments.length > 0
            columns = segments.tokens(start, stop, last, embeds.device)
            part, closes, memory = embeds[:, start - seen : stop - seen], stop % segments.length == 0, None
            if closes:
                number = start // segments.length
                own = segments.gists_of(number, number + 1, embeds.device)
                columns, memory = columns.join(own), segments.memory_of(own).position
                part = torch.cat([part, self.trained.embedded(own, embeds)], 1)
            piece = GistPiece(part, columns.position, stop - start, None, memory, columns=columns, closes=closes)
            self.trained.now.piece = piece
            try:
                yield piece
            finally:
                self.trained.now.piece = None
            start = stop
