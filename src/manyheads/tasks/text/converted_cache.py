# SPDX-License-Identifier: Apache-2.0
"""What a converted language model still knows of a context that it reads through its cache, and how large that is.

As :mod:`.converted_loss`, but everything judged has passed through the cache: the loss of what follows a context, and a
needle that is asked for after it (RULER). ``cache`` among the options of an arm is the spec of the cache strategy that
the model is judged with; without, the cache is the model's own. The last third of the texts is judged on, the others
are calibrated and recovered on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch

from ...converter import Converted, Material
from ...data.texts import Text, corpus
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ...integrations.cache import cache_arguments
from ...integrations.transformers import new_cache
from ...spec import parse
from ._text_task import model_of, tensor
from .converted_loss import ConvertedLoss
from .niah_single import NiahSingle
from .perplexity import Perplexity

__all__ = ["ConvertedCache"]

_HALF = 2  # bytes of a number that is not stored in fewer, in a model as it is served


@dataclass(frozen=True, kw_only=True)
class ConvertedCache(ConvertedLoss):
    """A value for each context, and for each seed where an arm draws or is trained.

    Attributes:
        context: tokens of a context.
        samples: contexts.
        target: tokens behind a context whose loss is judged.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "token_nll", "loss behind a context, nats/token", "nats/token",
            what="how unlikely the model finds the text that follows what its cache holds",
        ),
        Metric(
            "recalled", "needle, asked after", higher=True, kind="share", floor=0.5,
            what="a constant is planted in the text and asked for after the text is in the cache",
        ),
        Metric("cache", "bytes of a token and layer", "bytes", what="what the cache holds, 16 bits for a whole number"),
        Metric("parameters", "share of the parameters that is left"),
    )  # fmt: skip

    context: int = 256
    samples: int = 16
    target: int = 64

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, found = run.arm_of(unit), None
        for seed in run.seeds:
            if found is None or "recover" in arm.options or "seeded" in arm.options:
                found = self._judged(run, arm, seed)
            yield from (self.row(name, arm, value, sample, seed=seed) for name, value, sample in found)

    def _judged(self, run: RunContext, arm: Arm, seed: int) -> list[tuple[str, float, str]]:
        """Metric, value and sample of each row."""
        made = self._once(run, arm, seed) if arm.spec else None
        model: Any = made.model if made else model_of(run)
        share = made.parameters[1] / made.parameters[0] if made else 1.0
        lm, cache = cast(CausalLM, run.subject), arm.options.get("cache", "")
        inner = RunContext(
            CausalLM(lm.name, model, lm.tokenizer), (Arm(arm.key, cache),), run.seed, device=run.device,
            data={"texts": self._parts()[1]},
        )  # fmt: skip
        loss = Perplexity(lengths=(self.context,), samples=self.samples, target=self.target, piece=self.target)
        needle = NiahSingle(lengths=(self.context,), samples=self.samples)
        named = {"token_nll": "token_nll", "query_agnostic": "recalled"}
        rows = [
            (named[row.metric], row.value, row.sample)
            for task in (loss, needle) for part in task.units(inner) for row in task.measure(inner, part)
            if row.metric in named
        ]  # fmt: skip
        return [*rows, ("cache", self._bytes(model, cache, inner), "model"), ("parameters", share, "model")]

    def _once(self, run: RunContext, arm: Arm, seed: int) -> Converted:
        """What arms that differ in their cache alone share is converted and trained once."""
        key = arm.spec, "recover" in arm.options
        if sum((other.spec, "recover" in other.options) == key for other in run.arms) < 2:
            return self.converted(run, arm, seed)
        made: Converted = run.kept((*key, seed), lambda: self.converted(run, arm, seed))
        return made

    def _bytes(self, model: Any, spec: str, run: RunContext) -> float:
        """Bytes that the cache holds for one token of a context in one layer, numbers of the model's dtype as 16 bits.

        Without room for more tokens, and with what a strategy keeps beside them.
        """
        ids = tensor(run, [[1 + i % 7 for i in range(self.context)]])
        strategy = parse(spec or "full")
        with torch.inference_mode(), use(model, strategy):
            cache: Any = new_cache(model, strategy)
            model(input_ids=ids, **cache_arguments(model, cache))
            held = [x for layer in cache.layers for x in layer.store.held if x is not None]
        whole = [x[..., : self.context, :] if x.ndim == 4 else x for x in held]
        size = sum(
            x.numel() * (min(x.element_size(), _HALF) if x.is_floating_point() else x.element_size()) for x in whole
        )
        return float(size / (self.context * len(cache.layers)))

    def _parts(self) -> tuple[tuple[Text, ...], tuple[Text, ...]]:
        """Texts to convert on, and texts to judge on."""
        texts = tuple(corpus(self.text))
        split = max(1, 2 * len(texts) // 3)
        return texts[:split], texts[split:]

    def _material(self, run: RunContext) -> Material:
        return Material.of(self._parts()[0], cast(CausalLM, run.subject).tokenizer, self.length, self.windows)
