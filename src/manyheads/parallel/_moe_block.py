# SPDX-License-Identifier: Apache-2.0
"""A decoder block with a mixture of experts, of which each process has some tokens and some experts.

Attention is shared by heads (DeepSpeed-Ulysses): an all-to-all gives each process all tokens for a part of the heads
and another takes the outputs back. The feed-forward layer is shared by experts. Weights of attention, norms and router
are whole in every process; gradients of a process are its part of the sum over all.

What a block holds for the way back, in numbers of width h for each of its T tokens, with m query heads for each of keys
and values, k experts of width f h chosen:

    held        numbers                    computed again
    all         whatever autograd saves    nothing
    products    4 + 2/m + 2 k f            norms, what travels, SwiGLU
    values      4                          also queries, keys and values, and the experts' first products

In ``values``: the block's input, the first norm's output, attention's output and what enters the second norm. In
``products``: the input, queries, keys and values, attention's output, what enters the second norm, and the experts'
gates and values (of the tokens that its experts have). Attention itself is not run again, nor are the experts' last
products, and their sums do not travel again. Beside these there are the log-sum-exp of each token and head in float32,
and the block's output, which is the input of the next.

The paper prints ``4 + 2/m + 2 k f`` for what is left of ``2 n + 2 k + 3 k f + 12 + 5/m``; of what is kept there are
notes alone, which name ``values`` and its outputs. Both are here. As weights of the router multiply what enters an
expert's last matrix, no gradient asks for what comes out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ._context import World
from ._experts import Dispatch, ExpertParallel, gated, grouped
from ._peers import Peers
from ._remat import Keep, rematerialise
from ._travel import Trip

__all__ = ["HELD", "Held", "MoeBlock", "MoeConfig", "held_numbers"]

Held = Literal["all", "products", "values"]
HELD: tuple[Held, ...] = ("all", "products", "values")


@dataclass(frozen=True)
class MoeConfig:
    """Sizes of a block.

    Attributes:
        dim, heads, kv_heads: width, query heads, heads of keys and values; a head has ``dim / heads`` channels.
        experts, top_k, inner: experts, how many a token chooses, their width.
    """

    dim: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    inner: int


def held_numbers(config: MoeConfig, held: Held) -> float:
    """Numbers of activations that a block holds for each of its tokens, in its dtype, by the formula.

    Not among them: the log-sum-exp, indices, and the block's output.

    Raises:
        UserError: there is none for ``all``: that is up to autograd.
    """
    if held == "all":
        raise UserError("what autograd saves by itself has no formula here: measure it with saved_bytes")
    products = 2 * config.dim * config.kv_heads / config.heads + 2 * config.top_k * config.inner
    return 4 * config.dim + (products if held == "products" else 0)


class MoeBlock(nn.Module):
    """Pre-norm block: causal attention, then experts; positions are up to the caller, who adds them to the input.

    Attributes:
        config: sizes.
        held: what is held for the way back.
    """

    def __init__(self, config: MoeConfig, world: World, dispatch: Dispatch, held: Held = "values") -> None:
        """With the weights of this process; all processes draw all weights, from one seed alike.

        Raises:
            UserError: heads that the processes cannot share.
        """
        super().__init__()
        if config.heads % world.size or config.kv_heads % world.size:
            raise UserError(f"{world.size} processes cannot share {config.heads} heads, {config.kv_heads} of keys")
        self.config, self.held = config, held
        self.shared = ExpertParallel(world, config.experts, config.top_k, dispatch)
        self.peers = self.shared.peers
        self.width = config.dim // config.heads
        self.norm_1, self.norm_2 = (nn.RMSNorm(config.dim, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v = (
            nn.Linear(config.dim, heads * self.width, bias=False)
            for heads in (config.heads, config.kv_heads, config.kv_heads)
        )
        self.out = nn.Linear(config.heads * self.width, config.dim, bias=False)
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        gate_up = config.dim**-0.5 * torch.randn(config.experts, 2 * config.inner, config.dim)
        down = config.inner**-0.5 * torch.randn(config.experts, config.dim, config.inner)
        self.gate_up = nn.Parameter(gate_up[self.shared.mine].clone())
        self.down = nn.Parameter(down[self.shared.mine].clone())

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """``[B, T, D]`` of this process -> the same.

        Args:
            hidden: its tokens, consecutive ones.
            lengths: T of each process.
        """
        if self.held == "all":
            return self._run(lambda operation, *args: operation(*args), hidden, lengths)
        return rematerialise(lambda keep, x: self._run(keep, x, lengths), hidden, parameters=tuple(self.parameters()))

    def _run(self, keep: Keep, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        def run(operation: Keep, *args: Tensor) -> Tensor:  # of a product of matrices
            found: Tensor = keep(operation, *args) if self.held == "products" else operation(*args)
            return found

        # A view: gradients of the norm are added to each other first, then to the residual's, whatever is held.
        normed = keep(self._normed, hidden) if self.held == "values" else self.norm_1(hidden.view_as(hidden))
        leaving = [  # each leaves while the next is computed
            _leave(run(layer, normed).unflatten(2, (-1, self.width)), self.peers, lengths)
            for layer in (self.q, self.k, self.v)
        ]
        mixed = keep(_attention, *(_to_heads(trip.arrive()) for trip in leaving))
        mixed = _home(mixed, hidden.shape[1], self.peers, lengths)
        hidden = keep(lambda x, y: x + self.out(y), hidden, mixed)
        x = self.norm_2(hidden).flatten(0, 1)
        index, weight = self.route(x)
        route = self.shared.send(x, index, weight)
        rows = route.arrive()
        inner = gated(run(lambda x: grouped(x, self.gate_up, rows.counts), rows.x), rows.weight)

        def finish(x: Tensor, inner: Tensor) -> Tensor:
            return x + route.home(grouped(inner, self.down, rows.counts)).view_as(x)

        found: Tensor = keep(finish, hidden, inner)
        return found

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of tokens ``x [T, D]``, ``[T, k]``, and their weights in the dtype of ``x``, which add up to 1."""
        weight, index = self.router(x).softmax(-1).topk(self.config.top_k)
        return index, weight / weight.sum(-1, keepdim=True)

    def _normed(self, hidden: Tensor) -> Tensor:
        """The first norm, of which only the result stays."""
        return rematerialise(lambda _, x: self.norm_1(x), hidden, parameters=(self.norm_1.weight,))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _leave(x: Tensor, peers: Peers, lengths: Sequence[int]) -> Trip:
    """``[B, T, H, d]`` of this process's tokens leave, to each process a part of the heads."""
    rows = x.unflatten(2, (len(peers), -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)  # [n T, B, H / n, d]
    return Trip(rows, peers, [x.shape[1]] * len(peers), lengths, "heads")


def _to_heads(rows: Tensor) -> Tensor:
    """``[S, B, H / n, d]`` of all tokens, as attention takes it."""
    return rows.permute(1, 2, 0, 3)


def _home(x: Tensor, tokens: int, peers: Peers, lengths: Sequence[int]) -> Tensor:
    """``[B, H / n, S, d]`` of all tokens -> ``[B, T, H d]`` of this process's."""
    rows = Trip(x.permute(2, 0, 1, 3), peers, lengths, [tokens] * len(peers), "heads").arrive()
    found: Tensor = rows.unflatten(0, (len(peers), -1)).permute(2, 1, 0, 3, 4).flatten(2)
    return found.contiguous()  # of one process it is a view, and the product that follows would hold a copy
