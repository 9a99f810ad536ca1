# SPDX-License-Identifier: Apache-2.0
"""Large-scale Transfer Learning for Low-resource Spoken Language Understanding (arXiv 2008.05671).

A model that understands speech without a transcript has few labelled commands to learn from. Its attention decoder says
the slots of a command one after the other; three strategies strengthen the encoder that it attends to:

- transfer: the encoder first learns to transcribe, for which there are more recordings, and is then fine-tuned with a
  new decoder. ``digits`` transcribes by CTC in the words of the commands; ``letters`` in another alphabet, of other
  speakers, which stands in for the paper's other language (Mandarin for English); ``published`` takes the weights of a
  published encoder in its place: Whisper's for speech, MiniLM's for text. ``freeze`` lets the encoder stand still
  first, ``rate`` has it learn more slowly than the decoder.
- multitask: one encoder for both, loss = l L_commands + (1 - l) L_transcripts; l is ``multitask``.
- fusion: the decoder's state s [B, n, D] meets the vector t [B, D_t] of the transcript, by a text encoder that learns
  nothing: h = U t, g = sigmoid(W_g [s; h] + b), s' = [s; g * h], logits = W relu(W' s' + b'). In half of the training
  samples t = 0, and always in use, where no transcript is: the text helps to train, and is not needed.

The paper's text could not be read in full. From its abstract are the three strategies and their purpose; ours are CTC
as the transcribing head, the gate's place and the dropout of the text, the published encoders, and all sizes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from ...errors import UserError
from ...recipe import Batch, FieldTask, Recipe, Sample

if TYPE_CHECKING:
    import numpy as np

    from ...recipe import Fit

__all__ = ["GatedFusion", "Published", "SluTransfer", "Transcribed"]

Share = Annotated[float, Field(ge=0, le=1)]
_SYMBOLS = {"digits": 11, "letters": 27}  # with CTC's blank


@runtime_checkable
class Published(Protocol):
    """A task whose model has an ``encoder`` of a published shape, which stands still where its ``still`` is set."""

    def load_published(self, model: Any) -> None: ...


@runtime_checkable
class Transcribed(Protocol):
    """A task that has transcripts, of more recordings than those whose meaning is known."""

    @property
    def text(self) -> int: ...
    @property
    def steps(self) -> int: ...
    def transcribed(self, rng: "np.random.Generator", samples: Sequence[Sample], letters: bool = False) -> Batch: ...
    def transcription_loss(self, encoder: nn.Module, head: nn.Module, batch: Batch) -> Tensor: ...
    def described(self, samples: Sequence[Sample]) -> Tensor: ...


class GatedFusion(nn.Module):
    """Logits of decoder states ``[B, n, D]`` beside a text's vector ``[B, D_t]``, which is 0 where it is not given."""

    def __init__(self, dim: int, text: int, classes: int) -> None:
        super().__init__()
        self.text = nn.Linear(text, dim, bias=False)
        self.gate, self.hidden = nn.Linear(2 * dim, dim), nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, classes)

    def forward(self, states: Tensor, text: Tensor | None = None) -> Tensor:
        h = torch.zeros_like(states) if text is None else self.text(text)[:, None].expand_as(states)
        gate = self.gate(torch.cat((states, h), -1)).sigmoid()
        logits: Tensor = self.out(self.hidden(torch.cat((states, gate * h), -1)).relu())
        return logits


