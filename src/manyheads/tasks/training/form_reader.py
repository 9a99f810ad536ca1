# SPDX-License-Identifier: Apache-2.0
"""Labels of the words of generated forms, by a linear probe of a published encoder whose attention a page masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ... import catalog
from ...data.forms import LABELS, Form
from ...errors import refusal
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ..text._reader import reader
from ._training_task import Training
from .form_labels import VALUE, FormLabels, judged_forms

__all__ = ["FormReader"]

_AT_ONCE = 16  # pages read at once
_PENALTIES = (1e-4, 1e-3, 1e-2)  # of half the squared weights, beside the mean loss


@dataclass(frozen=True, kw_only=True)
class FormReader(FormLabels):
    """A published encoder, frozen, reads forms; a logistic probe of its last hidden states names the label of a word.

    The encoder knows no boxes. An arm whose mixer has a map of the page (``skim_attention``) masks the encoder's
    attention with the ``top_k`` words of that map, which is trained on labels of forms, as ``form_labels`` does; any
    other arm leaves it as it is. ``options`` of an arm: ``mask``, one of ``full``, ``skim``, ``nearest`` and ``random``
    (words, as many), and ``map_of``, the name of the arm whose map it is. Probes are fitted for every arm anew, on
    forms that no map was trained on, and their penalty is chosen on others; the state of a word is the mean of its
    pieces.

    Attributes:
        model: an encoder, see :func:`manyheads.models.load_reader`.
        top_k: words that a word sees.
        fitted: forms that a probe is fitted on.
    """

    reports: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("probed", "words that a probe labels right", higher=True, kind="share", floor=0.6),
        Metric("value_probed", "words of values that a probe labels right", higher=True, kind="share", floor=0.25),
    )

    model: str = "all-minilm-l6-v2"
    top_k: int = 12
    fitted: int = 192

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: reader(run, self.model))

    def read_arms(self, run: RunContext) -> list[Arm]:
        """Arms that read: those with a mask of their options, or all where none has."""
        return [arm for arm in run.arms if "mask" in arm.options] or list(run.arms)

    def trained_arms(self, run: RunContext) -> list[Arm]:
        found = {self._map(run, arm).key: self._map(run, arm) for arm in self.read_arms(run) if self._by(arm) == "skim"}
        return list(found.values())

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float((self.fitted + 2 * self.samples) * self.length)
        found = [(arm.key, seed) for seed in run.seeds[: self.trainings or None] for arm in self.read_arms(run)]
        return [
            WorkUnit(self.key, f"{arm}/{seed}", cost, f"{arm}: probe {seed + 1}", {"arm": arm, "seed": seed})
            for arm, seed in found
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        mixer: Any = None
        if self._by(arm) == "skim":
            encoder: Any = Training(self, run, self._map(run, arm)).model(seed).model
            mixer = encoder.blocks[0].mixer
        parts = {
            part: judged_forms(run, f"{part} {seed}" if part == "probe" else part, count, self.length)
            for part, count in (("probe", self.fitted), ("validation", self.samples), ("test", self.samples))
        }
        states = {part: self._states(run, arm, forms, mixer, seed) for part, forms in parts.items()}
        labels = {part: torch.stack([each.labels for each in forms]).to(run.device) for part, forms in parts.items()}
        said = _probe(states, labels).cpu()
        for i, (each, found) in enumerate(zip(parts["test"], said, strict=True)):
            right = (found == each.labels).float()
            more: dict[str, Any] = {"seed": seed, "at": {"order": each.order}}
            yield self.row("probed", arm, right.mean(), f"{i}", **more)
            yield self.row("value_probed", arm, right[each.labels >= VALUE].mean(), f"{i}", **more)

    def _by(self, arm: Arm) -> str:
        return str(arm.options.get("mask") or ("skim" if arm.spec.startswith("skim_attention") else "full"))

    def _map(self, run: RunContext, arm: Arm) -> Arm:
        """The arm whose map it is."""
        return next(one for one in run.arms if one.name == arm.options.get("map_of", arm.name))

    @torch.no_grad()
    def _states(self, run: RunContext, arm: Arm, forms: Sequence[Form], mixer: Any, seed: int) -> Tensor:
        """Of the words of forms, ``[N, T, width]`` in float32."""
        model, tokenizer = reader(run, self.model)
        by, found = self._by(arm), []
        strategy: Any = catalog.load("skim_attention.mask")
        for first in range(0, len(forms), _AT_ONCE):
            some = forms[first : first + _AT_ONCE]
            read = tokenizer(
                [list(each.words) for each in some], is_split_into_words=True, padding=True, return_tensors="pt"
            )
            words = torch.tensor([[-1 if w is None else w for w in read.word_ids(i)] for i in range(len(some))])
            given = {name: x.to(run.device) for name, x in read.items()}
            if by == "full":
                out = model(**given).last_hidden_state
            else:
                boxes = torch.stack([each.boxes for each in some])
                each_piece = boxes.gather(1, words.clamp(min=0)[..., None].expand(-1, -1, 4)).masked_fill(
                    (words < 0)[..., None], 0
                )
                mask = strategy(top_k=self.top_k, by=by, seed=1000 * seed + first)
                with use(model, mask.on_pages(each_piece.to(run.device), mixer)):
                    out = model(**given).last_hidden_state
            of = torch.nn.functional.one_hot(words + 1, self.length + 1)[..., 1:].to(run.device, torch.float32)
            found.append((of.mT @ out.float()) / of.sum(1)[..., None])
            run.advance(float(len(some) * self.length))
        return torch.cat(found)


def _probe(states: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """What logistic regression on the states of ``probe`` says of ``test``: labels ``[N, T]``."""
    x = {part: each.flatten(0, 1) for part, each in states.items()}
    mean, spread = x["probe"].mean(0), x["probe"].std(0).clamp(min=1e-6)
    x = {part: (each - mean) / spread for part, each in x.items()}
    best: tuple[float, Tensor] | None = None
    for penalty in _PENALTIES:
        weight = torch.zeros(x["probe"].shape[1], len(LABELS), device=mean.device, requires_grad=True)
        bias = torch.zeros(len(LABELS), device=mean.device, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=150, line_search_fn="strong_wolfe")

        def closure(
            weight: Tensor = weight, bias: Tensor = bias, penalty: float = penalty, solver: Any = solver
        ) -> Tensor:
            solver.zero_grad()
            fit = cross_entropy(x["probe"] @ weight + bias, labels["probe"].flatten())
            loss = fit + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        with torch.no_grad():
            loss = float(cross_entropy(x["validation"] @ weight + bias, labels["validation"].flatten()))
            if best is None or loss < best[0]:
                best = loss, (x["test"] @ weight + bias).argmax(-1)
    assert best is not None
    return best[1].view_as(labels["test"])
