# SPDX-License-Identifier: Apache-2.0
"""What a recording costs an encoder-decoder of Whisper's kind: operations counted, and seconds on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...domains.speech.speech_efficiency import SpeechEfficiency
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...training import matched_width
from ...training.matching import parameters_of

__all__ = ["DecodingCost"]

_VOCABULARY = 51864  # Whisper's for English


@dataclass(frozen=True, kw_only=True)
class DecodingCost(Task):
    """Greedy decoding with a cache of keys and values, by models of random weights: what they say is nothing.

    The shape is that of Whisper tiny.en unless the fields say another. An arm's ``shift`` moves layers from decoder to
    encoder; the width of the feed-forward layers follows, so that all have as many parameters. A recording has 30 s.
    Seconds are medians over ``repeats``.

    Attributes:
        dim, layers, heads: of encoder and decoder of the baseline.
        tokens: that are written.
        batch: recordings at a time, for seconds; operations are counted for one.
        timed: seconds on a GPU; operations else.
        repeats: of a measurement of seconds.
        only: names of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("operations", "operations of a token behind the first", "GFLOP/token"),
        Metric("whole", "operations of a recording and its transcript", "GFLOP"),
        Metric("seconds", "seconds of a batch", "s", kind="time"),
        Metric("parameters", "parameters", "parameters"),
    )

    dim: int = 384
    layers: int = 4
    heads: int = 6
    tokens: int = 24
    batch: int = 8
    timed: bool = False
    repeats: int = 7
    only: tuple[str, ...] = ()
    named: str = ""

    @property
    def label(self) -> str:
        return self.named

    def __post_init__(self) -> None:
        if min(self.layers, self.tokens - 1, self.batch, self.repeats) < 1 or self.dim % self.heads:
            raise UserError("layers, batch and repeats count, 1 or more, tokens 2 or more, and heads divide dim")

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.timed and run.device.type != "cuda":
            return "seconds are of a GPU, --device cuda"
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 1.0, f"{arm.key}: cost of decoding", {"arm": arm.key})
            for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(seeding.number(run.seed, weights=0))
            model = self._model(arm).to(run.device).eval()
            sound = torch.randn(self.batch, 80, 3000, device=run.device)
        yield self.row("parameters", arm, float(parameters_of(model)), "model")
        if self.timed:
            yield from self._timed(run, arm, model, sound)
            return
        few, many = (self._counted(model, sound[:1], n) for n in (1, self.tokens))
        yield self.row("operations", arm, (many - few) / (self.tokens - 1) / 1e9, "tokens")
        yield self.row("whole", arm, many / 1e9, "recording")

    def _timed(self, run: RunContext, arm: Arm, model: Any, sound: torch.Tensor) -> Iterator[Row]:
        for i in range(self.repeats + 1):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            _written(model, sound, self.tokens)
            torch.cuda.synchronize()
            if i:  # the first warms up
                yield self.row("seconds", arm, time.perf_counter() - begun, f"repeat {i}")

    def _model(self, arm: Arm) -> Any:
        shift = 0
        if arm.spec:
            if not isinstance(found := arm.strategy, SpeechEfficiency):
                raise UserError(f"{arm.key} moves no layers: give speech_efficiency")
            shift = found.shift
        if shift >= self.layers:
            raise UserError(f"{arm.key} leaves no decoder of {self.layers} layers: shift fewer")
        with torch.device("meta"):
            wanted = parameters_of(self._built(0, 4 * self.dim))
        width = matched_width(lambda width: self._built(shift, width), wanted, name=arm.key) if shift else 4 * self.dim
        return self._built(shift, width)

    def _built(self, shift: int, width: int) -> Any:
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        kind: Any = WhisperConfig
        config = kind(
            vocab_size=_VOCABULARY, d_model=self.dim, encoder_layers=self.layers + shift, encoder_ffn_dim=width,
            decoder_layers=self.layers - shift, decoder_ffn_dim=width, encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
            attn_implementation="sdpa" if self.timed else "eager",  # whose products the counter knows
        )  # fmt: skip
        return WhisperForConditionalGeneration(config)

    def _counted(self, model: Any, sound: torch.Tensor, tokens: int) -> float:
        with FlopCounterMode(display=False) as counter:
            _written(model, sound, tokens)
        return float(counter.get_total_flops())


@torch.no_grad()
def _written(model: Any, sound: torch.Tensor, tokens: int) -> torch.Tensor:
    """Ids ``[B, tokens]`` behind the beginning, the likeliest one after the other."""
    encoded = model.get_encoder()(sound)
    ids = torch.zeros(len(sound), 1, dtype=torch.long, device=sound.device)
    found, cache = [], None
    for _ in range(tokens):
        out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        found.append(ids)
    return torch.cat(found, 1)
