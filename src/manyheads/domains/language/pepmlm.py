# SPDX-License-Identifier: Apache-2.0
r"""PepMLM: peptides for a target protein by masked language modelling (Chen et al., Nature Biotechnology 2025).

A protein language model reads the target and, directly behind it, the peptide, every residue of which is masked
("suffix"); it learns to fill them all in, and nothing of the target is asked for:

    loss       = - mean log p(x_i | target, L masks)    over the L residues of the peptide
    perplexity = exp(- mean log p(x_i | target, peptide without residue i))
    new        = at each of L masks one of the ``top`` likeliest residues, by their probabilities, each by itself;
                 ``tried`` of the task are ranked by perplexity

The encoder is ESM-2's (rotary positions, transformers' class) in the task's sizes. **It is trained from scratch: the
paper starts from ESM-2 650M, whose weights are not read here.** What stands in for them is ``before``: for that many
times the steps the encoder learns to fill in 15 % of the residues of the training part's targets (80 % of these
masked, 10 % others, 10 % as they are), as ESM-2 did of 65 million proteins; other arms have no such steps. The paper's
rate, 8e-4 with a warm-up of 500 steps, is one for 650 million parameters; rates are the task's here. A target is cut to
the task's ``room``, from its end: the released code cuts the peptide off with it.

``masks=anywhere`` trains on 15 % of residues of both, as ESM-2 itself, and ``receptor`` says what the model is given of
a target: ``none`` leaves the peptide alone, ``other`` gives that of another peptide of the batch, for a model that was
trained with its own.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.proteins import FIRST, MASK, VOCABULARY
from ...recipe import Batch, FieldTask, Recipe

__all__ = ["PepMLM", "corrupted"]

_SHARE = 0.15  # of residues that are asked for where masks are anywhere


class Esm(nn.Module):
    """An encoder of ESM-2's kind: ``[B, T, VOCABULARY]`` of ``tokens [B, T]``, where ``mask``."""

    def __init__(self, dim: int, layers: int, heads: int, width: int, dropout: float) -> None:
        from transformers import EsmConfig, EsmForMaskedLM

        super().__init__()
        self.model = EsmForMaskedLM(
            EsmConfig(
                vocab_size=VOCABULARY, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                position_embedding_type="rotary", pad_token_id=0, mask_token_id=MASK, token_dropout=False,
                emb_layer_norm_before=False,
            )
        )  # fmt: skip

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return cast(Tensor, self.model(tokens, attention_mask=mask.long()).logits)


@dataclass(frozen=True, kw_only=True)
class PepMLM(Recipe):
    """Fills in a peptide of masks behind the protein that it is to bind."""

    task: ClassVar[str] = "peptide_binders"

    masks: Literal["suffix", "anywhere"] = field(
        default="suffix", metadata={"help": "what is asked for in training: the whole peptide, or some of all residues"}
    )
    receptor: Literal["own", "none", "other"] = field(
        default="own", metadata={"help": "what stands before a peptide: its protein, nothing, or that of another one"}
    )
    top: Annotated[int, Field(ge=1, le=20)] = field(
        default=3, metadata={"help": "residues among which one is drawn, for new peptides"}
    )
    before: Annotated[float, Field(ge=0)] = field(
        default=0.0, metadata={"help": "steps in which proteins alone are learned before, in those of the training"}
    )

    def build(self, task: Any, width: int) -> nn.Module:
        made: nn.Module = task.masked(Esm(task.dim, task.layers, task.heads, width, task.dropout), self.top)
        return made

    def start(self, task: Any, model: nn.Module, fit: Any) -> None:
        if steps := round(self.before * task.steps):
            samples = task.samples("train")

            def proteins(rng: Any) -> Batch:
                batch = task.collate(task.draw(rng, samples))
                return _without(batch, batch["binder"])

            fit(model, proteins, _anywhere, steps)

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        given = self._given(batch)
        return _anywhere(model, given) if self.masks == "anywhere" else task.loss(model, given)

    def predict(self, task: FieldTask, model: nn.Module, batch: Batch) -> Any:
        return task.predict(model, self._given(batch))

    def _given(self, batch: Batch) -> Batch:
        if self.receptor == "own":
            return batch
        if self.receptor == "none":
            protein = batch["mask"] & ~batch["binder"] & (batch["tokens"] >= FIRST)
            return _without(batch, protein)
        return exchanged(batch)


def _anywhere(model: Any, batch: Batch) -> Tensor:
    """The loss of 15 % of all residues of a batch."""
    given, asked = corrupted(batch["tokens"], batch["mask"] & (batch["tokens"] >= FIRST))
    logs = model.read(given, batch["mask"])[asked].float().log_softmax(-1)
    loss: Tensor = -logs.gather(-1, batch["tokens"][asked][:, None]).mean()
    return loss


def corrupted(tokens: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to be read, and which of them are asked for: 15 % of those ``there [B, T]``, one at least; of these four
    in five become masks, one in ten is another residue, and one in ten stays.
    """
    asked = there & (torch.rand(tokens.shape, device=tokens.device) < _SHARE)
    if not asked.any():
        asked = there & (there.flatten().cumsum(0).view_as(there) == 1)
    kind = torch.rand(tokens.shape, device=tokens.device)
    other = torch.randint_like(tokens, FIRST, VOCABULARY - 1)
    given = torch.where(kind < 0.8, MASK, torch.where(kind < 0.9, other, tokens))
    return torch.where(asked, given, tokens), asked


def _without(batch: Batch, gone: Tensor) -> dict[str, Any]:
    """The batch without the tokens where ``gone [B, T]``; what is left moves together."""
    stay = batch["mask"] & ~gone
    order = stay.long().sort(dim=1, descending=True, stable=True).indices[:, : int(stay.sum(1).max())]
    moved = {key: batch[key].gather(1, order) for key in ("tokens", "binder")}
    mask = stay.gather(1, order)
    return {**batch, "tokens": moved["tokens"].masked_fill(~mask, 0), "binder": moved["binder"] & mask, "mask": mask}


def exchanged(batch: Batch) -> dict[str, Any]:
    """The batch with each peptide behind the protein of the row before; the first has that of the last."""
    from ...attention.masks import padded

    tokens, binder, mask = batch["tokens"], batch["binder"], batch["mask"]
    rows, where = [], []
    for i in range(len(tokens)):
        other = tokens[i - 1][mask[i - 1]]
        first = int(binder[i - 1].long().argmax())
        peptide = tokens[i][binder[i]]
        rows.append(torch.cat((other[:first], peptide, other[-1:])))
        where.append(torch.tensor([False] * first + [True] * len(peptide) + [False], device=tokens.device))
    made, there = padded([row.cpu() for row in rows])
    return {
        **batch, "tokens": made.to(tokens.device), "mask": there.to(tokens.device),
        "binder": padded([row.cpu() for row in where])[0].to(tokens.device),
    }  # fmt: skip
