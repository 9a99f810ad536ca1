# SPDX-License-Identifier: Apache-2.0
"""The edges of a decoder as writers and readers of its residual stream, and what its blocks compute, one run read.

Writers are the embeddings I, every head and every MLP; readers are the query, key and value inputs of heads, the inputs
of MLPs, and the logits O. A writer has an edge to every reader that stands behind it: MLPs that run beside attention
(GPT-NeoX) read no head of their own block. With grouped queries the key and value inputs belong to the key/value head
that its query heads share: one edge, not a copy for each of them.

Which modules these are is found from the numbers of a run, so that no architecture has to be known: what attention and
one other module of a block give adds up to what the block changes. Where it does not (a norm behind the projection, as
in Gemma 2 and 3 and OLMo 2) heads do not write to the stream, and the model is refused.
Sizes: B rows, T tokens, H heads, Hkv key/value heads, D channels, U writers, R readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...call import AttentionCall, Site
from ...errors import UserError
from ...strategy import AttentionWatch, BlockParts

__all__ = ["Block", "Graph", "Layer", "Run", "run_model"]

_ROUNDING = 1e-4  # of the change of a block, in float32, that no module explains


@dataclass(frozen=True)
class Layer:
    """A block as the graph sees it.

    Attributes:
        site: of its attention.
        heads, kv_heads: how many.
        mlp: whether it has one; ``beside``, whether that runs beside attention.
        sources: U before this block's own heads, and so the first of them.
        readers: R before this block's: its q, then k, v, and the MLP.
    """

    site: Site
    heads: int
    kv_heads: int
    mlp: bool
    beside: bool
    sources: int
    readers: int

    @property
    def writers(self) -> int:
        """Heads and MLP."""
        return self.heads + self.mlp

    @property
    def inputs(self) -> int:
        """Readers: q of each head, k and v of each key/value head, MLP."""
        return self.heads + 2 * self.kv_heads + self.mlp

    @property
    def number(self) -> int:
        """By which heads are named."""
        return self.site.index if self.site.layer is None else self.site.layer


@dataclass(frozen=True)
class Graph:
    """Writers and readers of a model; the last reader is O."""

    layers: tuple[Layer, ...]

    @property
    def writers(self) -> int:
        """U: I, and heads and MLP of every block."""
        return 1 + sum(layer.writers for layer in self.layers)

    @property
    def readers(self) -> int:
        """R: those of every block, and O."""
        return 1 + sum(layer.inputs for layer in self.layers)

    @cached_property
    def edges(self) -> Tensor:
        """``[U, R]``, True where there is an edge."""
        made = torch.zeros(self.writers, self.readers, dtype=torch.bool)
        for layer in self.layers:
            end = layer.readers + layer.inputs
            made[: layer.sources, layer.readers : end] = True
            if layer.mlp and not layer.beside:
                made[layer.sources : layer.sources + layer.heads, end - 1] = True
        made[:, -1] = True
        return made

    @cached_property
    def feeds(self) -> Tensor:
        """``[R, U]``, True where what a reader reads goes into what a writer writes; O feeds none."""
        made = torch.zeros(self.readers, self.writers, dtype=torch.bool)
        for layer in self.layers:
            group = layer.heads // layer.kv_heads
            for head in range(layer.heads):
                k = layer.readers + layer.heads + head // group
                made[[layer.readers + head, k, k + layer.kv_heads], layer.sources + head] = True
            if layer.mlp:
                made[layer.readers + layer.inputs - 1, layer.sources + layer.heads] = True
        return made

    def names(self) -> tuple[list[str], list[str]]:
        """Of writers and readers: ``I``, ``3.1``, ``MLP 3``; ``3.1 q``, ``3.0 k``, ``MLP 3``, ``O``."""
        writers, readers = ["I"], []
        for layer in self.layers:
            mlp = [f"MLP {layer.number}"] * layer.mlp
            writers += [*(f"{layer.number}.{h}" for h in range(layer.heads)), *mlp]
            readers += [f"{layer.number}.{h} q" for h in range(layer.heads)]
            readers += [f"{layer.number}.{h} {kind}" for kind in "kv" for h in range(layer.kv_heads)] + mlp
        return writers, [*readers, "O"]


@dataclass
class Block:
    """What a block computed, in the graph of autograd where there is one.

    Attributes:
        site: of its attention.
        q, k, v, z: ``[B, H or Hkv, T, d]`` and the heads' outputs ``[B, T, H, dv]``.
        before, attention, mlp, after: ``[B, T, D]``: the stream before it, what its modules add, the stream behind it.
        mlp_name: path of the module that adds beside attention, empty without.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    z: Tensor
    before: Tensor = field(default_factory=lambda: torch.zeros(()))
    attention: Tensor = field(default_factory=lambda: torch.zeros(()))
    mlp: Tensor | None = None
    after: Tensor = field(default_factory=lambda: torch.zeros(()))
    mlp_name: str = ""

    @property
    def weight(self) -> Tensor:
        """W_O as ``[H, dv, D]``."""
        if self.site.output is None:
            raise UserError(f"{self.site.name} has no output projection that is known, so that no head's write is")
        weight: Tensor = self.site.output().detach()
        made: Tensor = weight.T.unflatten(0, tuple(self.z.shape[2:]))
        return made


