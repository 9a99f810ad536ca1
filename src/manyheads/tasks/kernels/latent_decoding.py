# SPDX-License-Identifier: Apache-2.0
"""Seconds of a decoding step of a whole model with latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...costs.clock import Clock
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...integrations import use
from ...integrations.cache import cache_arguments
from ...integrations.transformers import new_cache
from ._latent import LatentTask

__all__ = ["LatentDecoding"]

_SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative difference of logits that rounding explains
_VOCAB = 1024


@dataclass(frozen=True, kw_only=True)
class LatentDecoding(LatentTask):
    """DeepSeek-V3 of two dense layers as transformers has it, with random weights; only its attention has its size.

    The arm without a strategy decodes as transformers does. The arms take turns; the time is the host's and holds
    everything that a step is made of. The guard asks that all arms say the same.

    Attributes:
        hidden: channels of the residual stream.
        batch: rows that decode together.
        context: tokens held of each row.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("step", "decoding step, s", "s", kind="time"),)

    hidden: int = 256
    batch: int = 4
    context: int = 4096

    def guard(self, run: RunContext) -> None:
        model, tokens, ids = self._made(run, 0)
        said = {arm.key: self._step(model, self._cache(arm, model, tokens), arm, ids).float() for arm in run.arms}
        wanted = said[run.baseline.key]
        for key, logits in said.items():
            difference = float((logits - wanted).norm() / wanted.norm())
            if not difference <= _SAME[model.dtype]:
                raise UserError(
                    f"{key} predicts otherwise than {run.baseline.key}: {difference:.1e} of the logits, so that its "
                    "time is of another model"
                )

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.batch * self.context * len(run.arms))
        return [WorkUnit(self.key, f"{seed}", cost, "a whole model", {"seed": seed}) for seed in run.seeds]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed, clock = unit.params["seed"], Clock(torch.device("cpu"))
        model, tokens, ids = self._made(run, seed)
        caches = {arm.key: self._cache(arm, model, tokens) for arm in run.arms}
        for turn in range(self.repeats + 1):
            for arm in run.arms:
                run.synchronise()

                def step(arm: Arm = arm) -> None:
                    self._step(model, caches[arm.key], arm, ids)
                    run.synchronise()

                spent = clock.seconds(step)
                if turn:  # the first turn warms up
                    yield self.row("step", arm, spent, f"{seed}.{turn}", seed=seed)

    def _made(self, run: RunContext, seed: int) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """The model, latents and rotary keys of both layers, and the next token of each row."""
        model = run.kept(("decoder", self.sizes, self.hidden, self.context), lambda: self._decoder(run))
        draw = run.torch_rng(tokens="latents", turn=seed)

        def normal(width: int) -> torch.Tensor:
            return torch.randn(self.batch, 1, self.context, width, generator=draw).to(run.device, model.dtype)

        tokens = [(normal(self.sizes[1]), normal(self.sizes[3])) for _ in range(2)]
        return model, tokens, torch.randint(0, _VOCAB, (self.batch, 1), generator=draw).to(run.device)

    def _decoder(self, run: RunContext) -> Any:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        heads, rank, nope, rope, value, queries = self.sizes
        config = DeepseekV3Config(
            vocab_size=_VOCAB, hidden_size=self.hidden, intermediate_size=min(self.hidden, 2048), num_hidden_layers=2,
            first_k_dense_replace=2, num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=rank,
            q_lora_rank=queries, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, n_routed_experts=8,
            num_experts_per_tok=2, n_group=1, topk_group=1, max_position_embeddings=self.context + 256,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )  # fmt: skip
        with torch.device(run.device), torch.random.fork_rng():
            torch.manual_seed(seeding.number(run.seed, weights="decoder"))
            model: Any = DeepseekV3ForCausalLM(config)
        return model.to(torch.bfloat16 if run.device.type == "cuda" else torch.float32).eval().requires_grad_(False)

    @staticmethod
    def _cache(arm: Arm, model: Any, tokens: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """A cache that holds ``tokens``: transformers' own, or that of the arm."""
        from transformers import DynamicCache

        with torch.inference_mode(), use(model) if arm.spec else nullcontext():
            cache: Any = new_cache(model, arm.strategy) if arm.spec else DynamicCache(config=model.config)
            for index, (latent, rope) in enumerate(tokens):
                cache.update(latent, rope, index)
        return cache

    @staticmethod
    def _step(model: Any, cache: Any, arm: Arm, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), use(model) if arm.spec else nullcontext():
            logits: torch.Tensor = model(ids, **cache_arguments(model, cache)).logits
        return logits
