# SPDX-License-Identifier: Apache-2.0
"""Audio-Conditioned Diffusion LLMs for ASR and Deliberation Processing (Whisper-LLaDA, arXiv 2509.16622).

A masked diffusion model reads what a frozen speech encoder heard, then a row of words of fixed length, some hidden, and
says of all hidden words at once what they are; every place sees every other.

- front: a window Q-Former. Frames are cut into windows of ``window`` (the last is filled up and masked); in each,
  ``queries`` learned queries attend to each other and to the window's frames, ``depth`` times, and go on as so many
  embeddings. Windows know nothing of each other here.
- training: t ~ U(0, 1) for each row, each word is hidden with probability t, and the loss is the cross-entropy of the
  hidden words alone, without LLaDA's weight 1 / t, as the released code has it. Rows are filled up with ends, which
  count.
- transcription: all words hidden; in each of ``steps`` steps the surest hidden places get their likeliest words, as
  evenly as they go. With ``block`` the row is filled block after block (semi-autoregressive), each in so many steps,
  where LLaDA parts the steps among the blocks. Behind the first end of a
  filled block all is an end, and decoding stops.
- deliberation over a first transcript (``deliberate``), whose length it cannot change but by its ends: ``random`` hides
  a share ``ratio`` of its places, ``confidence`` those whose words the model, reading the whole transcript, thinks
  least likely, and they are filled in min(steps, hidden) steps; ``semi`` hides one of ``chunks`` pieces after the
  other, fills it and writes it back. ``ratio=0`` is the first transcript itself.

``hear=false`` is the control that reads no sound. The paper's model is LLaDA-8B, frozen but for LoRA, and its Q-Former
of BERT's layers; here both are small and trained from scratch. Random places are drawn from the transcript itself, so
that a row is the same in any batch; a share is rounded to whole places, halves up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ...errors import UserError
from ...recipe import Batch, FieldTask, Recipe

__all__ = ["LLaDAASR", "WindowQFormer", "denoised", "hidden_loss"]

Mode = Literal["none", "random", "confidence", "semi"]


class WindowQFormer(nn.Module):
    """Queries in windows of frames: ``[B, T, size]`` -> ``[B, queries * ceil(T / window), dim]``."""

    def __init__(self, size: int, dim: int, heads: int, window: int, queries: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.window = window
        self.norm, self.project = nn.LayerNorm(size), nn.Linear(size, dim)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(dim, heads, 2 * dim, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        batch, length, _ = features.shape
        count = math.ceil(length / self.window)
        x = pad(self.project(self.norm(features)), (0, 0, 0, count * self.window - length))
        x = x.reshape(batch * count, self.window, -1)
        absent = torch.arange(count * self.window, device=x.device).reshape(count, -1) >= length
        absent = absent.repeat(batch, 1)
        found = self.queries.expand(len(x), -1, -1)
        for layer in self.layers:
            found = layer(found, x, memory_key_padding_mask=absent)
        return found.reshape(batch, -1, found.shape[-1])


def hidden_loss(logits: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    """Mean cross-entropy of the words ``[B, R]`` that were ``hidden``, of logits ``[B, R, V]``; 0 where none was."""
    each = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    where = hidden.flatten()
    return (each * where).sum() / where.sum().clamp(min=1)


def denoised(model: Any, heard: Tensor, words: Tensor, open_: Tensor, steps: int, block: int, ends: int) -> Tensor:
    """``words [B, R]`` with its ``open_`` places filled, with ends behind the first end; others never change.

    Args:
        model: ``(features, words) -> logits [B, R, V]``; ``ends`` is the last of V, and what hides a word is V.
        heard: features of the recordings.
        words: of which the open ones are hidden.
        open_: bool ``[B, R]``.
        steps: for each row of a block; 0 for as many as are open.
        block: places that are filled before the next; 0 for all.
        ends: the word that ends a row.
    """
    room = words.shape[1]
    words, size = words.masked_fill(open_, ends + 1), block or room
    for first in range(0, room, size):
        mine = open_.clone()
        mine[:, :first] = mine[:, first + size :] = False
        turns = min(steps or room, int(mine.sum(1).max()))
        for turn in range(turns):
            left = mine.sum(1)
            count = (left / (turns - turn)).ceil().long()
            chances = model(heard, words).float().softmax(-1)
            sure, likeliest = chances.max(-1)
            order = sure.masked_fill(~mine, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            now = mine & (order < count[:, None])
            words, mine = torch.where(now, likeliest, words), mine & ~now
        done = torch.arange(room, device=words.device) < first + size
        ended = ((words == ends) & done).cumsum(1) > 0
        words, open_ = words.masked_fill(ended & open_, ends), open_ & ~ended & ~done
    return words


@dataclass(frozen=True, kw_only=True)
class LLaDAASR(Recipe):
    """A masked diffusion model that transcribes speech, or mends a transcript.

    Attributes:
        steps: of decoding, for each block or piece; 0 for one a word.
        block: words that are decoded before the next; 0 for all at once.
        deliberate: how a first transcript is mended; ``none`` to write from nothing.
        ratio: share of places that are hidden by ``random`` and ``confidence``.
        chunks: pieces of ``semi``.
        hear: read the sound at all.
        window, queries, depth: of the Q-Former.
    """

    task: ClassVar[str] = "digit_transcripts"

    steps: int = field(default=0, metadata={"help": "steps of decoding a block; 0 for one a word"})
    block: int = field(default=0, metadata={"help": "words decoded before the next ones; 0 for all at once"})
    deliberate: Mode = field(default="none", metadata={"help": "mend a transcript: random, confidence or semi"})
    ratio: Annotated[float, Field(ge=0, le=1)] = field(default=0.3, metadata={"help": "share of places hidden"})
    chunks: int = field(default=4, metadata={"help": "pieces of deliberate=semi"})
    hear: bool = field(default=True, metadata={"help": "read the sound; false is a control"})
    window: int = field(default=17, metadata={"help": "frames of a window of the Q-Former"})
    queries: int = field(default=4, metadata={"help": "embeddings of a window"})
    depth: int = field(default=2, metadata={"help": "layers of the Q-Former"})

    def __post_init__(self) -> None:
        if min(self.steps, self.block) < 0 or min(self.chunks, self.window, self.queries, self.depth) < 1:
            raise UserError("llada_asr: steps and block are not negative; chunks, window, queries and depth 1 or more")

    def build(self, task: FieldTask, width: int) -> nn.Module:
        model: Any = task.reference(width)
        heard, room = self.queries * math.ceil(model.frames / self.window), len(model.places) - model.room
        if heard > room:
            raise UserError(
                f"llada_asr: {self.queries} queries in windows of {self.window} frames are {heard} embeddings, and "
                f"{room} have places: write fewer queries or a longer window"
            )
        model.front = WindowQFormer(
            model.size, task.dim, task.heads, self.window, self.queries, self.depth, task.dropout
        )
        model.order = "any"
        made: nn.Module = model
        return made

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        targets = batch["targets"]
        share = torch.rand(len(targets), 1, device=targets.device)
        hidden = torch.rand(targets.shape, device=targets.device) < share
        net: Any = model
        logits = net(self._heard(batch), targets.masked_fill(hidden, net.ends + 1))
        return hidden_loss(logits, targets, hidden)

    def _heard(self, batch: Batch) -> Tensor:
        features: Tensor = batch["inputs"]
        return features if self.hear else torch.zeros_like(features)

    def predict(self, task: FieldTask, model: nn.Module, batch: Batch) -> Sequence[Any]:
        net: Any = model
        heard, ends = self._heard(batch), net.ends
        if self.deliberate == "none":
            words = torch.full((len(heard), net.room), ends, device=heard.device)
            open_ = torch.ones_like(words, dtype=torch.bool)
            return list(net.texts(denoised(model, heard, words, open_, self.steps, self.block, ends)))
        words = batch["hypotheses"]().to(heard.device)
        if self.deliberate == "semi":
            for piece in torch.arange(net.room, device=heard.device).chunk(self.chunks):
                open_ = torch.zeros_like(words, dtype=torch.bool)
                open_[:, piece] = True
                words = denoised(model, heard, words, open_, self.steps, 0, ends)
        else:
            open_ = self.chosen(model, heard, words)
            words = denoised(model, heard, words, open_, self.steps, self.block, ends)
        return list(net.texts(words))

    def chosen(self, model: nn.Module, heard: Tensor, words: Tensor) -> Tensor:
        """Which places of transcripts ``[B, R]`` are hidden: bool ``[B, R]``."""
        count = math.floor(self.ratio * words.shape[1] + 0.5)
        if self.deliberate == "confidence":
            scores = model(heard, words).float().softmax(-1).gather(-1, words[..., None])[..., 0]
        else:
            draws = [torch.Generator().manual_seed(hash(tuple(row))) for row in words.tolist()]
            scores = torch.stack([torch.rand(words.shape[1], generator=one) for one in draws]).to(words.device)
        chosen: Tensor = scores.argsort(dim=1, stable=True).argsort(dim=1) < count
        return chosen