@dataclass(frozen=True, kw_only=True)
class _Read(AttentionWatch, BlockParts):
    """Keeps what every block of the decoder computes."""

    blocks: dict[str, Block] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.kind == "self" and site.causal

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        self.blocks[call.site.name] = Block(call.site, call.q, call.k, call.v, out)

    def parts(
        self, site: Site, before: Tensor, parts: dict[str, Tensor], hidden: Tensor, state: dict[str, Any]
    ) -> None:
        block = self.blocks[site.name]
        given = parts.get(site.name)
        left = None if given is None else hidden.detach() - before.detach() - given.detach()
        if given is None or left is None:
            raise UserError(f"{site.name} does not write to the residual stream of its block by itself")
        limit = _ROUNDING * float((hidden - before).detach().norm()) + 1e-6 * float(hidden.detach().norm())
        block.before, block.attention, block.after = before, given, hidden
        if float(left.norm()) <= limit:
            return
        for name, part in parts.items():
            if name != site.name and float((left - part.detach()).norm()) <= limit:
                block.mlp, block.mlp_name = part, name
                return
        raise UserError(
            f"what {site.name} and one module beside it give does not add up to what their block changes: a norm "
            "stands behind them, or a factor, and no head writes to the residual stream; take another model"
        )

    def residual(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        return hidden


@dataclass(frozen=True)
class Run:
    """A forward that was read: ``blocks`` in the order of the model, and logits ``[B, kept, V]``."""

    blocks: list[Block]
    logits: Tensor

    def graph(self) -> Graph:
        """Its writers and readers."""
        made: list[Layer] = []
        sources, readers = 1, 0
        for block in self.blocks:
            heads, kv = block.q.shape[1], block.k.shape[1]
            beside = block.mlp is not None and not _reads(block)
            made.append(Layer(block.site, heads, kv, block.mlp is not None, beside, sources, readers))
            sources, readers = sources + made[-1].writers, readers + made[-1].inputs
        return Graph(tuple(made))


def _reads(block: Block) -> bool:
    """Whether the MLP of a block reads what its heads wrote."""
    if block.mlp is None or not block.mlp.requires_grad:
        return block.mlp is not None
    back = torch.autograd.grad(block.mlp.sum(), block.attention, retain_graph=True, allow_unused=True)[0]
    return back is not None


def run_model(
    model: nn.Module, use: Callable[..., Any], embeddings: Tensor, kept: int, *others: Any
) -> Run:  # fmt: skip
    """Read a forward of ``embeddings [B, T, D]``; logits of the last ``kept`` tokens.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        use: :func:`manyheads.use`.
        embeddings: of the tokens; a forward with gradients where they have any.
        kept: tokens whose logits are wanted.
        others: strategies that act in the same forward, before it is read.

    Raises:
        UserError: heads of this architecture do not write to the residual stream.
    """
    read = _Read()
    with use(model, *others, read):
        logits: Tensor = model(inputs_embeds=embeddings, use_cache=False).logits[:, -kept:]
    blocks: Sequence[Block] = list(read.blocks.values())
    if not blocks:
        raise UserError(f"{type(model).__name__} has no causal self-attention to read")
    return Run(list(blocks), logits)
