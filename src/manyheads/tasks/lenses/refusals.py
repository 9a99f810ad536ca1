# SPDX-License-Identifier: Apache-2.0
"""How many refusals are left when heads are taken out: those that write along the refusal direction, or random ones.

A published chat model of little size refuses next to nothing (``before tuning`` says how much), so that refusals are
tuned in first, plainly, once: requests to be refused with one refusal, and as many harmless ones or more with the
model's own greedy answers. As the paper's models refuse before AHD, every arm goes on from this model (``aligned``): a
copy is tuned under it, embeddings aside, on the same batches, for as many steps. In it the direction of refusal is
found on the acts that were tuned on and chosen on others; on requests about acts that it has not seen heads are ranked
prompt by prompt and zeroed, and the greedy reply is judged by its phrases (:func:`manyheads.data.requests.is_refusal`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...data.requests import ACTS, PHRASINGS, REFUSAL, is_refusal
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, WorkUnit, seeding
from ...heads import layer_matched_heads
from ...training import TrainState, decay, fit
from ..text._text_task import model_of
from ._chat import base_model, greedy, rendered
from ._trained import told
from ._windows import WindowTask, nll

if TYPE_CHECKING:
    from ...lenses.safety_heads import Direction, HeadDropout

__all__ = ["Refusals"]

_FEW = 4  # requests to be refused in a step
_CHOICE = 4  # acts that the direction is chosen on
_BLOCKS = (0.3, 0.45, 0.6, 0.75)  # of the depth: where the direction is looked for
_REPLY = 8  # tokens of a reply that is judged, of REFUSAL all but its last
_BATCH = 32
Ids = list[int]
Heads = Sequence[tuple[str, ...]]  # of each prompt


@dataclass(frozen=True)
class _Prompts:
    """Requests of one kind: tokens, and the act of each."""

    ids: list[Ids]
    acts: list[int]


@dataclass(frozen=True, kw_only=True)
class Refusals(WindowTask):
    """Refusals of requests, to be refused and harmless ones, each without heads of its own.

    ``options`` of an arm: ``dropout``, the probability that a head is missing while refusals are tuned, and
    ``spare_anchors``, whether none is on the anchors. ``kept_apart`` is the refusal of a request to be refused less
    that of the harmless one beside it: a model that takes missing heads for a sign to refuse keeps refusals, not this.

    Attributes:
        aligned: steps of the plain tuning that makes the model which every arm goes on from.
        steps: of an arm's tuning.
        anchors: harmless requests in a step, beside four to be refused; 16 in the paper.
        lr: the highest rate.
        depth: part of the blocks that is tuned, the last ones; all of them in the paper.
        counts: of heads taken out.
        acts: how many of :data:`manyheads.data.requests.ACTS` are tested; the others are tuned on.
        draws: of random heads, of the layers of the ranked ones.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("refused", "requests to be refused that are", higher=True, kind="share"),
        Metric("wrongly_refused", "harmless requests refused", kind="share"),
        Metric("learned", "requests of acts tuned on that are refused, all heads", higher=True, kind="share"),
        Metric("kept_apart", "refusals less those of the harmless requests beside them", higher=True),
        Metric("text_nll", "loss of prose, all heads", "nats/token"),
        Metric("score_share", "share of the score that a tenth of the heads holds"),
        Metric("rule_lifted", "no direction met the paper's rule", kind="share"),
    )

    tokens: int = 96
    windows_of: int = 8
    aligned: int = 30
    steps: int = 30
    anchors: int = 16
    lr: float = 5e-5
    depth: float = 1.0
    counts: tuple[int, ...] = (8, 32)
    acts: int = 12
    draws: int = 1

    def unsupported_reason(self, run: RunContext) -> str | None:
        reason = super().unsupported_reason(run)
        return reason or base_model(cast(CausalLM, run.subject), "no answers of an assistant, so none that refuse")

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{seed}/{arm.key}", 2.0 * self.steps, f"tuning {arm.key}, seed {seed}",
                     {"seed": seed, "arm": arm.key})
            for seed in run.seeds
            for arm in run.arms
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...lenses.safety_heads import HeadDropout, ranked, strength

        seed, arm = unit.params["seed"], run.arm_of(unit)
        test = [self._prompts(run, kind, "test") for kind in (0, 1)]
        aligned = cast(Any, run.kept(("aligned", self), lambda: self._aligned(run)))
        if arm == run.baseline and seed == run.seeds[0]:
            for model, name in ((model_of(run), "before tuning"), (aligned, "aligned")):
                yield from self._without(run, arm, seed, model, test, [()], 0, name)
        dropout = HeadDropout(p=float(arm.options.get("dropout", 0.0)))
        spare = bool(arm.options.get("spare_anchors", True))
        model = self._tuned(run, aligned, f"{seed}", self.steps, dropout, spare, told(run, unit, 2 * self.steps))
        tuned = self._prompts(run, 0, "direction")
        for act, value in zip(tuned.acts, _refused(model, self._tokenizer(run), tuned, ()), strict=True):
            yield self.row("learned", arm, value, f"act {act}", seed=seed)
        direction, lifted = self._direction(run, model)
        yield self.row("rule_lifted", arm, lifted, "direction", seed=seed)
        tables = [self._scores(model, direction, part) for part in test]
        orders = [ranked(table, max(self.counts)) for table in tables]
        heads = tables[0].values.shape[2]
        yield from self._without(run, arm, seed, model, test, [()], 0, "none")
        for count in self.counts:
            first = [[row[:count] for row in order] for order in orders]
            drawn = [[_at_random(rows, heads, draw) for rows in first] for draw in range(self.draws)]
            yield from self._without(run, arm, seed, model, test, [first], count, "ranked")
            yield from self._without(run, arm, seed, model, test, drawn, count, "random")
        total = tables[0].values[0].size
        share = strength(tables[0], total // 10) / strength(tables[0], total)
        for act, value in zip(test[0].acts, share, strict=True):
            yield self.row("score_share", arm, value, f"act {act}", seed=seed)
        with torch.no_grad():
            yield from self.each("text_nll", arm, nll(model, self.windows(run)).mean(1).tolist(), seed=seed)
        run.advance(unit.cost / 2)

    def _prompts(self, run: RunContext, kind: int, use: str) -> _Prompts:
        """Requests to be refused (kind 0) or harmless ones (1), of the acts that a use has.

        The acts of the test and of the choice of the direction are two shares of the list, in an order that a run
        draws; the others are tuned on. Those of the test are worded in the last way, which tuning and the direction do
        not meet.
        """
        tokenizer = self._tokenizer(run)
        order = run.rng(acts="refusals").permutation(len(ACTS)).tolist()
        test, choice = self.acts, self.acts + _CHOICE
        acts, wordings = {
            "test": (order[:test], PHRASINGS[2:]), "choice": (order[test:choice], PHRASINGS[:1]),
            "direction": (order[choice:], PHRASINGS[:1]), "tuning": (order[choice:], PHRASINGS[:2]),
        }[use]  # fmt: skip
        asked = [(act, wording) for act in acts for wording in wordings]
        texts = [rendered(tokenizer, [{"role": "user", "content": w.format(ACTS[act][kind])}]) for act, w in asked]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return _Prompts(ids, [act for act, _ in asked])

    def _tokenizer(self, run: RunContext) -> Any:
        return cast(CausalLM, run.subject).tokenizer

    def _aligned(self, run: RunContext) -> Any:
        from ...lenses.safety_heads import HeadDropout

        return self._tuned(run, model_of(run), "aligned", self.aligned, HeadDropout(p=0.0))

    def _tuned(
        self, run: RunContext, start: Any, draws: str, steps: int, dropout: HeadDropout, spare_anchors: bool = True,
        on_step: Callable[[TrainState], None] | None = None,
    ) -> Any:  # fmt: skip
        """A copy of a model, tuned to refuse with heads dropped, in its own precision; ``draws`` names the batches."""
        import manyheads

        from ...lenses.refined_massive_activations.tvr import blocks_of
        from ...lenses.safety_heads import ahd_loss

        tokenizer, precision = self._tokenizer(run), next(start.parameters()).dtype
        model = copy.deepcopy(start).float()
        blocks = blocks_of(model)
        model.requires_grad_(False)
        for block in blocks[len(blocks) - max(1, round(self.depth * len(blocks))) :]:
            block.requires_grad_(True)
        bad, good = (self._prompts(run, kind, "tuning").ids for kind in (0, 1))
        refusal: Ids = tokenizer.encode(REFUSAL, add_special_tokens=False)
        own = model_of(run)
        kept = run.kept(("own answers", self), lambda: greedy_in_parts(own, tokenizer, good, len(refusal)))

        def draw(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            rng = run.rng(tune="refusals", draws=draws, step=step)
            first, second = rng.permutation(len(bad))[:_FEW], rng.permutation(len(good))[: self.anchors]
            return (
                _batch([bad[i] for i in first], [refusal] * len(first), run.device),
                _batch([good[i] for i in second], [kept[i] for i in second], run.device),
            )

        torch.manual_seed(seeding.number(run.seed, dropout="refusals", draws=draws))
        tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(tuned, lr=self.lr, betas=(0.5, 0.999), weight_decay=0.0)
        with manyheads.use(model, dropout):
            fit(
                model, draw, ahd_loss(dropout, spare_anchors=spare_anchors), budget=steps, optimizers=[optimizer],
                schedule=decay("linear", warmup=5, floor=0.1), bf16=precision == torch.bfloat16, on_step=on_step,
            )  # fmt: skip
        return model.to(precision)

    def _direction(self, run: RunContext, model: Any) -> tuple[Direction, bool]:
        """The direction of refusal at the last token, by the paper's rule; whether its bounds were lifted."""
        from ...lenses.safety_heads import find_direction

        tokenizer = self._tokenizer(run)
        train, check = ([self._tensors(run, kind, use) for kind in (0, 1)] for use in ("direction", "choice"))
        answers = [tokenizer.encode(REFUSAL, add_special_tokens=False)[0]]
        layers = model.config.num_hidden_layers
        blocks = sorted({int(part * layers) for part in _BLOCKS})

        def found(max_kl: float = 0.1, min_steering: float = 0.0) -> Direction:
            return find_direction(
                model, train[0], train[1], answers=answers, check=(check[0], check[1]), blocks=blocks, max_kl=max_kl,
                min_steering=min_steering,
            )  # fmt: skip

        try:
            return found(), False
        except UserError:
            return found(max_kl=float("inf"), min_steering=-float("inf")), True

    def _tensors(self, run: RunContext, kind: int, use: str) -> list[Tensor]:
        return [torch.tensor(ids) for ids in self._prompts(run, kind, use).ids]

    def _scores(self, model: Any, direction: Direction, prompts: _Prompts) -> Any:
        """What every head writes along the direction at the last token of each prompt, a table ``[N, L, H]``."""
        import manyheads

        from ...lenses.safety_heads import SafetyHeads

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            lens = SafetyHeads(direction=str(direction.save(Path(folder) / "direction.safetensors")))
            with manyheads.watch(model, lens) as seen:
                for start in range(0, len(prompts.ids), _BATCH):
                    part = _batch(prompts.ids[start : start + _BATCH], None, model.device)
                    model(**part, use_cache=False, logits_to_keep=1)
            return seen.compute().tables["score"]

    def _without(
        self, run: RunContext, arm: Arm, seed: int, model: Any, test: Sequence[_Prompts],
        draws: Sequence[Sequence[Heads] | tuple[()]], count: int, chosen: str,
    ) -> Iterator[Row]:  # fmt: skip
        """Rows of the mean over ``draws`` of heads that either kind of requests lacks."""
        tokenizer = self._tokenizer(run)
        found = [
            np.mean([_refused(model, tokenizer, part, heads[kind] if heads else ()) for heads in draws], 0)
            for kind, part in enumerate(test)
        ]
        at = {"heads": count, "chosen": chosen}
        for name, values in (
            ("refused", found[0]), ("wrongly_refused", found[1]), ("kept_apart", found[0] - found[1])
        ):  # fmt: skip
            for i, value in enumerate(values):
                yield self.row(name, arm, value, f"act {test[0].acts[i]}", seed=seed, at=at)


def _refused(model: Any, tokenizer: Any, prompts: _Prompts, heads: Heads) -> list[float]:
    """Whether each request is refused, without its own ``heads``."""
    import manyheads

    from ...lenses.safety_heads import AblateRows

    made: list[float] = []
    for start in range(0, len(prompts.ids), _BATCH):
        rows = slice(start, start + _BATCH)
        gone = [AblateRows(heads=tuple(heads[rows]))] if heads else []
        with manyheads.use(model, *gone):
            replies = greedy(model, tokenizer, prompts.ids[rows], _REPLY)
        made += [float(is_refusal(tokenizer.decode(reply))) for reply in replies]
    return made


def greedy_in_parts(model: Any, tokenizer: Any, prompts: Sequence[Ids], count: int) -> list[Ids]:
    """Greedy replies to any number of prompts, a batch at a time."""
    parts = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
    return [reply for part in parts for reply in greedy(model, tokenizer, part, count)]


def _batch(prompts: Sequence[Ids], answers: Sequence[Ids] | None, device: Any) -> dict[str, Tensor]:
    """Rows padded on the left; with answers also their labels, -100 elsewhere."""
    rows = [[*prompt, *(answers[i] if answers else ())] for i, prompt in enumerate(prompts)]
    longest = max(map(len, rows))

    def padded(values: Sequence[Sequence[int]], by: int) -> Tensor:
        return torch.tensor([[by] * (longest - len(row)) + list(row) for row in values], device=device)

    made = {"input_ids": padded(rows, 0), "attention_mask": padded([[1] * len(row) for row in rows], 0)}
    if answers:
        made["labels"] = padded(
            [[-100] * len(prompt) + list(answer) for prompt, answer in zip(prompts, answers, strict=True)], -100
        )
    return made


def _at_random(order: Heads, heads: int, draw: int) -> Heads:
    """For each prompt, as many random heads of the layers of its own, others than those while there are others."""
    made = []
    for i, row in enumerate(order):
        taken = [(int(layer), int(head)) for layer, head in (name.split(".") for name in row)]
        drawn = layer_matched_heads(taken, heads, 10_000 * draw + i, taken)
        made.append(tuple(f"{layer}.{head}" for layer, head in drawn))
    return made
