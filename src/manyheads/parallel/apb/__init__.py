# SPDX-License-Identifier: Apache-2.0
"""A long prompt is read by several hosts at once, which pass each other compressed blocks of keys and values.

Huang et al., "APB: Accelerating Distributed Long-Context Inference by Passing Compressed Context Blocks across GPUs",
arXiv 2502.12085 (ACL 2025). Each of H hosts has a block of l_b tokens of the document and, as all know it, the query. A
host after the first reads an anchor in front of its block: first tokens of the document and the query, at positions
from 0 on. In each layer it passes on, for each key/value head, the l_p tokens of its block that a scorer chooses, and

    a token of block h sees   what blocks before h passed on, the anchor, and its own block up to itself
    a token of the anchor     the anchor up to itself
    a token of the query      the whole document and the query up to itself, exactly: each host attends its part, and
                              outputs are merged by their log-sum-exp; so does every token that is written then

What is passed on is dropped after the layer, and the anchor after the prompt. A ring would move l_b where this moves
l_p. With ``passed=0,anchor=1.0,asked=false`` it is Star Attention (arXiv 2411.17116); with ``passed=1.0,asked=false``
it is exact.

    with manyheads.use(model, "apb:hosts=8"):  # one process is all hosts in turn: what the answers are worth
        model.generate(**inputs)
    with manyheads.use(model, "apb", mesh=mesh):  # torchrun: every process is a host
        model.generate(**inputs)

Scorers: :mod:`.scorers`. The paper's are small heads, trained on the model (:mod:`.heads`); the default, ``query``,
needs no training. As in the released code a few first tokens stand before the query in the anchor, and the document
tokens of the anchor, which all hosts have, are not passed on. Ours: blocks of any length and number; ``anchor`` counts
document tokens, and the query comes on top; the anchor is read in a forward of its own, as it depends on nothing else;
the query is the last ``query`` tokens of a prompt. Rows of a batch have one length. A prompt is read at once, what
comes after it is read exactly.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...call import AttentionCall, Piece
from ...errors import UserError
from ...parallelism import ContextParallelism
from ...strategy import AttentionCompute, Interleaved
from .blocks import Blocks, Part
from .heads import HOW, RetainingHeads
from .hosts import Layer, SharedPrompt, in_turn
from .scorers import SCORERS, Block, selected

if TYPE_CHECKING:
    from .._context import World
    from .._layouts import Layout
    from .._masks import AttnMask

__all__ = ["APB", "Blocks", "RetainingHeads"]

_ANCHOR = "anchor"


class _Now(threading.local):
    """What is being read in this thread: the anchor, or the prompt itself; else blocks are None."""

    blocks: Blocks | None = None
    anchor: bool = False


@dataclass(frozen=True, kw_only=True)
class APB(AttentionCompute, Interleaved, ContextParallelism):
    """Anchors, passing of compressed blocks, exact decoding.

    Attributes:
        hosts: H, where one process is all of them; else there are as many as processes.
        query: last tokens of a prompt that all hosts have.
        anchor: document tokens in the anchor: a number, or a fraction of the longest block. 0 for no anchor.
        passed: tokens that a key/value head of a host passes on: a number, or a fraction of its block.
        scorer: what chooses them.
        asked: whether the query stands in the anchor.
        sinks: first tokens of the document that stand before it.
        pooling: neighbouring tokens whose highest score counts, odd; 1 for none.
        window: last tokens of a block whose attention counts for ``snapkv``.
        heads: folder of trained retaining heads.
        seed: of random choices.
    """

    hosts: int = field(default=8, metadata={"help": "hosts that one process is in turn; with mesh= all processes"})
    query: int = field(default=64, metadata={"help": "last tokens of a prompt, known to all hosts"})
    anchor: Part = field(default=0.25, metadata={"help": "document tokens in the anchor, or a fraction of a block"})
    passed: Part = field(default=0.125, metadata={"help": "tokens that a head passes on, or a fraction of a block"})
    scorer: Literal["query", "snapkv", "knorm", "distinct", "hedge", "random", "retaining"] = field(
        default="query", metadata={"help": "what chooses them"}
    )
    asked: bool = field(default=True, metadata={"help": "whether the query stands in the anchor"})
    sinks: int = field(default=16, metadata={"help": "first tokens of the document before it there"})
    pooling: int = field(default=5, metadata={"help": "neighbouring tokens whose highest score counts; 1 for none"})
    window: int = field(default=32, metadata={"help": "snapkv: last tokens of a block whose attention counts"})
    heads: str = field(default="", metadata={"help": f"folder of retaining heads; {HOW} makes one"})
    seed: int = field(default=0, metadata={"help": "of random choices"})

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.query < 0 or self.sinks < 0 or self.window < 1 or self.seed < 0:
            raise UserError("apb: hosts and window are 1 or more; query, sinks and seed are not negative")
        if self.pooling < 1 or self.pooling % 2 == 0:
            raise UserError(f"apb: pooling is an odd number of tokens, not {self.pooling}")
        if self.layers is not None:
            raise UserError("apb shares a prompt through all layers: leave layers= away")
        if (self.scorer == "retaining") != bool(self.heads):
            raise UserError(f"apb: scorer=retaining and heads=FOLDER go together; {HOW} trains them")

    @functools.cached_property
    def trained(self) -> RetainingHeads:
        """The retaining heads."""
        return RetainingHeads.load(self.heads)

    @functools.cached_property
    def _now(self) -> _Now:
        return _Now()

    def blocks(self, length: int, hosts: int | None = None) -> Blocks:
        """How a prompt of ``length`` tokens is shared, by as many hosts as there are processes or as the field says."""
        return Blocks.of(
            length, self.hosts if hosts is None else hosts, self.query, self.anchor, self.passed, self.asked, self.sinks
        )

    def choose(self, block: Block, count: int, barred: int) -> Tensor:
        """Tokens ``[B, Hkv, count]`` of a block that are passed on, ascending; of the first ``barred`` none."""
        given = {"seed": self.seed, "window": self.window}
        if self.heads:
            given["heads"] = self.trained.placed(block.layer, block.v)
        block = Block(**{**vars(block), **given})
        return selected(SCORERS[self.scorer](block), count, barred, self.pooling)

    def pieces(self, embeds: Tensor, seen: int, cached: bool) -> Iterator[Piece] | None:
        """The anchor, which no cache keeps, and the prompt; what comes after a prompt is read as it is."""
        blocks = self.blocks(embeds.shape[1])
        return None if seen or blocks.hosts == 1 or not blocks.document else self._pieces(embeds, blocks)

    def _pieces(self, embeds: Tensor, blocks: Blocks) -> Iterator[Piece]:
        now, anchor = self._now, blocks.anchor.to(embeds.device)
        try:
            now.blocks = blocks
            if len(anchor):
                now.anchor = True
                places = torch.arange(len(anchor), device=embeds.device)
                yield Piece(embeds[:, anchor], places, 0, cached=False)
                now.anchor = False
            yield Piece(embeds, torch.arange(blocks.length, device=embeds.device), blocks.length)
        finally:
            now.blocks, now.anchor = None, False

    def attend(self, call: AttentionCall) -> Tensor | None:
        """All hosts in turn; None where no prompt is read, and for the anchor, whose keys and values are noted."""
        blocks = self._now.blocks
        if blocks is None:
            return None
        self._check(call)
        if self._now.anchor:
            call.state[_ANCHOR] = call.k, call.v
            return None
        anchor = call.state.pop(_ANCHOR, None)
        layer = Layer(call.q, call.k, call.v, call.scale, anchor, call.rotary, call.site.layer or 0)
        return in_turn(blocks, layer, self.choose)

    def _check(self, call: AttentionCall) -> None:
        """Raise UserError where a layer's attention is not plain and causal."""
        site = call.site
        odd = call.bias is not None or call.softcap is not None or call.sinks is not None or call.dropout
        if odd or site.window is not None or site.latent is not None or not site.causal or site.kv_sharing is not None:
            raise UserError(
                f"apb shares plain causal attention, and {site.name} has more: a window, a cap, sinks, latents or a "
                "bias; use a model as Llama, Qwen or SmolLM"
            )
        call.require_softmax()
        if self.heads:
            self.trained.check(site, self.heads)
            if call.rotary is None:
                raise UserError(f"apb: retaining heads read {site.name} before rotation, which the model does not show")

    def share(self, world: World, mask: AttnMask, layout: Layout | None = None) -> SharedPrompt:
        """The prompt of a causal ``mask`` among the processes of ``world``."""
        if mask.area != Blocks.causal(mask.size):
            raise UserError("apb shares whole causal prompts: leave padding, windows and texts in a row away")
        if mask.size < world.size:
            raise UserError(f"apb: {mask.size} tokens are no prompt for {world.size} hosts: read it in one process")
        return SharedPrompt(self.blocks(mask.size, world.size), self.choose, world.peers(), self._check)
