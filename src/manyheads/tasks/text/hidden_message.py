# SPDX-License-Identifier: Apache-2.0
"""A message hidden in written text: how much of it is read, after which edits, at which cost, and how often by mistake.

An arm's budget is the divergence that it may cost: nats per token by which next tokens of the watermarked model differ
from the plain one's, on ordinary text behind which both are asked. The strength of every arm (what ``xattn_watermark``
adds, or the bias of a green list) is set so that it costs that much, on texts that are set aside for it; so all are
compared at one quality, and several budgets give the curve. What was really paid on the texts written is measured too.

Options of an arm: ``bits`` of a message; ``trained`` and the recipe's own (``place``, ``edits``, ``uniform``) for one
that is trained, or ``window`` for a green list; ``temperature`` of writing. Prompts, human texts and texts for setting
strengths come from a part of the corpus that no training reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...decoding.green_list import GreenList
from ...decoding.sampling import Sampling
from ...decoding.xattn_watermark.edits import EDITS, edited
from ...decoding.xattn_watermark.losses import distortion
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ._prefill import token_nll
from ._text_task import model_of

__all__ = ["HiddenMessage"]

_HELD_OUT = 0.25  # of the corpus
_ROUNDS, _MOST = 9, 16.0  # of setting a strength, and the largest one
_SURE = 0.01  # a p-value up to this says that a text is marked
_ENDS = ".!?\n"


@dataclass(frozen=True, kw_only=True)
class HiddenMessage(Task):
    """Values for each text that is written, each with a message of its own.

    Attributes:
        texts: that are written.
        prompt, length: tokens of a prompt, and of a text behind it.
        rate: share of the tokens that an edit touches.
        human: texts of the corpus that are read for false alarms.
        source: corpus.
        steps, batch, tokens, drawn: of a training: sequences of a step, their tokens, and texts written for the reader.
        tuning: texts that a strength is set by.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "bit_accuracy", "bits read right", higher=True, kind="share",
            what="the share of the message's bits that are read from the text alone; guessing has a half",
        ),
        Metric(
            "prefix_bits", "bits read right of the first tokens", higher=True, kind="share",
            what="the same read from a quarter or half of a text",
        ),
        Metric("other_bits", "bits of another text's message", kind="share", what="a control: a half if all is well"),
        Metric("detected", "texts found to be marked", higher=True, kind="share", what="p is 0.01 or less"),
        Metric("false_alarm", "human texts found to be marked", kind="share", what="the same, messages drawn"),
        Metric("divergence", "divergence paid, nats/token", "nats/token", what="of next tokens, on the texts written"),
        Metric(
            "token_nll", "loss of the texts under the plain model, nats/token", "nats/token",
            what="how unlikely the plain model finds what was written; plain texts have its entropy",
        ),
        Metric("strength", "strength that costs the budget"),
    )  # fmt: skip

    texts: int = 48
    prompt: int = 16
    length: int = 64
    rate: float = 0.2
    human: int = 200
    source: str = "prose"
    steps: int = 200
    batch: int = 16
    tokens: int = 64
    drawn: int = 128
    tuning: int = 16

    def __post_init__(self) -> None:
        if min(self.texts, self.prompt, self.length, self.human, self.steps, self.batch, self.tuning) < 1:
            raise UserError("texts, prompt, length, human, steps, batch and tuning count, 1 or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        lm = cast(CausalLM, run.subject)
        return None if lm.tokenizer is not None else f"{lm.name} has no tokenizer, so that it writes no text"

    def units(self, run: RunContext) -> list[WorkUnit]:
        """One for each training, with all arms that use it, and one for all others."""
        groups: dict[str, list[str]] = {}
        for arm in run.arms:
            groups.setdefault(repr(_recipe(arm)) if "trained" in arm.options else "", []).append(arm.key)
        return [
            WorkUnit(
                self.key, f"{number}", float(len(keys) + 8 * bool(recipe)), f"hidden messages, {keys[0]}",
                {"arms": keys},
            )
            for number, (recipe, keys) in enumerate(groups.items())
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arms = [arm for arm in run.arms if arm.key in unit.params["arms"]]
        for seed in run.seeds:
            for arm in arms:
                yield from self._rows(run, arm, seed)
                run.advance(unit.cost / len(arms) / len(run.seeds))

    def _rows(self, run: RunContext, arm: Arm, seed: int) -> Iterator[Row]:
        from ...recipes.xattn_watermark import written

        model, bits = model_of(run), int(arm.options.get("bits", 0))
        rng = run.rng(texts=self.source, seed=seed)
        ids = self._cut(run, self.texts, self.prompt, "prompts", seed)
        messages = torch.from_numpy(rng.integers(2, size=(self.texts, max(1, bits)))).float().to(ids.device)
        marked = self._marked(run, arm, seed, messages) if bits else _Marked(None, None)
        chooser = marked.chooser or Sampling(temperature=float(arm.options.get("temperature", 1.0)))
        made = written(model, marked.acting, ids, self.length, seed=1000 + seed, chooser=chooser)
        nll, kl = self._costs(model, marked, ids, made)
        for metric, values in (("token_nll", nll), ("divergence", kl)):
            yield from self.each(metric, arm, values, seed=seed)
        if not bits:
            return
        yield self.row("strength", arm, marked.strength, "strength", seed=seed)
        said = ["".join(str(int(bit)) for bit in row) for row in messages.tolist()]
        texts, ends = made.tolist(), self._ends(run)
        foreign = self._human(run)
        for edit in EDITS:
            draws = run.rng(edit=edit, seed=seed)
            changed = [edited(text, edit, self.rate, draws, foreign, ends) for text in texts]
            found = marked.watermark.read(changed, said)
            right = [each.right(message) for each, message in zip(found, said, strict=True)]
            sure = [each.p_value <= _SURE for each in found]
            at: dict[str, Any] = {"edit": edit}
            yield from self.each("bit_accuracy", arm, right, seed=seed, at=at)
            yield from self.each("detected", arm, sure, seed=seed, at=at)
            if edit == "none":
                for size in (self.length // 4, self.length // 2):
                    short = marked.watermark.read([text[:size] for text in texts], said)
                    right = [each.right(message) for each, message in zip(short, said, strict=True)]
                    yield from self.each("prefix_bits", arm, right, seed=seed, at={"tokens": size})
                others = [each.right(message) for each, message in zip(found, said[1:] + said[:1], strict=True)]
                yield from self.each("other_bits", arm, others, seed=seed)
        people = self._cut(run, self.human, self.length, "human", seed).tolist()
        keys = run.rng(human=self.source, seed=seed).integers(2, size=(len(people), bits)).tolist()
        found = marked.watermark.read(people, ["".join(map(str, key)) for key in keys])
        yield from self.each("false_alarm", arm, [each.p_value <= _SURE for each in found], seed=seed)

    def _marked(self, run: RunContext, arm: Arm, seed: int, messages: Tensor) -> _Marked:
        """What hides the messages at the strength that costs the arm's budget."""
        options = arm.options
        bits, heat = messages.shape[1], float(options.get("temperature", 1.0))
        ids = self._cut(run, self.tuning, self.length, "tuning", seed)
        given = torch.from_numpy(run.rng(tuning=self.source, seed=seed).integers(2, size=(self.tuning, bits)))
        if "trained" in options:
            made = run.kept_last("watermark", (self, _recipe(arm), seed), lambda: self._train(run, arm, seed))

            def marked(strength: float, rows: Tensor) -> _Marked:
                acting = made.strategy(strength=strength, rows=rows, message="0" * bits)
                return _Marked(acting, Sampling(temperature=heat), strength)
        else:

            def marked(strength: float, rows: Tensor) -> _Marked:
                listed = GreenList(
                    delta=strength, window=int(options["window"]), key=seed, rows=rows, message="0" * bits,
                    temperature=heat,
                )  # fmt: skip
                return _Marked(None, listed, strength)

        given = given.float().to(ids.device)
        model = model_of(run)
        with torch.no_grad():
            plain = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            found = _strength(
                lambda strength: float(distortion(marked(strength, given).logits(model, ids, plain), plain).mean()),
                float(arm.budget or 0),
            )
        return marked(found, messages)

    def _train(self, run: RunContext, arm: Arm, seed: int) -> Any:
        from ...recipes._adapters import id_batches
        from ...recipes.xattn_watermark import train_watermark

        ids = self._ids(run)[0]
        return train_watermark(
            model_of(run), id_batches(ids, self.tokens, self.batch, seed, run.device), budget=self.steps,
            texts=self.drawn, seed=seed, replayed=run.device.type == "cuda", **dict(_recipe(arm)),
        )  # fmt: skip

    def _costs(self, model: Any, marked: _Marked, ids: Tensor, made: Tensor) -> tuple[list[float], list[float]]:
        """Of each text: nats per token under the plain model, and the divergence of its next tokens."""
        whole = torch.cat([ids, made], 1)
        start = ids.shape[1] - 1
        nll, kl = list[float](), list[float]()
        with torch.no_grad():
            for i in range(0, len(whole), 16):
                part = whole[i : i + 16]
                plain = model(input_ids=part[:, :-1], use_cache=False).logits[:, start:].float()
                nll += token_nll(plain, part[:, start + 1 :]).mean(1).tolist()
                changed = marked.part(i, i + 16).logits(model, part, plain, start)
                kl += distortion(changed, plain).mean(1).tolist()
        return nll, kl

    def _ids(self, run: RunContext) -> tuple[Tensor, Tensor]:
        """Tokens of the corpus, for training and held out."""

        def make() -> tuple[Tensor, Tensor]:
            from ...recipes._adapters import encoded, texts

            ids = encoded(texts(self.source), cast(CausalLM, run.subject).tokenizer)
            cut = int(len(ids) * (1 - _HELD_OUT))
            return ids[:cut], ids[cut:]

        return cast(tuple[Tensor, Tensor], run.kept(("hidden message", self.source), make))

    def _cut(self, run: RunContext, count: int, length: int, what: str, seed: int) -> Tensor:
        """Stretches ``[count, length]`` of the part held out."""
        ids = self._ids(run)[1]
        if len(ids) <= length:
            raise UserError(f"{self.source} leaves {len(ids)} tokens to judge by, and a text has {length}: give more")
        starts = run.rng(cut=what, seed=seed).integers(len(ids) - length, size=(count, 1))
        return ids[torch.from_numpy(starts) + torch.arange(length)].to(run.device)

    def _human(self, run: RunContext) -> Sequence[int]:
        """Tokens that an editor brings."""
        found: list[int] = self._ids(run)[0][:20_000].tolist()
        return found

    def _ends(self, run: RunContext) -> frozenset[int]:
        """Tokens that end a sentence."""

        def make() -> frozenset[int]:
            tokenizer = cast(CausalLM, run.subject).tokenizer
            known = range(len(tokenizer))
            return frozenset(i for i in known if tokenizer.decode([i]).strip(" ")[-1:] in tuple(_ENDS))

        return cast(frozenset[int], run.kept("ends of sentences", make))


def _recipe(arm: Arm) -> tuple[tuple[str, Any], ...]:
    """What decides the training of an arm."""
    return tuple(
        sorted((name, arm.options[name]) for name in ("bits", "place", "edits", "uniform") if name in arm.options)
    )


@dataclass(frozen=True)
class _Marked:
    """What hides messages: a strategy that acts on the model, or a chooser; or nothing.

    Attributes:
        acting, chooser: of them, with messages in ``rows``.
        strength: of it.
    """

    acting: Any
    chooser: Any
    strength: float = 0.0

    def part(self, start: int, stop: int) -> _Marked:
        """The same for some rows."""
        acting, chooser = (
            x if getattr(x, "rows", None) is None else replace(x, rows=x.rows[start:stop])
            for x in (self.acting, self.chooser)
        )
        return _Marked(acting, chooser, self.strength)

    def logits(self, model: Any, ids: Tensor, plain: Tensor, start: int = 0) -> Tensor:
        """Logits ``[B, T, V]`` of what follows ``ids [B, S]`` from place ``start`` on, beside the plain ones."""
        if self.acting is not None:
            with use(model, self.acting):
                found: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits[:, start:].float()
            return found
        if not isinstance(self.chooser, GreenList):
            return plain
        raised = [self.chooser.raised(plain[:, t], ids[:, : start + t + 1]) for t in range(plain.shape[1])]
        return torch.stack(raised, 1)

    @property
    def watermark(self) -> Any:
        """What reads the messages."""
        return self.acting if self.acting is not None else self.chooser


def _strength(divergence: Callable[[float], float], budget: float) -> float:
    """The strength, by bisection, at which the divergence is ``budget``; the largest where none is enough."""
    low, high = 0.0, 1.0
    while high < _MOST and divergence(high) < budget:
        low, high = high, 2 * high
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < budget else (low, middle)
    return float(np.mean([low, high]))
