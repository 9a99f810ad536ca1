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

  where the middle term gives the teacher's z no gradient. The embedding is the mean of both tokens' states.

Shapes: frames ``[B, T, 40]``, mask ``[B, T]`` True where speech is, states ``[B, 1 or 2, D]``. The abstract alone was
to be had: the tokens, the sampling and the teacher are its own; n, k, R, the size of keys (``width``, else that of the
feed-forward part), weight and tau, what is erased, queries of the memory without normalisation, the mean of states and
a teacher trained alongside are chosen here. Left out: embeddings of a network of phonemes, for which positions stand.
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


class ProductKeyMemory(nn.Module):
    """``[..., D] -> [..., D]``: the values of the ``k`` likeliest of ``keys ** 2`` slots."""

    def __init__(self, dim: int, keys: int, size: int, k: int, heads: int) -> None:
        super().__init__()
        self.heads, self.k, self.halves = heads, k, (size // 2, size - size // 2)
        self.query = nn.Linear(dim, heads * size)
        self.keys = nn.ParameterList(torch.randn(heads, keys, half) / math.sqrt(size) for half in self.halves)
        self.values = nn.Parameter(torch.randn(keys**2, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
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
    """A layer, ``[B, T, D] -> [B, T, D]``, normalised after each part; ``shown [B, H, T, T]`` are weights in use."""

    def __init__(self, recipe: "SvClassToken", task: FieldTask, width: int) -> None:
        super().__init__()
        dim = task.dim
        self.attention = nn.MultiheadAttention(dim, task.heads, task.dropout, batch_first=True)
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)), nn.Dropout(task.dropout)
        self.second: nn.Module = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        if recipe.memory:
            self.second = ProductKeyMemory(
                dim, recipe.keys or math.isqrt(2 * dim), width, recipe.k, recipe.memory_heads
            )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mixed, self.shown = self.attention(x, x, x, ~mask, need_weights=not self.training, average_attn_weights=False)
        x = self.norms[0](x + self.dropout(mixed))
        out: Tensor = self.norms[1](x + self.dropout(self.second(x)))
        return out


class TokenEncoder(nn.Module):
    """Frames and mask -> states ``[B, 1 or 2, D]`` of tokens, by front, blocks and norm of the task's ``encoder``."""

    def __init__(self, encoder: Any, dim: int, count: int, distil: bool, combine: str = "tokens") -> None:
        super().__init__()
        self.encoder, self.combine = encoder, combine
        self.tokens = nn.Parameter(torch.randn(count, dim) / math.sqrt(dim))
        self.distillation = nn.Parameter(torch.randn(1, dim) / math.sqrt(dim)) if distil else None

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        x, mask = self.encoder.front(frames, mask)
        if self.training:
            return self._states(x, mask, self.tokens[torch.randint(len(self.tokens), (len(x),), device=x.device)])
        used = self.tokens if self.combine == "embeddings" else self.tokens.mean(0, keepdim=True)
        return torch.stack([self._states(x, mask, token.expand(len(x), -1)) for token in used]).mean(0)

    def _states(self, x: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """With a class token for each example ``[B, D]``, in front of the frames; tokens are never masked."""
        own = (tokens,) if self.distillation is None else (tokens, self.distillation.expand_as(tokens))
        x, count = torch.cat((torch.stack(own, 1).to(x.dtype), x), 1), len(own)
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
    """Pools speech by a class token, sampled from several, beside a token that imitates a teacher."""

    task: ClassVar[str] = "speaker_verification"

    pooling: Literal["token", "mean"] = field(default="token", metadata={"help": "a class token, or mean over frames"})
    tokens: Count = field(default=10, metadata={"help": "class tokens that training samples from, R"})
    combine: Literal["tokens", "embeddings"] = field(default="tokens", metadata={"help": "what is averaged in use"})
    distil: bool = field(default=True, metadata={"help": "a second token that imitates a teacher"})
    weight: float = field(default=1.0, metadata={"help": "of the teacher's term"})
    temperature: Annotated[float, Field(gt=0)] = field(default=1.0, metadata={"help": "of both in the teacher's term"})
    erase: bool = field(default=False, metadata={"help": "train on erased inputs as a teacher is, without one"})
    memory: bool = field(default=True, metadata={"help": "a memory in place of the feed-forward part"})
    keys: Annotated[int, Field(ge=0)] = field(default=0, metadata={"help": "sub-keys of each half; 0: root of 2 D"})
    k: Count = field(default=8, metadata={"help": "slots of the memory that are read"})
    memory_heads: Count = field(default=2, metadata={"help": "queries of each frame to the memory"})
    positions: bool = field(default=True, metadata={"help": "sinusoidal positions of frames"})

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
        term = self.weight * distillation(taught, imitated, self.temperature)
        return cross_entropy(said, classes) + term + cross_entropy(taught, classes)

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
    wanted, found = ((each / temperature).log_softmax(-1) for each in (taught.detach(), said))
    return temperature**2 * kl_div(found, wanted, reduction="batchmean", log_target=True)


def erased(frames: Tensor) -> Tensor:
    """``[..., T, mels]`` with one rectangle of each recording set to 0, the mean: up to a third of both sides."""
    shape, sides = frames.shape[:-2], []
    for length in frames.shape[-2:]:
        size = torch.rand(*shape, 1, device=frames.device) * length / 3
        start = torch.rand(*shape, 1, device=frames.device) * (length - size)
        at = torch.arange(length, device=frames.device)
        sides.append((at + 1 > start) & (at < start + size))
    return frames.masked_fill(sides[0][..., :, None] & sides[1][..., None, :], 0.0)