@dataclass(frozen=True, kw_only=True)
class SluTransfer(Recipe):
    """An encoder that has learned elsewhere, or learns beside, before it is asked for meanings with few labels.

    Attributes:
        transfer: what the encoder starts from: ``digits`` or ``letters``, learned here; ``published``, or ``none``.
        before: steps of learning to transcribe, by those of the training.
        freeze: share of the training in which the encoder stands still.
        rate: of the encoder's learning, by that of all else.
        multitask: weight of the commands' loss; transcripts have the rest.
        fusion: whether transcripts' vectors meet the decoder.
    """

    task: ClassVar[str] = "spoken_commands"

    transfer: Literal["digits", "letters", "published", "none"] = field(
        default="digits", metadata={"help": "what the encoder starts from: digits, letters, published or none"}
    )
    before: Annotated[float, Field(gt=0)] = field(
        default=2.0, metadata={"help": "steps of learning to transcribe before, by those of the training"}
    )
    freeze: Share = field(default=0.0, metadata={"help": "share of the training in which the encoder stands still"})
    rate: Annotated[float, Field(gt=0)] = field(
        default=1.0, metadata={"help": "learning rate of the encoder, by that of all else"}
    )
    multitask: Annotated[float, Field(gt=0, le=1)] = field(
        default=1.0, metadata={"help": "weight of the commands beside transcripts; 1 for commands alone"}
    )
    fusion: bool = field(default=False, metadata={"help": "let vectors of transcripts meet the decoder in training"})

    def build(self, task: FieldTask, width: int) -> nn.Module:
        model = super().build(task, width)
        made: Any = model
        if self.fusion:
            made.head = GatedFusion(task.dim, self._transcripts(task).text, made.head.out_features)
        if self.multitask < 1:
            self._transcripts(task)
            made.transcriber = nn.Linear(task.dim, _SYMBOLS["digits"])
        return model

    def start(self, task: FieldTask, model: nn.Module, fit: "Fit") -> None:
        made: Any = model
        if self.transfer == "published":
            if not isinstance(task, Published):
                raise UserError("slu_transfer:transfer=published needs a task of language understanding")
            task.load_published(made)
        elif self.transfer != "none":
            on, letters = self._transcripts(task), self.transfer == "letters"
            device, samples = next(made.parameters()).device, task.samples("train")
            both = nn.ModuleList([made.encoder, nn.Linear(task.dim, _SYMBOLS[self.transfer], device=device)])
            fit(
                both, lambda rng: on.transcribed(rng, samples, letters),
                lambda module, batch: on.transcription_loss(module[0], module[1], batch),  # type: ignore[index]
                max(1, round(self.before * on.steps)),
            )  # fmt: skip
        made.encoder.still.fill_(self.freeze > 0)

    def rate_factors(self) -> Mapping[str, float]:
        return {} if self.rate == 1 else {"encoder.": self.rate}

    def after_step(self, model: nn.Module, progress: float) -> None:
        made: Any = model
        made.encoder.still.fill_(progress < self.freeze)

    def batches(self, task: FieldTask, rng: "np.random.Generator", samples: Sequence[Sample]) -> Batch:
        drawn = task.draw(rng, samples)
        batch = dict(task.collate(drawn))
        if self.fusion:
            batch["text"] = self._transcripts(task).described(drawn)
        if self.multitask < 1:
            found = self._transcripts(task).transcribed(rng, samples)
            batch |= {f"spoken_{name}": x for name, x in found.items()}
        return batch

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        made: Any = model
        if "text" in batch:
            kept = torch.rand(len(batch["text"]), 1, device=batch["text"].device) < 0.5
            batch = {**batch, "text": batch["text"] * kept}
        loss = task.loss(model, batch)
        if self.multitask < 1 and "spoken_inputs" in batch:
            spoken = {name.removeprefix("spoken_"): x for name, x in batch.items() if name.startswith("spoken_")}
            other = self._transcripts(task).transcription_loss(made.encoder, made.transcriber, spoken)
            loss = self.multitask * loss + (1 - self.multitask) * other
        return loss

    def _transcripts(self, task: FieldTask) -> Transcribed:
        """The task, which has transcripts.

        Raises:
            UserError: it has none.
        """
        if not isinstance(task, Transcribed):
            raise UserError(
                "slu_transfer learns to transcribe, and this task has no recordings: write transfer=published or "
                "transfer=none, without multitask and fusion"
            )
        return task
