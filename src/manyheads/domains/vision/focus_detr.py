# SPDX-License-Identifier: Apache-2.0
r"""Focus-DETR: an encoder that refines only tokens which may be of an object (arXiv 2307.12612, "Less is More").

Tokens of maps of several scales are scored, coarsest map first; each of the encoder's layers refines the best of them,
fewer from layer to layer, and leaves the others as they are:

    s_L = P(x_L),   s_l = P(x_l (1 + a_l up(s_l+1))),   P: LayerNorm, linear, GELU, half of the channels replaced by
                    their mean over the map, and three linear layers down to one number; a_l is learned
    kept_i      = the c_i (floor(share N) + 1) tokens of highest s, of N of an image; c = 1, 0.8, 0.6, 0.6, 0.4, 0.2
    objects     = of those, the tokens of highest sigmoid(s) max_c p(c | token): they attend to each other in full
    layer       = norm(objects + attention(objects)), put back; deformable attention of the kept tokens to all; FFN
    loss        = that of the detector + weight focal(s, label), over the positive tokens of an image

A token is positive if its centre lies in a box, and the farthest edge of that box is within the range of its level:
up to ``reach`` strides on the finest one, twice as far on each coarser one, without an upper end on the coarsest. The
paper speaks of ranges that overlap; those of the released code do not (``overlap=1``).

As in the released code the values that layers read are the features of the backbone in each layer (``values``). Other
than there, objects are chosen by probabilities and not by the product of two logits, which is largest where both are
very negative; the class of a token is read off the same projection as that of a proposal; tokens beside an image are
no part of the mean, of the counts or of the loss. Of six factors of the cascade, layers beyond the sixth have the last.

``by`` says what tokens are kept by, so that the scoring can be judged alone: ``decoder`` has the same network learn
which tokens the decoder attends to most (as Sparse DETR, arXiv 2111.14330; of each map alone), ``norm`` takes the
longest features, ``random`` any. Then objects are chosen by their class, with ``decoder`` by both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["CASCADE", "FocusDetr", "FocusEncoder", "Scorer", "counts", "foreground"]

CASCADE = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)  # share of the kept tokens that each layer refines
_WHOLE = 1e-6  # a product that should be whole may lie below it by rounding


@dataclass(frozen=True, kw_only=True)
class FocusDetr(Recipe):
    """Trains a detector whose encoder refines foreground tokens alone."""

    task: ClassVar[str] = "object_detection"

    share: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.5, metadata={"help": "of the tokens of an image that are kept, rho"}
    )
    by: Literal["foreground", "decoder", "norm", "random"] = field(
        default="foreground", metadata={"help": "what they are kept by; all but the first are others' or controls"}
    )
    cascade: bool = field(default=True, metadata={"help": "deeper layers refine fewer of them"})
    objects: Annotated[int, Field(ge=0)] = field(
        default=300, metadata={"help": "tokens that attend to each other in full, in each layer"}
    )
    top_down: bool = field(default=True, metadata={"help": "scores of a map go into those of the next finer one"})
    values: Literal["features", "tokens"] = field(
        default="features",
        metadata={"help": "what layers read: the backbone's features, or tokens as they are"},
    )
    weight: float = field(default=1.5, metadata={"help": "of the loss of foreground scores"})
    reach: Annotated[float, Field(gt=0)] = field(
        default=8.0, metadata={"help": "strides to the farthest edge of a box, of tokens of its finest map"}
    )
    overlap: Annotated[float, Field(ge=1)] = field(
        default=1.0, metadata={"help": "factor by which ranges of maps are widened at both ends"}
    )

    def build(self, task: FieldTask, width: int) -> nn.Module:
        model: Any = task.reference(width)
        model.encoder = FocusEncoder(self, model.encoder.layers, task.dim, task.heads, task.dropout, len(model.level))
        for layer in model.layers:
            layer.attention.show = self.by == "decoder"
        return model  # type: ignore[no-any-return]

    def loss(self, task: FieldTask, model: Any, batch: Batch) -> Tensor:
        own: Any = task
        found = model(batch["images"], batch["extent"])
        loss: Tensor = own.criterion(found, batch)
        scores, maps = found.encoded.scores, found.maps
        if self.by == "foreground":
            height, width = batch["images"].shape[2:]
            points = maps.points * maps.points.new_tensor((width, height))
            labels = foreground(
                points, maps.shapes, pixels(batch, width, height), stride=model.stride, reach=self.reach,
                overlap=self.overlap,
            )  # fmt: skip
            loss = loss + self.weight * own.token_loss(scores, labels, maps.there)
        if self.by == "decoder":
            attended = torch.stack([layer.attention.shown for layer in model.layers]).sum(0)
            wanted = _first(attended, maps.there, counts(maps.there, self.share)).to(scores.dtype)
            each = binary_cross_entropy_with_logits(scores, wanted, reduction="none")
            return loss + self.weight * each[maps.there].mean()
        return loss

    def pictures(self, model: Any, batch: Batch) -> Sequence[Picture]:
        """How likely the tokens of the finest map are foreground, of the first image; where they are kept by that."""
        if self.by != "foreground":
            return ()
        found = model(batch["images"][:1], batch["extent"][:1])
        height, width = found.maps.shapes[0]
        values = found.encoded.scores[0, : height * width].float().sigmoid().unflatten(0, (height, width)).cpu()
        rows, columns = ([str(i * model.stride) for i in range(n)] for n in (height, width))
        return (Picture("foreground, as tokens are scored", rows, columns, values.tolist(), ("pixels", "pixels")),)


class Scorer(nn.Module):
    """How likely a token of a map is foreground, a logit: by itself and by the mean of its map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = dim // 2
        self.first = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.rest = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1)
        )

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """``[B, T]`` of the tokens ``x [B, T, D]`` of a map, of which those ``there`` count for the mean."""
        own, of_all = self.first(x).split((self.own, x.shape[-1] - self.own), -1)
        number = there.sum(1).clamp(min=1)[:, None, None]
        mean = (of_all * there[..., None]).sum(1, keepdim=True) / number
        scores: Tensor = self.rest(torch.cat((own, mean.expand_as(of_all)), -1))[..., 0]
        return scores


