# SPDX-License-Identifier: Apache-2.0
r"""Efficient Monotonic Multihead Attention (EMMA): a translator that decides when to read and when to write.

Each head of each decoder layer has a policy, the probability p_ij that word i is written once j of the source are read.
Where it stops is a random alignment, whose expectation trains it together with the translation:

    p_ij    = sigmoid((f_q(s_i) . f_k(h_j) / sqrt(d) + b) / tau)
    alpha_i = p_i * (alpha_i-1 T_i),   T_i[m, n] = prod_{k = m}^{n - 1} (1 - p_ik) for m <= n, else 0;   alpha_0 = e_1
    beta_ij = sum_{k >= j} alpha_ik exp(u_ij) / sum_{l <= k} exp(u_il)         what is missing of sum_j alpha_ij to 1
    context = sum_j beta_ij v_j                                                counts for the last position
    loss    = CE + latency AL(sum_j j alpha_ij) + variance mean_i (sum_j j^2 alpha_ij - (sum_j j alpha_ij)^2)

Only numbers from 0 to 1 are multiplied, and nothing is divided: Monotonic Multihead Attention (MMA, 1909.12406) divides
by products of 1 - p, which it has to clamp, so that mass is lost on long sources (``alignment=mma``). The recursion
q_ij = (1 - p_i,j-1) q_i,j-1 + alpha_i-1,j, alpha_ij = p_ij q_ij is as exact and cheaper, and is the default.

The model first learns to translate whole sentences for ``before`` times the steps, its policies apart; then it is tuned
with them, the layers of its encoder standing still (``freeze``). In use a piece is written when the least p of all
heads at the last position that was read reaches ``threshold``, else another is read; the context is the usual attention
to what has been read.

Formulas and defaults are those of the specification this was written by, which took the mechanism from the released
inference code (seamless_communication) and fairseq's MMA; the paper was not read again. Its models are of speech, with
``ratio=2`` frames to a decision: 1 here, for pieces of words. Its weights of losses are not known for certain. Chosen
here: the encoder reads from first to last, so that what follows tells a policy nothing in training, and reading on
changes no state (the release encodes all again with both directions); a word keeps the context that it was written with
(there, all are seen anew). Losses are means over layers and heads. Embeddings are the decoder's too, and go on
learning. Not here: speech, and blocking of repeated n-grams.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ....errors import UserError
from ....recipe import Batch, Picture, Recipe
from .alignment import (
    Estimator,
    context_weights,
    expected_alignment,
    expected_delays,
    latency_losses,
    preserve_mass,
)
from .policy import MonotonicAttention, StepwisePolicy

__all__ = [
    "Emma", "MonotonicAttention", "StepwisePolicy", "context_weights", "expected_alignment", "expected_delays",
    "latency_losses", "preserve_mass",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Emma(Recipe):
    """A policy of reading and writing for each decoder layer and head, learned with the translation.

    Attributes:
        alignment: how it is computed: ``scan``, ``matrix``, or ``mma``, which is biased.
        latency, variance: weights of the losses of expected lag and of its variance, per piece and per its square.
        depth, bias, temperature, ratio: of policies, see :class:`StepwisePolicy`.
        before: steps of learning to translate whole sentences before, by those of the training.
        freeze: whether the encoder's layers stand still after that.
        threshold: of writing; 0 writes at once, above 1 all is read first.
        by: what reading goes by; ``random``, as a control, reads on with a chance of ``threshold``.
        aggregate: of probabilities over layers and heads.
        first_layer: of those that are asked.
        wait: pieces that are read before the first is written.
        writes: pieces that are written in a row at most, before one is read.
    """

    task: ClassVar[str] = "simultaneous_translation"

    alignment: Estimator = field(default="scan", metadata={"help": "scan, matrix or mma, which is biased"})
    latency: Annotated[float, Field(ge=0)] = field(default=0.5, metadata={"help": "weight of the expected lag"})
    variance: Annotated[float, Field(ge=0)] = field(default=0.1, metadata={"help": "weight of its variance"})
    depth: Annotated[int, Field(ge=1)] = field(default=4, metadata={"help": "layers of a policy's networks"})
    bias: float = field(default=-0.5, metadata={"help": "of a policy's energies, at first"})
    temperature: Annotated[float, Field(gt=0)] = field(default=0.2, metadata={"help": "of a policy's energies"})
    ratio: Annotated[int, Field(ge=1)] = field(default=1, metadata={"help": "positions that are decided on together"})
    before: Annotated[float, Field(ge=0)] = field(
        default=1.0, metadata={"help": "steps of learning with whole sentences before, by those of the training"}
    )
    freeze: bool = field(default=True, metadata={"help": "leave the encoder's layers as they are after that"})
    threshold: Annotated[float, Field(ge=0)] = field(default=0.5, metadata={"help": "of writing"})
    by: Literal["policy", "random"] = field(
        default="policy", metadata={"help": "what reading goes by: policy or random"}
    )
    aggregate: Literal["min", "mean", "median"] = field(
        default="min", metadata={"help": "of probabilities over layers and heads: min, mean or median"}
    )
    first_layer: Annotated[int, Field(ge=0)] = field(default=0, metadata={"help": "first decoder layer that is asked"})
    wait: Annotated[int, Field(ge=1)] = field(default=1, metadata={"help": "pieces read before the first is written"})
    writes: Annotated[int, Field(ge=1)] = field(default=50, metadata={"help": "pieces written in a row at most"})

    def build(self, task: Any, width: int) -> nn.Module:
        def block() -> MonotonicAttention:
            policy = StepwisePolicy(task.dim, task.heads, self.depth, self.bias, self.temperature, self.ratio)
            return MonotonicAttention(task.dim, task.heads, task.dropout, policy, self.alignment)

        made: nn.Module = task.translator(width, block)
        return made

    def start(self, task: Any, model: nn.Module, fit: Any) -> None:
        if steps := round(self.before * task.steps):
            samples = task.samples("train")
            fit(
                model, lambda rng: self.batches(task, rng, samples),
                lambda made, batch: task.loss(made, batch, batch["mask_0"].sum(1, keepdim=True)), steps,
            )  # fmt: skip

    def rate_factors(self) -> Mapping[str, float]:
        return {"encoders.": 0.0} if self.freeze and self.before else {}

    def loss(self, task: Any, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = task.loss(model, batch)
        source, target = batch["mask_0"].sum(1), (batch["next"] >= 0).sum(1)
        lags, variances = zip(*(latency_losses(block.alpha, source, target) for block in _blocks(model)), strict=True)
        return loss + self.latency * torch.stack(lags).mean() + self.variance * torch.stack(variances).mean()

    def expected(self, p: Tensor) -> Tensor:
        """The alignment ``[.., T, S]`` that training expects of probabilities of writing ``p [.., T, S]``."""
        return expected_alignment(p, self.alignment)

    def predict(self, task: Any, model: nn.Module, batch: Batch) -> Sequence[Any]:
        said: Sequence[Any] = task.streamed(model, batch, self.reading(model))
        if "words" not in batch:
            return said
        wrong = _misplaced(model, batch)
        return [dataclasses.replace(one, misplaced=float(x)) for one, x in zip(said, wrong, strict=True)]

    def reading(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """What is to be read ``[B]`` before the next piece is written, if more than now: then one more.

        Of what had been read before each piece ``[B, T]``, the next one last, and lengths of sources ``[B]``; to be
        asked right after the model was.
        """
        blocks, coin = _blocks(model)[self.first_layer :], torch.Generator().manual_seed(0)
        if not blocks:
            raise UserError(f"first_layer={self.first_layer}: the model has fewer decoder layers")

        def wanted(seen: Tensor, length: Tensor) -> Tensor:
            p, read = torch.cat([block.last for block in blocks], 1), seen[:, -1]  # p: [B, L H]
            agreed = {"min": p.amin(1), "mean": p.mean(1), "median": p.median(1).values}[self.aggregate]
            if self.by == "random":
                agreed = torch.rand(len(read), generator=coin).to(read.device)
            in_a_row = (seen[:, :-1] == read[:, None]).sum(1)
            return read + ((agreed < self.threshold) | (read < self.wait) | (in_a_row >= self.writes)).long()

        return wanted

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """How much each head of the last layer is expected to read before the pieces of the first sentence."""
        model(batch, batch["words"])
        count = int((batch["next"][0] >= 0).sum())
        delays, _ = expected_delays(_blocks(model)[-1].alpha[0, :, :count])
        rows, columns = ([f"head {i + 1}" for i in range(len(delays))], [str(i + 1) for i in range(count)])
        return (Picture("expected reading", rows, columns, delays.tolist(), ("heads", "pieces written")),)


def _blocks(model: Any) -> list[MonotonicAttention]:
    return [layer.sources for layer in model.decoder]


def _misplaced(model: Any, batch: Batch) -> Tensor:
    """Share of the mass that alignments have in wrong places, beside the recursion in float64: a mean ``[B]``."""
    model(batch, batch["words"])
    source, there = batch["mask_0"].sum(1, keepdim=True), batch["next"] >= 0
    found = []
    for block in _blocks(model):
        exact = preserve_mass(expected_alignment(block.p.double()), source)
        found.append((block.alpha - exact).abs().sum(-1) / 2)  # [B, H, T]
    mean: Tensor = (torch.stack(found).mean((0, 2)) * there).sum(-1) / there.sum(-1)
    return mean
