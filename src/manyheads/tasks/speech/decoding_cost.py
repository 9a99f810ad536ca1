# SPDX-License-Identifier: Apache-2.0
"""What a recording costs an encoder-decoder of Whisper's kind: operations counted, and seconds on a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...domains.speech.speech_efficiency import SpeechEfficiency
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...training import matched_width
from ...training.matching import parameters_of
from ._digits import corpus

__all__ = ["DecodingCost"]

_VOCABULARY = 51864  # Whisper's for English


@dataclass(frozen=True, kw_only=True)
class DecodingCost(Task):
    """Greedy decoding with a cache of keys and values, by models of random weights: what they say is nothing.

    The shape is that of Whisper tiny.en unless the fields say another. An arm's ``shift`` moves layers from decoder to
    encoder; the width of the feed-forward layers follows, so that all have as many parameters.

    Operations are counted of real recordings of digits, one by one: the encoder has as many positions as a recording
    has frames of 20 ms, and as many tokens are written as its transcript has letters. Seconds are of a batch of 30 s.

    Attributes:
        dim, layers, heads: of encoder and decoder of the baseline.
        recordings, digits: whose operations are counted, and how many words one has at most.
        timed: seconds on a GPU; operations else.
        tokens, batch, repeats: that are written, recordings at a time, and how often, where seconds are measured.
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
    recordings: int = 16
    digits: int = 20
    timed: bool = False
    tokens: int = 24
    batch: int = 8
    repeats: int = 7
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if min(self.layers, self.recordings, self.digits, self.tokens, self.batch, self.repeats) < 1:
            raise UserError("layers, recordings, digits, tokens, batch and repeats count, 1 or more")
        if self.dim % self.heads:
            raise UserError("heads divide dim")

    def unsupported_reason(self, run: RunContext) -> str | None:
        if self.timed:
            return None if run.device.type == "cuda" else "seconds are of a GPU, --device cuda"
        return refusal(lambda: corpus(self.recordings, self.digits))

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 1.0, f"{arm.key}: cost of decoding", {"arm": arm.key})
            for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        shift, width = self._shape(arm)
        with torch.device("meta"):
            yield self.row("parameters", arm, float(parameters_of(self._built(shift, width))), "model")
        if self.timed:
            yield from self._seconds(run, arm, shift, width)
            return
        for i, (duration, letters) in enumerate(zip(*corpus(self.recordings, self.digits), strict=True)):
            few, many = self._counted(shift, width, math.ceil(50 * duration), int(letters))
            yield self.row("operations", arm, (many - few) / (letters - 1) / 1e9, f"recording {i}")
            yield self.row("whole", arm, many / 1e9, f"recording {i}")

    def _counted(self, shift: int, width: int, frames: int, tokens: int) -> tuple[float, float]:
        """Operations of a recording whose transcript has one token, and as many as said; weights may be anything."""
        with torch.device("meta"):
            model = self._built(shift, width, frames).eval()
        model, found = model.to_empty(device="cpu"), []
        for count in (1, tokens):
            with FlopCounterMode(display=False) as counter:
                _written(model, torch.zeros(1, 80, 2 * frames), count)
            found.append(float(counter.get_total_flops()))
        return found[0], found[1]

    def _seconds(self, run: RunContext, arm: Arm, shift: int, width: int) -> Iterator[Row]:
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(seeding.number(run.seed, weights=0))
            model = self._built(shift, width).to(run.device).eval()
            sound = torch.randn(self.batch, 80, 3000, device=run.device)
        for i in range(self.repeats + 1):
            run.synchronise()
            begun = time.perf_counter()
            _written(model, sound, self.tokens)
            run.synchronise()
            if i:  # the first warms up
                yield self.row("seconds", arm, time.perf_counter() - begun, f"repeat {i}")

    def _shape(self, arm: Arm) -> tuple[int, int]:
        """Layers that move, and the width of feed-forward layers."""
        if not arm.spec:
            return 0, 4 * self.dim
        if not isinstance(found := arm.strategy, SpeechEfficiency):
            raise UserError(f"{arm.key} moves no layers: give speech_efficiency")
        if found.shift >= self.layers:
            raise UserError(f"{arm.key} leaves no decoder of {self.layers} layers: shift fewer")
        with torch.device("meta"):
            wanted = parameters_of(self._built(0, 4 * self.dim))
        return found.shift, matched_width(lambda width: self._built(found.shift, width), wanted, name=arm.key)

    def _built(self, shift: int, width: int, frames: int = 1500) -> Any:
        from transformers import WhisperConfig, WhisperForConditionalGeneration

        kind: Any = WhisperConfig
        config = kind(
            vocab_size=_VOCABULARY, d_model=self.dim, encoder_layers=self.layers + shift, encoder_ffn_dim=width,
            decoder_layers=self.layers - shift, decoder_ffn_dim=width, encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None, max_source_positions=frames,
            attn_implementation="sdpa" if self.timed else "eager",  # whose products the counter knows
        )  # fmt: skip
        return WhisperForConditionalGeneration(config)


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