class FocusEncoder(nn.Module):
    """Layers of deformable attention over the kept tokens, before each of them attention among objects.

    Attributes:
        layers: as they are in an encoder that refines all.
    """

    def __init__(
        self, focus: FocusDetr, layers: Sequence[nn.Module], dim: int, heads: int, dropout: float, levels: int
    ) -> None:
        super().__init__()
        self.focus, self.layers = focus, nn.ModuleList(layers)
        if focus.by in ("foreground", "decoder"):
            self.scorer = Scorer(dim)
            self.alpha = nn.Parameter(torch.empty(levels - 1).uniform_(-0.3, 0.3))
        deep = len(layers) if focus.objects else 0
        self.among = nn.ModuleList(nn.MultiheadAttention(dim, heads, dropout, batch_first=True) for _ in range(deep))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(deep))
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: Any, embed: Any) -> Any:
        """Tokens ``maps.x [B, N, D]``, some of them refined: what the encoder of the task gives."""
        scores = self.score(maps, embed)
        order = scores.detach().masked_fill(~maps.there, -torch.inf).argsort(dim=1, descending=True, stable=True)
        count, x, kept = counts(maps.there, self.focus.share), maps.x, torch.zeros_like(maps.there)
        for i, layer in enumerate(self.layers):
            factor = CASCADE[min(i, len(CASCADE) - 1)] if self.focus.cascade else 1.0
            many = (count.double() * factor + _WHOLE).long().clamp(min=1)
            at = order[:, : int(many.max())]
            real = torch.arange(at.shape[1], device=at.device) < many[:, None]
            here, positions, points = (_taken(part, at) for part in (x, maps.positions, maps.points))
            if self.focus.objects:
                here = self._among_objects(i, here, positions, scores.gather(1, at), real, embed)
            values = maps.x if self.focus.values == "features" else x
            here = layer(here, positions, points, values, maps)
            x = _put(x, at, here, real)
            kept = kept.scatter(1, at, real | kept.gather(1, at))
        return maps.encoded(x, kept, scores)

    def score(self, maps: Any, embed: Any) -> Tensor:
        """Of each token, ``[B, N]``; the highest are kept."""
        if self.focus.by == "norm":
            return maps.x.norm(dim=-1)  # type: ignore[no-any-return]
        if self.focus.by == "random":
            if self.training:
                return torch.rand(maps.x.shape[:2], device=maps.x.device)
            drawn = torch.rand(maps.x.shape[1], generator=torch.Generator().manual_seed(0))  # the same for every image
            return drawn.to(maps.x.device).expand(maps.x.shape[:2])
        made, _ = embed(maps.x + maps.positions)
        sizes = [height * width for height, width in maps.shapes]
        levels, there = made.split(sizes, 1), maps.there.split(sizes, 1)
        found: list[Tensor] = []
        for level in reversed(range(len(sizes))):  # coarsest first
            x = levels[level]
            if found and self.focus.top_down and self.focus.by == "foreground":
                coarse = found[-1].unflatten(1, maps.shapes[level + 1])[:, None]
                up = interpolate(coarse, maps.shapes[level], mode="bilinear", align_corners=True)
                x = x * (1 + self.alpha[level] * up.flatten(1)[..., None])
            found.append(self.scorer(x, there[level]))
        return torch.cat(found[::-1], 1)

    def _among_objects(
        self, layer: int, x: Tensor, positions: Tensor, scores: Tensor, real: Tensor, embed: Any
    ) -> Tensor:
        """The kept tokens ``x [B, T, D]``, of which those that look most like objects have seen each other."""
        with torch.no_grad():
            sure = embed(x)[1].float().sigmoid().max(-1).values
            if self.focus.by in ("foreground", "decoder"):
                sure = sure * scores.float().sigmoid()
            sure, at = sure.masked_fill(~real, -1.0).topk(min(self.focus.objects, x.shape[1]), 1)
        there = sure >= 0
        some, placed = _taken(x, at), _taken(positions, at)
        seen, _ = self.among[layer](some + placed, some + placed, some, ~there, need_weights=False)
        return _put(x, at, self.norms[layer](some + self.dropout(seen)), there)


