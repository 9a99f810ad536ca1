# SPDX-License-Identifier: Apache-2.0
"""Sinks, drained values and residual peaks of a small GPT-2 that is trained on Bigram-Backcopy under each arm.

The model of "Active-Dormant Attention Heads" (arXiv 2410.13835) as an ordinary GPT-2: layer norm before each part, one
head, learned positions, ReLU in the feed-forward, an output layer of its own, no biases in linear layers (they are 0
and stay so), and PyTorch's default initialisation. Weights and sequences of a seed are the same in all arms.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.bigram_backcopy import BigramBackcopy as Language
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...strategy import Strategy
from ...training import decay, fit, next_token_loss
from ._trained import TrainedTask, told

if TYPE_CHECKING:
    from ...lens import LensResult

__all__ = ["BigramBackcopy"]

_WARM = 50  # steps
_TRIGGERS, _OTHERS = "triggers", "others"


@dataclass(frozen=True)
class _Trained:
    """A trained arm: the model, and what acts on it."""

    model: Any
    strategies: tuple[Strategy, ...]


@dataclass(frozen=True, kw_only=True)
class BigramBackcopy(TrainedTask):
    """What a trained model shows on sequences that it has not seen, a value for each of them.

    Trained are the baseline and the arms that have the option ``train``, a mapping that may hold ``optimizer``
    (``adamw``, ``sgd``), ``lr``, ``layers``, and the mitigations ``kv_bias``, ``dyt`` and ``tvr``. Where there is one
    layer, the losses are taken with its head taken out, and turned wholly to the first token, too.

    Attributes:
        dim, layers: of the model.
        length, batch: of sequences, and sequences to a step.
        lr: learning rate after the warm-up.
        sequences: to judge by.
        letters: corpus of :mod:`manyheads.data.texts` whose pairs of letters are the language's.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("sink", "attention on the first token"),
        Metric("extra_slot", "attention on the slot of the KV bias"),
        Metric("drain", "norm of the first value over the others'"),
        Metric("peak", "norm of the first token's residual stream over the others', worst block"),
        Metric("largest", "largest activation, block with the greatest ratio"),
        Metric("ratio", "largest over median activation, block with the greatest ratio"),
        Metric("loss", "loss above the least that is possible", "nats/token"),
        Metric("added_loss", "loss added by what is done to the head", "nats/token"),
    )

    steps: int = 800
    dim: int = 64
    layers: int = 1
    length: int = 64
    batch: int = 64
    lr: float = 2e-3
    sequences: int = 128
    letters: str = "plays"

    def trained_arms(self, run: RunContext) -> list[Arm]:
        return [arm for arm in run.arms if arm == run.baseline or "train" in arm.options]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        language = cast(Language, run.kept(("letters", self.letters), lambda: _language(self.letters)))
        made = self._trained(run, unit, language, arm, seed)
        ids = language.draw(self.sequences, self.length, run.torch_rng(test="bigram_backcopy")).to(run.device)
        for name, rows, values in _seen(made, language, ids):
            yield from self.each(name, arm, values, seed=seed, at={"rows": rows} if rows else {})
        plain = _losses(made, language, ids)
        for rows, values in plain.items():
            yield from self.each("loss", arm, values, seed=seed, at={"rows": rows})
        if made.model.config.n_layer > 1:
            return
        for by, head in (("zero", "taken out"), ("bos", "turned to the first token")):
            for rows, values in _losses(made, language, ids, f"ablate:heads=0.0,by={by}").items():
                at = {"rows": rows, "head": head}
                yield from self.each("added_loss", arm, values - plain[rows], seed=seed, at=at)

    def _trained(self, run: RunContext, unit: WorkUnit, language: Language, arm: Arm, seed: int) -> _Trained:
        """Train with what acts in use; in float32 everywhere, so that devices agree."""
        import manyheads

        given = arm.options.get("train", {})
        torch.manual_seed(seeding.number(run.seed, weights="bigram_backcopy", seed=seed))
        model = _untrained(language, self.dim, int(given.get("layers", self.layers)), self.length).to(run.device)
        acting, more = list(arm.strategies), []
        if given.get("dyt"):
            _replace_norms(model)
        if given.get("kv_bias"):
            acting.append(bias := _bias(model, run.device))
            more = bias.parameters()
        parameters = [*(p for p in model.parameters() if p.requires_grad), *more]
        rate = float(given.get("lr", self.lr))
        optimizer: Any = (
            torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4)
            if given.get("optimizer") == "sgd"
            else torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
        )
        if given.get("tvr"):
            _rescale(model, optimizer, self.dim, 0.02 if given.get("dyt") else 0.01)

        def draw(step: int) -> Tensor:
            source = run.torch_rng(train="bigram_backcopy", seed=seed, step=step)
            return language.draw(self.batch, self.length, source).to(run.device)

        with manyheads.use(model, *acting) if acting else contextlib.nullcontext():
            fit(
                model, draw, next_token_loss, budget=self.steps, optimizers=[optimizer],
                schedule=decay("none", warmup=_WARM), bf16=False, on_step=told(run, unit, self.steps),
            )  # fmt: skip
        return _Trained(model, tuple(acting))


