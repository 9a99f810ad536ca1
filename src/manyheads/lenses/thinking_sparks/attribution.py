# SPDX-License-Identifier: Apache-2.0
"""Edge attribution patching with integrated gradients (EAP-IG), and exact patching of edges and heads.

    score(u -> v) = < z_u - z'_u , mean over k = 1..m of d L / d in(v) at z' + k/m (z - z') >,

z the clean run, z' the corrupted one, the path that of the token embeddings, L = KL(clean || run) at the positions of
the answer. Scores out of I add up to L(z) - L(z') as m grows: below 0 is what a corrupted edge would lose.

All m points are one batch. For each block the gradients of its q, k, v and of its MLP go back to what they read, one
row for each reader, summed over the points; they meet the differences of all earlier writers at once, and no more than
one block's head writes ``[H, T, D]`` are ever made: memory grows linearly with the length. In a patched run every
reader of a block is a row of the batch with an input of its own, and attention takes each head's q, k and v from its
row: one forward, whatever the edges.
Sizes: T tokens, A answer tokens, H heads, D channels, V vocabulary, U writers, R readers, N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...call import AttentionCall, Site
from ...calls.edits import heads_at
from ...errors import UserError
from ...lens import device_of
from ...strategy import AttentionEdit, AttentionPatch, BlockParts
from .._patching import PatchHeads
from .graph import Block, Graph, Layer, run_model

__all__ = ["Pair", "PairRuns"]

_ROWS = 8  # points of the path, or patched heads, in one batch


@dataclass(frozen=True)
class Pair:
    """Two prompts of one length: token ids ``[T]``, and where the answer starts, whose predictions are compared."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        """Refuse what cannot be interpolated."""
        if len(self.clean) != len(self.corrupted) or not 0 <= self.start < len(self.clean):
            raise UserError("the prompts of a pair have as many tokens, and an answer: cut the longer one")


@dataclass(frozen=True, kw_only=True)
class _Patched(AttentionEdit, AttentionPatch, BlockParts):
    """The model on its edges in ``kept [U, R]``; others carry what they do in the corrupted run."""

    runs: PairRuns = field(compare=False)
    kept: Tensor = field(compare=False)
    moved: list[Tensor] = field(default_factory=list, compare=False)  # [n, T, D] by which writers differ from z'

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.kind == "self" and site.causal

    def _at(self, site: Site) -> tuple[int, Layer, Block]:
        at = self.runs.places[site.name]
        return at, self.runs.graph.layers[at], self.runs.corrupted[at]

    def inputs(self, first: int, count: int, rows: int, base: Tensor) -> Tensor:
        """What ``count`` readers from ``first`` on read, ``[rows, T, D]``, the last of them in all rows behind."""
        moved = torch.cat(self.moved)
        mask = self.kept[: len(moved), first : first + count].to(moved.dtype)
        made = base + torch.einsum("ur,utd->rtd", mask, moved)
        return torch.cat([made, made[-1:].expand(rows - count, -1, -1)])

    def edit(self, call: AttentionCall) -> AttentionCall:
        rows, (_, layer, _) = len(call.q), self._at(call.site)
        heads, groups = torch.arange(layer.heads), torch.arange(layer.kv_heads)
        return call.replace(
            q=call.q[heads, heads][None].expand(rows, -1, -1, -1),
            k=call.k[layer.heads + groups, groups][None].expand(rows, -1, -1, -1),
            v=call.v[layer.heads + layer.kv_heads + groups, groups][None].expand(rows, -1, -1, -1),
        )

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        _, layer, there = self._at(call.site)
        self.moved.append(_writes(out[0] - there.z[0], there.weight))
        if not layer.mlp or layer.beside:
            return out
        made, row = out.clone(), layer.inputs - 1
        lost = ~self.kept[layer.sources : layer.sources + layer.heads, layer.readers + row]
        made[row:, :, lost] = there.z[:1, :, lost]  # the MLP's row alone reads this block's heads
        return made

    def parts(
        self, site: Site, before: Tensor, parts: dict[str, Tensor], hidden: Tensor, state: dict[str, Any]
    ) -> None:
        _, layer, there = self._at(site)
        if there.mlp is not None:
            self.moved.append(parts[there.mlp_name][layer.inputs - 1][None] - there.mlp[:1])

    def residual(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        at, layer, there = self._at(site)
        later = self.runs.graph.layers[at + 1 :]
        count = later[0].inputs if later else 1
        return self.inputs(layer.readers + layer.inputs, count, len(hidden), there.after[0])


class PairRuns:
    """The two runs of a pair, and what can be asked of them.

    Args:
        model: a causal language model of transformers in float32 or float64, in evaluation mode; freeze its weights.
        use: :func:`manyheads.use`.
        pair: of prompts.

    Attributes:
        graph: writers and readers.
        clean, corrupted: blocks of the two runs, one row each.
        loss: L of the corrupted run, nats.
    """

    def __init__(self, model: nn.Module, use: Callable[..., Any], pair: Pair) -> None:
        self.model, self.use, self._kept = model, use, len(pair.clean) - pair.start
        ids = torch.tensor([pair.clean, pair.corrupted], device=device_of(model))
        embed: Any = model
        with torch.no_grad():
            self._ends: Tensor = embed.get_input_embeddings()(ids)
            clean, corrupted = (run_model(model, use, row[None], self._kept) for row in self._ends)
        with torch.enable_grad():
            one = self._ends[:1, -1:].detach().requires_grad_()
            self.graph: Graph = run_model(model, use, one, 1).graph()
        self.clean, self.corrupted = clean.blocks, corrupted.blocks
        self.places = {block.site.name: i for i, block in enumerate(self.clean)}
        self._log_p = clean.logits.double().log_softmax(-1)
        self.loss = float(self.kl(corrupted.logits)[0])

    def kl(self, logits: Tensor) -> Tensor:
        """L of each row of ``logits [B, A, V]``: KL from the clean run, mean over the answer, nats ``[B]``."""
        return (self._log_p.exp() * (self._log_p - logits.double().log_softmax(-1))).sum(-1).mean(-1)

    def scores(self, steps: int = 5) -> Tensor:
        """``score(u -> v)``, float ``[U, R]``, 0 where there is no edge.

        Args:
            steps: m; 0 is EAP, with the gradient of the corrupted run alone: at the clean one KL has none.
        """
        points = [k / steps for k in range(1, steps + 1)] if steps else [0.0]
        found = torch.zeros(self.graph.writers, self.graph.readers, dtype=self._ends.dtype, device=self._ends.device)
        for start in range(0, len(points), _ROWS):
            part = self._ends.new_tensor(points[start : start + _ROWS])[:, None, None]
            path = (self._ends[1] + part * (self._ends[0] - self._ends[1])).requires_grad_()
            with torch.enable_grad():
                run = run_model(self.model, self.use, path, self._kept)
                loss = self.kl(run.logits).sum() / len(points)
            for first, writers, back in self._backward(loss, run.blocks):
                for at, moved in self._differences(writers):
                    found[at : at + len(moved), first : first + len(back)] += torch.einsum("utd,rtd->ur", moved, back)
        return found * self.graph.edges.to(found)

    def _differences(self, writers: int) -> Iterator[tuple[int, Tensor]]:
        """By which the first writers differ between the runs: their place, and ``[n, T, D]``, a block at a time."""
        yield 0, self.clean[0].before - self.corrupted[0].before
        for layer, z, other in zip(self.graph.layers, self.clean, self.corrupted, strict=True):
            if layer.sources >= writers:
                return
            yield layer.sources, _writes((z.z - other.z)[0], z.weight)
            if z.mlp is not None and other.mlp is not None:
                yield layer.sources + layer.heads, z.mlp - other.mlp

    def _backward(self, loss: Tensor, blocks: Sequence[Block]) -> Iterator[tuple[int, int, Tensor]]:
        """Gradients of what readers read, summed over the rows: the first reader, its writers, and ``[n, T, D]``."""
        outputs = [x for b in blocks for x in (b.q, b.k, b.v, *([] if b.mlp is None else [b.mlp]))]
        *slopes, last = torch.autograd.grad(loss, [*outputs, blocks[-1].after], retain_graph=True)
        yield self.graph.readers - 1, self.graph.writers, last.sum(0, keepdim=True)
        given = iter(slopes)
        for layer, block in zip(self.graph.layers, blocks, strict=True):
            made = [_by_head(x, block.before, next(given)) for x in (block.q, block.k, block.v)]
            if block.mlp is not None:
                read = block.before if layer.beside else block.attention  # which only adds to what the MLP reads
                back = torch.autograd.grad(block.mlp, read, next(given), retain_graph=True)[0]
                made.append(back.sum(0, keepdim=True))
            yield layer.readers, layer.sources + layer.heads, torch.cat(made)

    @torch.no_grad()
    def patched(self, kept: Tensor) -> float:
        """L of the run in which the edges outside ``kept`` (bool ``[U, R]``) are as in the corrupted one."""
        rows = max(layer.inputs for layer in self.graph.layers)
        patch = _Patched(runs=self, kept=(kept & self.graph.edges).to(self._ends.device))
        patch.moved.append(self._ends[:1] - self._ends[1:])
        inputs = patch.inputs(0, self.graph.layers[0].inputs, rows, self._ends[1])
        patch.moved[0] = self.clean[0].before - self.corrupted[0].before
        with self.use(self.model, patch):
            logits = self.model(inputs_embeds=inputs, use_cache=False).logits[:1, -self._kept :]
        return float(self.kl(logits)[0])

    @torch.no_grad()
    def patched_heads(self, heads: Sequence[str]) -> Tensor:
        """L of a run in which one head (``layer.head``) gives what it does in the corrupted one, for each: ``[n]``."""
        other = {block.site.name: block.z for block in self.corrupted}
        found = []
        for start in range(0, len(heads), _ROWS):
            part = heads[start : start + _ROWS]
            gates = {}
            for layer in self.graph.layers:
                gates[layer.site.name] = self._ends.new_zeros(len(part), layer.heads)
                for row, name in enumerate(part):
                    gates[layer.site.name][row, heads_at([name], layer.site, layer.heads)] = 1.0
            with self.use(self.model, PatchHeads(other=other, gates=gates)):
                logits = self.model(
                    inputs_embeds=self._ends[:1].expand(len(part), -1, -1), use_cache=False
                ).logits[:, -self._kept :]  # fmt: skip
            found.append(self.kl(logits))
        return torch.cat(found)


def _writes(z: Tensor, weight: Tensor) -> Tensor:
    """What heads add to the stream: ``[H, T, D]`` of ``z [T, H, dv]`` and W_O ``[H, dv, D]``."""
    return torch.einsum("thd,hde->hte", z, weight.to(z.dtype))


def _by_head(x: Tensor, read: Tensor, slope: Tensor) -> Tensor:
    """The gradient by way of each head of ``x [B, n, T, d]`` on ``read [B, T, D]``, its source: ``[n, T, D]``."""
    heads = x.shape[1]
    one = torch.eye(heads, dtype=x.dtype, device=x.device)[:, None, :, None, None]
    return torch.autograd.grad(x, read, one * slope, retain_graph=True, is_grads_batched=True)[0].sum(1)
