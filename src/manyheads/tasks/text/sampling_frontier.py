# SPDX-License-Identifier: Apache-2.0
"""Loss against entropy of what a language model writes under ways to sample, and how human it is at equal entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...data.texts import corpus
from ...decoding._cut import Cut
from ...decoding.lnd import GlobalSampling
from ...errors import UserError
from ...experiment import CausalLM, Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ...integrations.model_access import Access
from ...integrations.transformers import new_cache, prefill
from ...spec import parse
from ...writing import Request
from .._embedded import embedded_texts
from ._contexts import Contexts
from ._corpus import Corpus
from ._frontier import METRICS, Array, Curve, FrontierTask, Rows, at_level, cut_of, pseudo_values, swept
from ._reader import reader
from ._text_task import model_of, tensor
from ._written import cells, distinct, mauve, self_bleu

__all__ = ["SamplingFrontier"]

_ROWS = {"cpu": 256, "cuda": 4096}  # texts that grow side by side


@dataclass
class _Drawn:
    """What an arm wrote at one value of its parameter: figures ``[C]``, and texts of each context."""

    figures: dict[str, Array]
    texts: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SamplingFrontier(FrontierTask):
    """Continuations of prose, each arm's drawn by itself; where an arm stands on its curve follows from its own texts.

    The entropy is exact for plain sampling given its texts; of whole texts it is loss over temperature plus pressure,
    whose share A is the mean over the copies. ``distortion`` is the mean over pairs of texts of one context of
    ``|log eps(v) - log eps(w)|``, as the paper measures it. ``mauve`` is MAUVE of cells of MiniLM embeddings: as many
    windows of what follows in the text stand for what people write. Texts have one length and never end.

    Attributes:
        length: tokens of a context.
        tokens: of a text.
        copies: texts of each context.
        samples: contexts.
        text: a corpus of :mod:`manyheads.data.texts`.
        particles: of arms that normalise whole texts, in place of their own; 0 leaves it.
        encoder: of embeddings, see :func:`manyheads.models.load_reader`; empty leaves MAUVE away.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        *METRICS,
        Metric("mauve_at_entropy", "MAUVE at equal entropy", higher=True, what="how human, of texts of one entropy"),
        Metric("mauve", "MAUVE beside what people wrote", higher=True, what="by cells of MiniLM embeddings"),
        Metric("self_bleu", "self-BLEU", what="of the texts of one context, each beside the others"),
        Metric("distinct", "distinct bigrams", higher=True, kind="share"),
        Metric("effective", "particles that count at the end", kind="share", what="1 where none weighs more"),
    )

    length: int = 48
    tokens: int = 24
    copies: int = 8
    samples: int = 8
    text: str = "prose"
    particles: int = 0
    encoder: str = "all-minilm-l6-v2"

    def __post_init__(self) -> None:
        if min(self.length, self.tokens) < 2 or self.copies < 2 or self.samples < 1:
            raise UserError("a frontier needs contexts and texts of 2 tokens or more, and 2 copies or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        subject = cast(CausalLM, run.subject)
        if subject.tokenizer is None:
            return f"{subject.name} has no tokenizer, so that it reads no text"
        return super().unsupported_reason(run)

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.samples * self.copies * self.tokens * sum(self._work(arm) for arm in run.arms))
        return [WorkUnit(self.key, "frontier", cost, f"frontiers of {len(run.arms)} samplers")]

    def _work(self, arm: Any) -> int:
        cut, family = cut_of(arm)
        return len(getattr(self, family)) * (self._sized(cut).particles if isinstance(cut, GlobalSampling) else 1)

    def _sized(self, cut: Any) -> Any:
        return replace(cut, particles=self.particles) if self.particles else cut

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        model, ids = model_of(run), self._ids(run)
        start, human = ids[:, : self.length], ids[:, self.length :].reshape(len(ids), self.copies, self.tokens)
        total, curves, texts = sum(self._work(arm) for arm in run.arms), [], dict[str, list[_Drawn]]()
        with torch.inference_mode(), use(model):
            pure = self._drawn(run, start, GlobalSampling(particles=1), "pure sampling")
            read = [model(input_ids=row).logits[0] for row in ids[:, : self.length + self.tokens].split(1)]
            greedy = self._drawn(run, start, GlobalSampling(particles=1, top_k=1), "likeliest token")
            for arm in run.arms:
                cut, family = cut_of(arm)
                whole, values, drawn = isinstance(cut, GlobalSampling), getattr(self, family), []
                for value in values:
                    own = swept(self._sized(cut) if whole else _plain(cut), family, value)
                    drawn.append(self._drawn(run, start, own, f"{arm.key}/{value}", whole))
                    drawn[-1].figures["mass"] = np.array([_mass(own, logits) for logits in read])
                figures = {name: np.column_stack([one.figures[name] for one in drawn]) for name in drawn[0].figures}
                curves.append(Curve(arm, family, whole, values, figures))
                texts[arm.key] = drawn
                run.advance(unit.cost * self._work(arm) / total)
        yield from self.compared(curves, pure.figures["nll"], greedy.figures["nll"])
        if self.encoder:
            yield from self._human(run, curves, texts, pure, greedy, human)

    def _drawn(self, run: RunContext, ids: Tensor, cut: GlobalSampling, name: str, whole: bool = False) -> _Drawn:
        """Texts of every context, ``copies`` each; a greedy text stands for all copies."""
        seed = int(run.rng(sampled=name).integers(2**31))
        generator, model = torch.Generator(run.device).manual_seed(seed), model_of(run)
        most = max(1, _ROWS.get(run.device.type, 256) // (self.copies * cut.particles))
        parts = []
        for part in ids.split(most):
            cache = new_cache(model, parse("full"))
            prefill(model, part, cache)
            request = Request(model, None, part, self.tokens, cache=cache)
            found = cut.grow(request, Access(model), self.copies, generator)
            chosen = torch.multinomial(found.log_weight.exp(), 1, generator=generator)
            weight, shape = found.log_weight.exp(), (len(part), self.copies)
            picked = found.tokens.gather(1, chosen[..., None].expand(-1, 1, found.tokens.shape[2]))[:, 0]
            parts.append([
                x.cpu() for x in (
                    -(weight * found.log_p).sum(1).view(shape), found.log_share.view(shape),
                    found.log_mass.gather(1, chosen).view(shape), picked.view(*shape, -1),
                    found.effective.view(shape) / cut.particles,
                )
            ])  # fmt: skip
        loss, share, mass, tokens, counts = (torch.cat(x) for x in zip(*parts, strict=True))
        pooled = share.logsumexp(1) - np.log(self.copies) if whole else mass.mean(1)
        upper = torch.triu_indices(self.copies, self.copies, 1)
        pairs = (mass[:, upper[0]] - mass[:, upper[1]]).abs().mean(1)
        texts: list[list[list[int]]] = tokens.tolist()
        nll, per = loss.mean(1) / self.tokens, pooled / self.tokens
        figures = {"nll": nll, "entropy": nll / cut.temperature + per, "pressure": per, "distortion": pairs}
        figures["effective"] = counts.mean(1).clamp(max=1.0)
        return _Drawn({
            **{name: x.double().numpy() for name, x in figures.items()},
            "self_bleu": np.array([self_bleu(own) for own in texts]),
            "distinct": np.array([distinct(own) for own in texts]),
        }, texts)  # fmt: skip

    def _human(
        self, run: RunContext, curves: Sequence[Curve], texts: dict[str, list[_Drawn]], pure: _Drawn, greedy: _Drawn,
        human: Tensor,
    ) -> Iterator[Row]:  # fmt: skip
        model, reads = reader(run, self.encoder)
        tokenizer = cast(Any, cast(CausalLM, run.subject).tokenizer)

        def embedded(own: Sequence[Sequence[Sequence[int]]]) -> Tensor:
            return embedded_texts(model, reads, [tokenizer.decode(text) for some in own for text in some])

        of_human, count = embedded(human.tolist()), max(2, self.samples * self.copies // 10)

        def tables(drawn: _Drawn) -> Array:
            """Of each context how many texts of people and of the arm are in each cell, ``[2, C, K]``."""
            own = cells(torch.cat([of_human, embedded(drawn.texts)]), count).view(2, self.samples, self.copies)
            return torch.nn.functional.one_hot(own, count).sum(2).double().numpy()

        ends = [tables(greedy), tables(pure)]
        for curve in curves:
            every = np.array([ends[0], *map(tables, texts[curve.arm.key]), ends[1]])  # [K + 2, 2, C, cells]
            entropies = np.column_stack([0 * greedy.figures["nll"], curve.figures["entropy"], pure.figures["nll"]])
            found = pseudo_values(partial(_mauves, every), self.samples)
            for k, value in enumerate(curve.values):
                at = {"setting": f"{curve.family}={value:g}"}
                yield from self.each("mauve", curve.arm, found[:, 1 + k], at=at)
            for share in self.levels:
                read = partial(_mauve_at, every, entropies, share * float(pure.figures["nll"].mean()))
                values = pseudo_values(read, self.samples)
                yield from self.each("mauve_at_entropy", curve.arm, values, at={"entropy": share})

    def _ids(self, run: RunContext) -> Tensor:
        """Contexts and what follows each, ``[C, length + copies * tokens]``."""
        tokenizer = cast(Any, cast(CausalLM, run.subject).tokenizer)
        contexts = Contexts(
            Corpus(run.data.get("texts") or corpus(self.text), tokenizer), tokenizer, self.samples, run.seed
        )
        drawn = contexts.plain(self.name, self.length, self.samples, self.copies * self.tokens)
        return tensor(run, [ids for ids, _, _ in drawn])


def _plain(cut: Cut) -> GlobalSampling:
    """Plain sampling: a single particle has nothing to be weighed against."""
    return GlobalSampling(particles=1, temperature=cut.temperature, top_k=cut.top_k, top_p=cut.top_p, min_p=cut.min_p)


def _mauves(every: Array, rows: Rows) -> Array:
    """MAUVE at every setting ``[K]`` over some contexts, of counts ``[K, 2, C, cells]``."""
    return np.array([mauve(*each[:, rows].sum(1)) for each in every])


def _mauve_at(every: Array, entropies: Array, level: float, rows: Rows) -> Array:
    return np.asarray(at_level(entropies[rows].mean(0), _mauves(every, rows), level))


def _mass(cut: Cut, logits: Tensor) -> float:
    """Mean mass that the cut keeps over contexts of ``logits [T, V]``."""
    return float(cut.log_weights(logits.float()).logsumexp(-1).exp().mean())
