# SPDX-License-Identifier: Apache-2.0
"""Loss of a small Mixtral whose gradients many simulated processes add in few bits, at once or hop by hop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...experiment.seeding import number
from ...parallel._compressed import decode, encode, ring_sum
from ..training._bytes import VOCAB, flat, split

__all__ = ["SummedGradients"]

_BLOCK = 128  # numbers that share a scale


@dataclass(frozen=True, kw_only=True)
class SummedGradients(Task):
    """Every simulated process reads one sequence of a batch; all gradients are computed in this process.

    Arms have the option ``sum`` (a format) and, where the sum rounds at every hop, ``ring``. They start from the same
    weights and read the same batches. ``step_error`` is that of the sums against float64, of the arm's own gradients.

    Attributes:
        ranks: simulated processes.
        steps, rate: of AdamW, and its learning rate.
        length: bytes of a sequence.
        dim, inner, layers, experts: of the model, whose tokens choose two experts.
        samples: windows of held-out text that are judged.
        text: a corpus of :mod:`manyheads.data.texts`.
    """

    subject: ClassVar[str] = "processes"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("token_nll", "held-out loss, nats/byte", "nats/byte"),
        Metric("training_nll", "loss in the last tenth of training, nats/byte", "nats/byte"),
        Metric("step_error", "relative error of a step's sum of gradients"),
    )

    ranks: int = 64
    steps: int = 40
    rate: float = 4e-3
    length: int = 16
    dim: int = 32
    inner: int = 32
    layers: int = 2
    experts: int = 8
    samples: int = 64
    text: str = "wikitext"

    def units(self, run: RunContext) -> list[WorkUnit]:
        arms = [arm for arm in run.arms if "sum" in arm.options]
        return [
            WorkUnit(self.key, f"{arm.key}.{seed}", 1.0, f"training, {arm.key}", {"arm": arm.key, "seed": seed})
            for seed in run.seeds
            for arm in arms
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), int(unit.params["seed"])
        model = self._model(run, seed)
        names, weights = zip(*model.named_parameters(), strict=True)
        gradients = self._gradients(model, names, run.device)
        optimizer = torch.optim.AdamW(weights, lr=self.rate, weight_decay=0.0)
        losses = []
        for step in range(self.steps):
            parts, loss = gradients(self._batch(run, seed, step))
            total = self._sum(arm, parts)
            if step % 10 == 0:
                exact = parts.double().sum(0)
                off = float((total.double() - exact).norm() / exact.norm())
                yield self.row("step_error", arm, off, f"{step}", seed=seed)
            for weight, part in zip(weights, total.split([w.numel() for w in weights]), strict=True):
                weight.grad = (part / self.ranks).view_as(weight)
            optimizer.step()
            losses.append(loss)
        last = losses[-max(1, self.steps // 10) :]
        yield self.row("training_nll", arm, float(torch.stack(last).mean()), f"{seed}", seed=seed)
        yield from self.each("token_nll", arm, self._judged(run, model), seed=seed)

    def _sum(self, arm: Arm, parts: Tensor) -> Tensor:
        """The sum of ``parts [n, P]`` as the arm has it."""
        kind, size = arm.options["sum"], parts.shape[1]
        parts = F.pad(parts, (0, -size % _BLOCK))
        if "ring" in arm.options:
            return ring_sum(list(parts), kind, _BLOCK)[:size]
        return decode(encode(parts, kind, _BLOCK)).sum(0)[:size]

    def _model(self, run: RunContext, seed: int) -> Any:
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            vocab_size=VOCAB, hidden_size=self.dim, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=self.experts, num_experts_per_tok=2,
            max_position_embeddings=2 * self.length,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(run.seed, weights=seed))
            model: Any = MixtralForCausalLM(config)
        model.set_attn_implementation("eager")
        model.set_experts_implementation("batched_mm")  # these two can be mapped over sequences
        return model.to(run.device)

    def _gradients(
        self, model: Any, names: tuple[str, ...], device: torch.device
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Gradients ``[n, P]`` and the mean loss of sequences ``[n, T + 1]``."""
        hidden = torch.full((self.length, self.length), -torch.inf, device=device).triu(1)[None, None]
        places = torch.arange(self.length, device=device)[None]

        def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
            given = {"input_ids": ids[None, :-1], "attention_mask": hidden, "position_ids": places, "use_cache": False}
            logits = torch.func.functional_call(model, weights, args=(), kwargs=given).logits[0]
            return F.cross_entropy(logits, ids[1:])

        mapped = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0))

        def compute(ids: Tensor) -> tuple[Tensor, Tensor]:
            found, losses = mapped({name: p.detach() for name, p in model.named_parameters()}, ids.to(device))
            return torch.cat([found[name].flatten(1) for name in names], 1), losses.mean()

        return compute

    def _part(self, run: RunContext, part: str) -> Tensor:
        def make() -> Tensor:
            from ...data.texts import corpus

            return flat(split(run.data.get("texts") or corpus(self.text))[part], 4 * self.length, part)

        return cast(Tensor, run.kept(("bytes", self.text, part), make))

    def _batch(self, run: RunContext, seed: int, step: int) -> Tensor:
        data = self._part(run, "train")
        draws = run.torch_rng(training=seed, step=step)
        places = torch.randint(len(data) - self.length, (self.ranks, 1), generator=draws)
        return data[places + torch.arange(self.length + 1)].long()

    @torch.no_grad()
    def _judged(self, run: RunContext, model: Any) -> list[float]:
        """Mean loss on each of the held-out windows, which are spread evenly."""
        data = self._part(run, "test")
        starts = torch.linspace(0, len(data) - self.length - 1, self.samples).long()[:, None]
        ids = data[starts + torch.arange(self.length + 1)].long().to(run.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses: list[float] = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1).tolist()
        return losses
