# SPDX-License-Identifier: Apache-2.0
r"""A class token in place of average pooling, and a second one that imitates a teacher, for speaker verification.

"Class Token and Knowledge Distillation for Multi-head Self-Attention Speaker Verification Systems", arXiv 2111.03842.
Averaging over frames forgets in which order they came; a token that attends to frames with positions need not:

    [c; x_1 .. x_T]   -> L times: h = LN(x + MSA(x)), x = LN(h + M(h))   -> e = the token's last state

- sampled tokens ("Bayesian" in the paper's first version): R trained vectors, of which each example of the training
  draws one; in use the token is their mean, or the embedding the mean of all R (``combine``).
- memory layer in place of the feed-forward part (product keys, arXiv 1907.05242): the query q = W h is cut in halves,
  which meet two sets of n sub-keys; of the n^2 sums of two scores the k largest are kept,
  M(h) = sum_i softmax(s)_i V_i over those slots, summed over memory heads, which share V ``[n^2, D]``.
- distillation: a second token d, whose logits imitate a teacher's. The teacher has the same architecture with one class
  token, is trained at the same time on inputs with rectangles of time and frequency erased, and is left behind:

    loss = CE(W_c e_c, y) + weight tau^2 KL(softmax(z / tau) || softmax(W_d e_d / tau)) + CE(z, y)

  where the middle term gives the teacher's z no gradient. The embedding is the mean of both tokens' states, as DeiT
  averages their predictions.

Shapes: frames ``[B, T, 40]``, mask ``[B, T]`` True where speech is, states ``[B, 1 or 2, D]``. The abstract alone was
to be had: the tokens, the sampling and the teacher are its own; n, k, R, weight and tau, what is erased, queries of the
memory without normalisation, the mean of states and a teacher trained alongside are chosen here. Left out: embeddings
of a network of phonemes, which stand for positions there; positions are sinusoidal. ``width`` is the size of the
memory's keys, which is nowhere stated, or that of the feed-forward part.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding_bag, kl_div

from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["Block", "Distilled", "ProductKeyMemory", "SvClassToken", "TokenEncoder", "distillation", "erased"]

Count = Annotated[int, Field(ge=1)]
_ERASED = 3  # the most that is erased: this part of the frames, and of the filters


class ProductKeyMemory(nn.Module):
    """``[..., D] -> [..., D]``: the values of the ``k`` likeliest of ``keys ** 2`` slots."""

    def __init__(self, dim: int, keys: int, size: int, k: int, heads: int) -> None:
        super().__init__()
        self.heads, self.k, self.halves = heads, k, (size // 2, size - size // 2)
        self.query = nn.Linear(dim, heads * size)
        self.keys = nn.ParameterList(torch.randn(heads, keys, half) / math.sqrt(size) for half in self.halves)
        self.values = nn.Parameter(torch.randn(keys**2, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]``."""
        slots, weights = self.found(x)
        flat = slots.flatten(0, -3).flatten(1), weights.flatten(0, -3).flatten(1).to(self.values.dtype)
        return embedding_bag(flat[0], self.values, per_sample_weights=flat[1], mode="sum").view(x.shape).to(x.dtype)

    def found(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slots and their weights, ``[..., heads, k]``; the largest sums are among those of each half's largest."""
        halves = self.query(x).unflatten(-1, (self.heads, -1)).split(self.halves, -1)
        scores = [(q[..., None, :] * keys).sum(-1) for q, keys in zip(halves, self.keys, strict=True)]
        count = scores[0].shape[-1]
        (first, i), (second, j) = (one.topk(min(self.k, count)) for one in scores)
        kept, at = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(min(self.k, count**2))
        slots = i.gather(-1, at // j.shape[-1]) * count + j.gather(-1, at % j.shape[-1])
        return slots, kept.softmax(-1)


class Block(nn.Module):
    """One layer, ``[B, T, D] -> [B, T, D]``, normalised after each part.

    Attributes:
        shown: weights of attention ``[B, H, T, T]`` in the last forward outside training.
    """

    def __init__(self, recipe: "SvClassToken", task: FieldTask, width: int) -> None:
        super().__init__()
        dim = task.dim
        self.attention = nn.MultiheadAttention(dim, task.heads, task.dropout, batch_first=True)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)), nn.Dropout(task.dropout)
        keys = recipe.keys or math.isqrt(2 * dim)
        self.second: nn.Module = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        if recipe.memory:
            self.second = ProductKeyMemory(dim, keys, width, recipe.k, recipe.memory_heads)
        self.shown: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, D]``."""
        mixed, shown = self.attention(
            x, x, x, key_padding_mask=~mask, need_weights=not self.training, average_attn_weights=False
        )
        self.shown = None if shown is None else shown.detach()
        x = self.norms[0](x + self.dropout(mixed))
        out: Tensor = self.norms[1](x + self.dropout(self.second(x)))
        return out


class TokenEncoder(nn.Module):
    """Frames and mask -> states ``[B, 1 or 2, D]`` of the class token and of the distillation token.

    Args:
        encoder: of the task, whose front, blocks and last norm are used; its pooling is not.
        dim: of tokens.
        count: of class tokens, R.
        distil: whether there is a distillation token.
        combine: what is averaged in use: ``tokens``, or ``embeddings``.
    """

    def __init__(self, encoder: Any, dim: int, count: int, distil: bool, combine: str = "tokens") -> None:
        super().__init__()
        self.encoder, self.combine = encoder, combine
        self.tokens = nn.Parameter(torch.randn(count, dim) / math.sqrt(dim))
        self.distillation = nn.Parameter(torch.randn(1, dim) / math.sqrt(dim)) if distil else None

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """States."""
        x, mask = self.encoder.front(frames, mask)
        if self.training:
            drawn = self.tokens[torch.randint(len(self.tokens), (len(x),), device=x.device)]
            return self._states(x, mask, drawn)
        if self.combine == "embeddings":
            return torch.stack([self._states(x, mask, token.expand(len(x), -1)) for token in self.tokens]).mean(0)
        return self._states(x, mask, self.tokens.mean(0).expand(len(x), -1))

    def _states(self, x: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """With a class token for each example ``[B, D]``, in front of the frames; tokens are never masked."""
        front = tokens[:, None]
        if self.distillation is not None:
            front = torch.cat((front, self.distillation.expand(len(x), 1, -1)), 1)
        x, count = torch.cat((front.to(x.dtype), x), 1), front.shape[1]
        mask = torch.cat((mask.new_ones(len(x), count), mask), 1)
        for block in self.encoder.blocks:
            x = block(x, mask)
        states: Tensor = self.encoder.norm(x[:, :count])
        return states


class Distilled(nn.Module):
    """A model beside its teacher and their classifiers; the model alone is kept."""

    def __init__(self, student: Any, teacher: Any, dim: int) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.imitates = type(student.head)(dim, len(student.head.weight))


@dataclass(frozen=True, kw_only=True)
class SvClassToken(Recipe):
    """Pools speech by a class token, sampled from several, beside a token that imitates a teacher.

    Attributes:
        pooling: a class token, or the mean over frames of the same network.
        tokens: class tokens that training samples from, R.
        combine: what is averaged over them in use.
        distil: a second token, trained to imitate a teacher.
        weight, temperature: of the teacher's term.
        erase: train on erased inputs, as the teacher is; for a model without one.
        memory: a memory in place of the feed-forward part.
        keys: sub-keys of each half, n; 0 for the root of 2 D.
        k: slots that are read.
        memory_heads: queries of each frame.
        positions: sinusoidal ones of frames.
    """

    task: ClassVar[str] = "speaker_verification"

    pooling: Literal["token", "mean"] = field(default="token", metadata={"help": "token, or mean over frames"})
    tokens: Count = field(default=10, metadata={"help": "class tokens that training samples from"})
    combine: Literal["tokens", "embeddings"] = field(default="tokens", metadata={"help": "what is averaged in use"})
    distil: bool = field(default=True, metadata={"help": "a second token that imitates a teacher"})
    weight: float = field(default=1.0, metadata={"help": "of the teacher's term"})
    temperature: Annotated[float, Field(gt=0)] = field(default=1.0, metadata={"help": "of both in the teacher's term"})
    erase: bool = field(default=False, metadata={"help": "train on erased inputs, without a teacher"})
    memory: bool = field(default=True, metadata={"help": "a memory in place of the feed-forward part"})
    keys: Annotated[int, Field(ge=0)] = field(default=0, metadata={"help": "sub-keys of each half; 0 by size"})
    k: Count = field(default=8, metadata={"help": "slots of the memory that are read"})
    memory_heads: Count = field(default=2, metadata={"help": "queries of each frame to the memory"})
    positions: bool = field(default=True, metadata={"help": "positions of frames"})

    def __post_init__(self) -> None:
        if self.distil and (self.pooling != "token" or self.erase):
            raise UserError("sv_class_token: a distillation token stands beside a class token: distil=false")

    def build(self, task: FieldTask, width: int) -> nn.Module:
        encoder: Any = task.around([Block(self, task, width) for _ in range(task.layers)])
        encoder.positions = self.positions
        if self.pooling == "mean":
            return encoder  # type: ignore[no-any-return]
        return TokenEncoder(encoder, task.dim, self.tokens, self.distil, self.combine)

    def learner(self, task: FieldTask, model: nn.Module, width: int) -> nn.Module:
        if not self.distil:
            return task.learner(model)
        teacher = replace(self, distil=False, tokens=1)
        return Distilled(task.learner(model), task.learner(teacher.build(task, width)), task.dim)

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        other = {**batch, "inputs": erased(batch["inputs"])} if self.distil or self.erase else batch
        if not isinstance(model, Distilled):
            return task.loss(model, other)
        frames, mask, classes = batch["inputs"].flatten(0, 1), batch["mask"].flatten(0, 1), batch["targets"].flatten()
        states, student = model.student.model(frames, mask), model.student
        taught = model.teacher(other["inputs"].flatten(0, 1), mask).float()
        said, imitated = student.head(states[:, 0]).float(), model.imitates(states[:, 1]).float()
        term = distillation(taught, imitated, self.temperature)
        return cross_entropy(said, classes) + self.weight * term + cross_entropy(taught, classes)

    def pictures(self, model: nn.Module, batch: Batch) -> tuple[Picture, ...]:
        """Where the class token looks in a recording, by head of the last layer."""
        if not isinstance(model, TokenEncoder):
            return ()
        model(batch["inputs"].flatten(0, 1), batch["mask"].flatten(0, 1))
        first = int(batch["mask"][0, 0].sum() + 3) // 4
        shown, skipped = model.encoder.blocks[-1].shown, 1 if model.distillation is None else 2
        values = shown[0, :, 0, skipped : skipped + first].float().cpu().tolist()
        rows, columns = [f"head {i}" for i in range(len(values))], [f"{0.04 * i:.2f}" for i in range(first)]
        return (Picture("attention of the class token", rows, columns, values, ("heads", "seconds")),)


def distillation(taught: Tensor, said: Tensor, temperature: float) -> Tensor:
    """Mean of ``tau^2 KL(teacher || student)`` over logits ``[B, classes]``; the teacher gets no gradient."""
    wanted = (taught.detach() / temperature).log_softmax(-1)
    found = (said / temperature).log_softmax(-1)
    return temperature**2 * kl_div(found, wanted, reduction="batchmean", log_target=True)


def erased(frames: Tensor) -> Tensor:
    """``[..., T, mels]`` with one rectangle of each recording set to 0, the mean: up to a third of both sides."""
    shape, sides = frames.shape[:-2], []
    for length in frames.shape[-2:]:
        size = torch.rand(*shape, 1, device=frames.device) * length / _ERASED
        start = torch.rand(*shape, 1, device=frames.device) * (length - size)
        at = torch.arange(length, device=frames.device)
        sides.append((at + 1 > start) & (at < start + size))
    return frames.masked_fill(sides[0][..., :, None] & sides[1][..., None, :], 0.0)