def _language(letters: str) -> Language:
    from ...data.texts import corpus

    return Language.of_text("\n".join(text.content for text in corpus(letters)[:100]))


def _untrained(language: Language, dim: int, layers: int, length: int) -> Any:
    """A ``GPT2LMHeadModel``; its weights are drawn from torch's own generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=language.vocab, n_positions=length, n_embd=dim, n_layer=layers, n_head=1,
            activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
            bos_token_id=language.bos, eos_token_id=None, use_cache=False,
        )
    )  # fmt: skip
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Embedding":
            torch.nn.init.normal_(module.weight)
        elif kind in ("Conv1D", "Linear"):
            inputs = module.weight.shape[0 if kind == "Conv1D" else 1]
            torch.nn.init.uniform_(module.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
            if module.bias is not None:
                module.bias.requires_grad_(False).zero_()
    return model


def _replace_norms(model: Any) -> None:
    """DyT; embeddings start divided by what they are multiplied with, so that all arms start alike."""
    from ...lenses.refined_massive_activations import with_dyt

    with_dyt(model)
    table = model.get_input_embeddings()
    table.weight.data /= table.scale.data


def _bias(model: Any, device: torch.device) -> Any:
    from ...integrations.transformers import find_sites
    from ...lenses.refined_massive_activations import KVBias

    return KVBias.of(site for site, _ in find_sites(model)).to(device)


def _rescale(model: Any, optimizer: Any, dim: int, target: float) -> None:
    """TVR, its target the paper's at its width, 2048 (0.01; 0.02 with DyT), and as many standard deviations at this."""
    from ...lenses.refined_massive_activations import TargetVariance
    from ...lenses.refined_massive_activations.tvr import blocks_of

    TargetVariance(blocks_of(model), target=target * math.sqrt(2048 / dim)).attach(optimizer)


def _spans(mask: Tensor) -> list[list[tuple[int, int]]]:
    """The True tokens of each row, as the roles of lenses take them."""
    return [[(int(t), int(t) + 1) for t in row.nonzero()] for row in mask.cpu()]


def _seen(made: _Trained, language: Language, ids: Tensor) -> Iterator[tuple[str, str, Any]]:
    """What lenses find on ``ids [N, T + 1]``: metric, rows that it is of or nothing, values ``[N]``."""
    import manyheads

    from ...lenses.active_dormant import ReLUAttention

    relu = any(isinstance(strategy, ReLUAttention) for strategy in made.strategies)
    lenses = [
        f"active_dormant:domains={_TRIGGERS}+{_OTHERS}" + (",attention=relu" if relu else ""),
        "refined_massive_activations",
    ]
    copies = language.copies(ids)
    roles = manyheads.TokenSpans({_TRIGGERS: _spans(copies), _OTHERS: _spans(~copies)})
    with contextlib.ExitStack() as stack, torch.no_grad():
        if made.strategies:
            stack.enter_context(manyheads.use(made.model, *made.strategies))
        watched = stack.enter_context(manyheads.watch(made.model, *lenses, roles=roles))
        made.model(ids[:, :-1])
    found: list[LensResult] = [watched.compute(i) for i in range(len(lenses))]
    sinks, sizes = found[0].tables, found[1].tables
    for rows in (_TRIGGERS, _OTHERS):
        yield "sink", rows, sinks[f"sink of {rows}"].values.mean((1, 2))
    yield "drain", "", sinks["drain"].values.mean((1, 2))
    yield "peak", "", sinks["peak"].values[:, :, 0].max(1)
    worst = int(sizes["max / median"].mean[:, 0].argmax())
    yield "largest", "", sizes["max"].values[:, worst, 0]
    yield "ratio", "", sizes["max / median"].values[:, worst, 0]
    if "learned" in sinks:
        yield "extra_slot", "", sinks["learned"].values.mean((1, 2))


def _losses(made: _Trained, language: Language, ids: Tensor, *more: str) -> dict[str, Any]:
    """Mean loss of each of ``ids [N, T + 1]`` above what no model goes below, by the rows that predict: ``[N]``."""
    import manyheads

    used: tuple[Strategy | str, ...] = (*made.strategies, *more)
    with torch.no_grad(), manyheads.use(made.model, *used) if used else contextlib.nullcontext():
        logits = made.model(ids[:, :-1]).logits.float()
    nll = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    excess, copies = (nll + language.log_probability(ids)).double().cpu().numpy(), language.copies(ids).cpu().numpy()
    masks = {_TRIGGERS: copies, _OTHERS: ~copies, "all": np.ones_like(copies)}
    return {rows: (excess * mask).sum(1) / mask.sum(1).clip(1) for rows, mask in masks.items()}
