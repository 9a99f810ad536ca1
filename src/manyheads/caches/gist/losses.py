# SPDX-License-Identifier: Apache-2.0
"""The paper's two losses beside that of the next token: autoencoding by a weak decoder, and weights of importance.

Fine-grained autoencoding (AE): a decoder of one layer is given the keys and values of a gist g_i and a token [ae], and
predicts the r tokens that g_i stands for, each from those before it:

    L_ae = mean over gists i and j = 1 ... r of  -log P(x_ij | g_i, [ae], x_i1 ... x_i(j-1))

Token importance (TIE): a token counts by how much it needs the context, as the model without gists says:

    Diff_i = min( log P(x_i | all before) - log P(x_i | before in its segment), gamma )      w = softmax(Diff)

over the tokens of a text, and the loss of the text is the sum of w_i CE_i: the mean, where no token needs context.

Ours, where the printed text is garbled or silent: a token's segment is that of the token it is predicted from; which
layer's keys and values the decoder sees, a learned mean over all; learned positions 1 ... r; gamma; and the factor of
the AE loss (the recipe's ``ae``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention, silu

from ...attention import reference
from ...errors import UserError

__all__ = ["WeakDecoder", "context_weights", "importance"]


def importance(full: Tensor, own: Tensor, gamma: float) -> Tensor:
    """Weights ``[B, T]`` of the tokens, summing to 1 in each row, without a gradient.

    Args:
        full, own: nats of each token given all before it and given its segment alone, ``[B, T]``.
        gamma: most nats that count.
    """
    return (own - full).detach().clamp(max=gamma).softmax(-1)


@torch.no_grad()
def context_weights(logits: Callable[[Tensor], Tensor], ids: Tensor, segment: int, gamma: float) -> Tensor:
    """:func:`importance` of the T predicted tokens of ``ids [B, T + 1]``, ``[B, T]``.

    Args:
        logits: of the model without gists, ``[B, T] -> [B, T, V]``.
        ids: texts of whole segments, and the token behind them.
        segment: tokens of a segment.
        gamma: see :func:`importance`.

    Raises:
        UserError: T is no multiple of ``segment``.
    """
    if (ids.shape[1] - 1) % segment:
        raise UserError(f"importance is of whole segments: give texts of a multiple of {segment} tokens")
    read, targets = ids[:, :-1], ids[:, 1:]
    full = _nats(logits(read), targets)
    own = _nats(logits(read.reshape(-1, segment)), targets.reshape(-1, segment))
    return importance(full, own.reshape_as(full), gamma)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class WeakDecoder(nn.Module):
    """One transformer layer that reads a gist and gives back its tokens.

    Args:
        dim: D of the model, whose embeddings and output head are used.
        heads, kv_heads, head_dim: of the model's attention.
        layers: how many of its layers have gists.
        ratio: r.
        size: mean norm of the rows of the output head, so that logits are of size 1 at the start.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, layers: int, ratio: int, size: float = 1.0
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.ratio = heads, kv_heads, head_dim, ratio
        self.mean = nn.Parameter(torch.zeros(layers))
        self.begin = nn.Parameter(torch.zeros(dim))  # [ae]
        self.place = nn.Parameter(torch.zeros(ratio, dim))
        self.norms = nn.Parameter(torch.tensor([[1.0], [1.0], [1 / size]]).repeat(1, dim))
        self.q, self.o = nn.Linear(dim, heads * head_dim, bias=False), nn.Linear(heads * head_dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], embeds: Tensor) -> Tensor:
        """Hidden states ``[N, r, D]``, of which the head makes predictions of the r tokens.

        Args:
            keys, values: of N gists by layer, ``[N, Hkv, 1, d]``.
            embeds: of the tokens that each stands for, ``[N, r, D]``.
        """
        weights = self.mean.softmax(0)
        k = torch.einsum("l,lnhtd->nhtd", weights, torch.stack([keys[i].float() for i in sorted(keys)]))
        v = torch.einsum("l,lnhtd->nhtd", weights, torch.stack([values[i].float() for i in sorted(values)]))
        size = len(embeds)
        x = torch.cat([self.begin.to(embeds.dtype).expand(size, 1, -1), embeds[:, :-1]], 1) + self.place
        h = self._norm(x, 0)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mine = self.kv(h).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([k.to(q.dtype), mine[0]], 2), torch.cat([v.to(q.dtype), mine[1]], 2)
        mask = torch.ones(self.ratio, self.ratio + 1, dtype=torch.bool, device=x.device).tril(1)
        out = scaled_dot_product_attention(
            q, reference.repeat_kv(k, self.heads), reference.repeat_kv(v, self.heads), mask
        ).transpose(1, 2)
        x = x + self.o(out.flatten(2))
        gate, up = self.up(self._norm(x, 1)).chunk(2, -1)
        return self._norm(x + self.down(silu(gate) * up), 2)

    def _norm(self, x: Tensor, number: int) -> Tensor:
        return rms_norm(x.float(), x.shape[-1:], self.norms[number], 1e-6).to(x.dtype)

    def loss(
        self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor], ids: Tensor, embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor], most: int = 2048,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """L_ae in nats per token, and the share of the tokens that are given back; both scalars.

        Args:
            keys, values: of all gists by layer, ``[B, Hkv, G, d]``.
            ids: tokens that they stand for, ``[B, G * r]``.
            embed, head: the model's embedding and output head.
            most: so many gists at most are read, drawn at random.
        """
        tokens = ids.reshape(-1, self.ratio)
        chosen = torch.rand(len(tokens), device=ids.device).argsort()[:most]
        k, v = (
            {i: x.transpose(1, 2).flatten(0, 1).index_select(0, chosen)[:, :, None] for i, x in p.items()}
            for p in (keys, values)
        )
        logits = head(self(k, v, embed(tokens[chosen]))).float()
        wanted = tokens[chosen].flatten()
        loss = cross_entropy(logits.flatten(0, 1), wanted)
        return loss, (logits.flatten(0, 1).argmax(-1) == wanted).float().mean()