def _taken(x: Tensor, at: Tensor) -> Tensor:
    """Tokens ``at [B, K]`` of ``x [B, N, D]``."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _put(x: Tensor, at: Tensor, made: Tensor, real: Tensor) -> Tensor:
    """``x [B, N, D]`` with ``made [B, K, D]`` at ``at``, where ``real [B, K]``."""
    made = torch.where(real[..., None], made.to(x.dtype), _taken(x, at))
    return x.scatter(1, at[..., None].expand(-1, -1, x.shape[-1]), made)


def counts(there: Tensor, share: float) -> Tensor:
    """Tokens that are kept of each image: ``floor(share N) + 1`` of its N, and no more than it has, ``[B]``."""
    number = there.sum(1)
    return torch.minimum((number.double() * share + _WHOLE).long() + 1, number)


def _first(scores: Tensor, there: Tensor, many: Tensor) -> Tensor:
    """The ``many [B]`` tokens of highest score, bool ``[B, N]``."""
    order = scores.masked_fill(~there, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < many[:, None]) & there


def pixels(batch: Batch, width: int, height: int) -> Tensor:
    """Edges of the boxes of a batch in pixels of the canvas, ``[B, n, 4]``; where there is none, NaN."""
    centre, extent = batch["boxes"].split(2, -1)
    edges = torch.cat((centre - extent / 2, centre + extent / 2), -1)
    edges = edges * edges.new_tensor((width, height, width, height))
    return edges.masked_fill((batch["labels"] < 0)[..., None], torch.nan)


def foreground(
    points: Tensor, shapes: Sequence[tuple[int, int]], boxes: Tensor, *, stride: float, reach: float, overlap: float
) -> Tensor:
    """Labels of tokens, bool ``[B, N]``.

    Args:
        points: their centres in pixels, ``[B, N, 2]``.
        shapes: height and width of each map, the finest first.
        boxes: edges in pixels, ``[B, n, 4]``; NaN is none.
        stride: pixels between tokens of the finest map.
        reach, overlap: see :class:`FocusDetr`. Where a token lies in several boxes, one in its range will do.
    """
    far = torch.cat((points[:, :, None] - boxes[:, None, :, :2], boxes[:, None, :, 2:] - points[:, :, None]), -1)
    low, high = [], []
    for i, (height, width) in enumerate(shapes):
        end = reach * stride * 2**i
        low.append(points.new_full((height * width,), end / 2 / overlap if i else -1.0))
        high.append(points.new_full((height * width,), end * overlap if i < len(shapes) - 1 else torch.inf))
    farthest = far.max(-1).values
    in_range = (farthest > torch.cat(low)[:, None]) & (farthest <= torch.cat(high)[:, None])
    return ((far.min(-1).values > 0) & in_range).any(-1)
