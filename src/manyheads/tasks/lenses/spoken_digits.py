# SPDX-License-Identifier: Apache-2.0
"""A published speech model transcribes digits in noise, and scores rank its transcripts.

Utterances are recordings of the Free Spoken Digit Dataset, several of one speaker after each other, in white noise.
Scores are those of :mod:`._scored`; the source are the frames until the recording ends, the target what the model says
itself, greedily, with the token that ends it. Quality is the share of words that are right, 1 - WER and no less than 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ...data.digits import DIGITS, spelt
from ...data.labelled import labelled
from ...errors import UserError
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...lenses.attention_confidence import AttentionConfidence
from ._scored import RANKED, by_prompt, judged, score_of

__all__ = ["SpokenDigits", "words_of"]

_RATE = 8000  # of the recordings
_PAUSE = 0.15  # seconds between digits


def words_of(text: str) -> list[str]:
    """Words of a transcript in lower case, figures as one word each digit."""
    return re.findall(r"[a-z']+", spelt(text))


@dataclass(frozen=True)
class _Heard:
    """A transcript: what the model is called with again, which rows and frames count, and how right it is."""

    inputs: dict[str, Any]
    rows: tuple[int, int]
    frames: int
    quality: float


@dataclass(frozen=True, kw_only=True)
class SpokenDigits(Task):
    """A value for each utterance.

    Attributes:
        model: of Whisper's kind, see :func:`manyheads.models.load_speech`.
        samples: utterances.
        digits: in each.
        noise: signal over noise in dB, from the worst to the best, drawn for each utterance.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("words_right", "share of words that are right", higher=True, kind="share"), *RANKED,
    )  # fmt: skip

    model: str = "whisper-tiny.en"
    samples: int = 60
    digits: int = 5
    noise: tuple[float, float] = (0.0, 20.0)

    def unsupported_reason(self, run: RunContext) -> str | None:
        try:
            import torchmetrics  # noqa: F401

            self._parts(run)
            labelled("fsdd")
        except UserError as error:
            return str(error)
        except ImportError:
            return "word error rates need torchmetrics: pip install 'manyheads[train]'"
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "digits", float(self.samples), f"{self.samples} spoken utterances")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        heard = []
        for sound, said in self._utterances(run):
            heard.append(self._transcribed(run, sound, said))
            run.advance(unit.cost / self.samples)
        quality, lengths = [one.quality for one in heard], [one.rows[1] - one.rows[0] for one in heard]
        yield from self.each("words_right", run.baseline, quality)
        looked: dict[str, dict[str, Any]] = {}
        for arm in run.arms:
            if arm.options.get("score") == "later":
                continue
            found = score_of(
                run, arm, 0, lengths, partial(self._likelihood, run, heard), partial(self._looked, run, heard, looked)
            )
            for metric, values in judged(found, quality, {"output": lengths, "source": [x.frames for x in heard]}):
                yield from self.each(metric, arm, values)

    def _parts(self, run: RunContext) -> Any:
        from ...models import load_speech

        return run.kept(("speech", self.model), lambda: load_speech(self.model, run.device, torch.float32))

    def _utterances(self, run: RunContext) -> Iterator[tuple[Any, list[str]]]:
        """Sounds at 16 kHz and their words."""
        rng, items = run.rng(utterances="digits"), labelled("fsdd").items
        speakers = sorted({item.group for item in items})
        for _ in range(self.samples):
            mine = [item for item in items if item.group == speakers[int(rng.integers(len(speakers)))]]
            drawn = [mine[int(i)] for i in rng.integers(len(mine), size=self.digits)]
            pause = np.zeros(int(_PAUSE * _RATE))
            spoken = [np.concatenate([np.asarray(item.values, float).reshape(-1), pause]) for item in drawn]
            sound = np.concatenate([pause, *spoken])
            loud = np.sqrt((sound**2).mean()) * 10 ** (-rng.uniform(*self.noise) / 20)
            sound = sound + loud * rng.standard_normal(len(sound))
            spectrum = np.fft.rfft(sound)
            yield 0.1 * 2 * np.fft.irfft(spectrum, 2 * len(sound)), [DIGITS[item.label] for item in drawn]

    @torch.no_grad()
    def _transcribed(self, run: RunContext, sound: Any, said: list[str]) -> _Heard:
        from torchmetrics.functional.text import word_error_rate

        model, extractor, tokenizer = self._parts(run)
        given = extractor(sound.astype(np.float32), sampling_rate=2 * _RATE, return_tensors="pt")["input_features"]
        given = given.to(run.device)
        encoded = model.get_encoder()(given)  # once for all arms
        ids = model.generate(
            encoder_outputs=encoded, do_sample=False, num_beams=1, max_new_tokens=40, return_dict_in_generate=True,
            force_unique_generate_call=True,
        )["sequences"]  # fmt: skip
        row, end = ids[0].tolist(), int(model.config.eos_token_id)  # what stands for no text is numbered from there on
        first = next((i for i, token in enumerate(row) if token < end), len(row) - 1)
        text = " ".join(words_of(tokenizer.decode(row, skip_special_tokens=True)))
        wrong = float(word_error_rate([text], [" ".join(said)]))
        frames = min(model.config.max_source_positions, -(-len(sound) * 50 // (2 * _RATE)))  # 50 a second
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids}
        return _Heard(inputs, (first - 1, len(row) - 1), frames, max(0.0, 1 - wrong))

    @torch.no_grad()
    def _likelihood(self, run: RunContext, heard: list[_Heard]) -> Any:
        found = []
        for one in heard:
            start, stop = one.rows
            likely = self._parts(run)[0](**one.inputs, use_cache=False).logits[0, start:stop].float().log_softmax(-1)
            ids = one.inputs["decoder_input_ids"][0, start + 1 : stop + 1]
            found.append(float(likely.gather(1, ids[:, None]).mean()))
        return found

    def _looked(
        self, run: RunContext, heard: list[_Heard], looked: dict[str, dict[str, Any]], lens: AttentionConfidence
    ) -> dict[str, Any]:
        import manyheads

        if lens.spec not in looked:
            model = self._parts(run)[0]
            with manyheads.watch(model, lens) as seen, torch.no_grad():
                for one in heard:
                    seen.roles = manyheads.TokenSpans({"target": [[one.rows]]}, {"source": [[(0, one.frames)]]})
                    model(**one.inputs, use_cache=False)
            looked[lens.spec] = by_prompt(seen.compute())
        return looked[lens.spec]
