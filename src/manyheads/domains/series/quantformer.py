# SPDX-License-Identifier: Apache-2.0
"""Quantformer: from attention to profit with a quantitative transformer trading strategy.

arXiv 2404.00424, version 3. A Transformer reads numbers in place of words: each of 20 periods of a share, its return
and its turnover, both z-scores over all shares, becomes a token by a linear layer. There are no positions, no masks and
no generation of one token after the other, and the last token says a class of the share's next return.

    e = W x + b                        x [n, 20, 2], of n shares
    e = LN(e + MHA(e)), LN(e + FFN(e))                                        ``layers`` times
    d = LN(d + MHA(d)), LN(d + MHA(d, e, e)), LN(d + FFN(d))      from d = e, ``layers`` times
    y = softmax(W' d_20 + b')          class 0 the highest; the loss is mean (y - one hot)^2

As nothing marks positions, the order of the 19 periods before the last one cannot be seen. Shares whose return lies
between two classes are left out of training, or have the target 0 (``between=zero``). The portfolio, ranked by y_0, is
the task's. FFN is 4 times as wide in the paper; here its width is what makes parameters equal.

The released notebook moves periods to the first axis and then takes that axis for the batch: each period attends to the
same period of the other shares that happen to be in the batch, and as the last token alone is read, earlier periods
change nothing. For one share at a time, as it is used there, no attention is left. What it computes is kept as
``attend=shares``, with the shares of one date in place of those of a batch. It also puts no softmax before the squared
error; the paper does. The paper gives the class [1, 0, 0] to the lowest returns in one section and to the highest in
another: to the highest here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["QuantTransformer", "Quantformer"]


class QuantTransformer(nn.Module):
    """Shares of several dates ``[B, S, L, 2]`` -> logits ``[B, S, classes]``, 0 where ``mask [B, S]`` has no share.

    Args:
        attend: over the periods of a share, or over the shares of a date, period by period.
        classes: of the last layer.
        dim, layers, heads, dropout: sizes; so many layers has the encoder, and the decoder as many.
        width: of the feed-forward parts.
    """

    def __init__(
        self, attend: str, classes: int, dim: int, layers: int, heads: int, dropout: float, width: int
    ) -> None:
        super().__init__()
        self.attend, self.embed = attend, nn.Linear(2, dim)
        sizes = (dim, heads, width, dropout)
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(*sizes, batch_first=True) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(*sizes, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(dim, classes)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        if self.attend == "time":
            last = self.tokens(self.embed(inputs[mask]))[:, -1]
        else:
            (shares, periods), every = mask.shape[1:] + inputs.shape[2:3], self.embed(inputs).transpose(1, 2)
            hidden = ~mask[:, None].expand(-1, periods, -1).flatten(0, 1)
            found = self.tokens(every.flatten(0, 1), hidden)
            last = found.view(-1, periods, shares, found.shape[-1])[:, -1][mask]
        logits: Tensor = self.head(last)
        out = logits.new_zeros(*mask.shape, logits.shape[-1])
        out[mask] = logits
        return out

    def tokens(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """``[n, N, dim] -> [n, N, dim]``, attention over N; ``hidden [n, N]`` is True where none is to be paid."""
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=hidden)
        memory = x
        for layer in self.decoder:
            x = layer(x, memory, tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        return x


@dataclass(frozen=True, kw_only=True)
class Quantformer(Recipe):
    """A Transformer on numbers that ranks shares by the class of their next return.

    Attributes:
        attend: over the periods of a share (the paper), or, as the released code does, over shares.
        between: shares between classes are left out of training, or trained on with the target 0.
    """

    task: ClassVar[str] = "stock_ranking"

    attend: Literal["time", "shares"] = field(
        default="time", metadata={"help": "over time (the paper), or over shares, as the released code does"}
    )
    between: Literal["out", "zero"] = field(
        default="out", metadata={"help": "shares between classes: out of training, or with target zero"}
    )

    def build(self, task: Any, width: int) -> nn.Module:
        if self.between == "zero" and task.classes * task.top > 1 - 1e-9:
            raise UserError(
                f"quantformer: between=zero is about shares between classes, and {task.classes} classes of "
                f"{task.top:g} leave none; give --task stock_ranking:classes=3"
            )
        return QuantTransformer(self.attend, task.classes, task.dim, task.layers, task.heads, task.dropout, width)

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        logits, labels = model(batch["inputs"], batch["mask"]).float(), batch["labels"]
        seen = batch["mask"] if self.between == "zero" else labels >= 0
        wanted = one_hot(labels[seen].clamp(min=0), logits.shape[-1]) * (labels[seen] >= 0)[:, None]
        found: Tensor = mse_loss(logits[seen].softmax(-1), wanted.float())
        return found

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Attention of the last period by how long ago, by layer of the encoder; none where it is over shares."""
        assert isinstance(model, QuantTransformer)
        if model.attend != "time":
            return ()
        x, rows = model.embed(batch["inputs"][batch["mask"]]), []
        for layer in model.encoder:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            rows.append(layer.self_attn(x, x, x)[1][:, -1].float().mean(0).tolist())
            x = layer(x)
        columns = [str(k) for k in reversed(range(x.shape[1]))]
        labels = [str(i) for i in range(len(rows))]
        return (Picture("attention of the last period", labels, columns, rows, ("layers", "periods ago")),)
